"""The query of a marker: which runs, which table, figure or value of them, and its words."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import yaml

from qexp.common.errors import UserError, first_line
from qexp.report.pivot import SEED
from qexp.report.query import Query
from qexp.report.tables import COSTS, Style
from qexp.runs.finished import word

BOTH = ("records", "where", "metrics", "over")
FIELDS = {
    "table": (*BOTH, "baseline", "rows", "columns", "sort", "titles", "labels", "digits", "costs"),
    "figure": (*BOTH, "file", "x", "alt"),
    "value": (*BOTH, "baseline", "digits", "show"),
}
SHOWN = ("mean", "spread", "change", "interval")
PICTURES = (".svg", ".png")


@dataclass(frozen=True)
class Spec:
    """`records`: folders of records or of runs. `file`: of a figure, relative to its page. `x`: the
    quantity of its x axis. `show`: of a value, one of SHOWN."""

    records: tuple[str, ...]
    query: Query
    style: Style = field(default_factory=Style)
    file: str = ""
    x: str = "weight/bits"
    alt: str = ""
    show: str = "mean"


def read(kind: str, text: str) -> Spec:
    """The query of a marker of one of FIELDS, from its yaml.

    Raises UserError for text that is not yaml and for a missing, an unknown or a wrong field.
    """
    try:
        given = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"the query is not yaml: {first_line(error)}; correct it") from error
    if not isinstance(given, dict):
        raise UserError(f"the query is {text.strip()!r}; give fields such as records: docs/records")
    for name in given:
        if name not in FIELDS[kind]:
            near = get_close_matches(str(name), FIELDS[kind], n=1) or FIELDS[kind]
            raise UserError(f"{name}: a {kind} has no such field; perhaps {', '.join(near)}")
    query = Query(
        rows=_list(given, "rows"),
        columns=_list(given, "columns"),
        metrics=_list(given, "metrics"),
        over=_list(given, "over") or SEED,
        baseline=_baseline(given.get("baseline")),
        where=_where(given.get("where")),
        sort=str(given.get("sort") or ""),
    )
    labels = {
        str(key): {word(value): str(label) for value, label in _mapping(names, key).items()}
        for key, names in _mapping(given.get("labels"), "labels").items()
    }
    titles = {str(key): str(name) for key, name in _mapping(given.get("titles"), "titles").items()}
    style = Style(titles, labels, _digits(given), _list(given, "costs", ("bits",)))
    if unknown := [name for name in style.costs if name not in COSTS]:
        raise UserError(f"costs {', '.join(unknown)}: unknown; give some of {', '.join(COSTS)}")
    words = {name: str(given[name]) for name in ("file", "x", "alt", "show") if name in given}
    spec = Spec(_list(given, "records"), query, style, **words)
    if not spec.records:
        raise UserError("records: missing; name a folder of records, records: docs/records/oac")
    if kind == "figure" and not spec.file.endswith(PICTURES):
        raise UserError(f"file: {spec.file or 'missing'}; name a file {' or '.join(PICTURES)}")
    if kind == "value" and len(query.metrics) != 1:
        raise UserError("metrics: a value is of one metric; name it, metrics: c4/ppl")
    if spec.show not in SHOWN:
        raise UserError(f"show: {spec.show} is unknown; give {' or '.join(SHOWN)}")
    if spec.show in SHOWN[2:] and not query.baseline:
        raise UserError(f"show: {spec.show} needs a baseline; add for example baseline: method=rtn")
    return spec


def _list(given: Mapping[str, Any], name: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
    if name not in given:
        return default
    value = given[name]
    return tuple(word(each) for each in (value if isinstance(value, list) else [value]))


def _mapping(value: Any, name: object) -> Mapping[Any, Any]:
    if not isinstance(value, dict | None):
        raise UserError(f"{name}: {value} is no mapping; give key: value")
    return value or {}


def _where(value: Any) -> tuple[dict[str, tuple[str, ...]], ...]:
    alternatives = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(
        {str(key): _list(mapping, key) for key in _mapping(mapping, "where")}
        for mapping in alternatives
    )


def _baseline(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        pairs = [each.partition("=") for each in value.split(",")]
        if not all(equals for _, equals, _ in pairs):
            raise UserError(f"baseline {value}: is not key=value; give for example method=rtn")
        return {key: label for key, _, label in pairs}
    return {str(key): word(label) for key, label in _mapping(value, "baseline").items()}


def _digits(given: Mapping[str, Any]) -> int | None:
    digits = given.get("digits")
    if digits is not None and (type(digits) is not int or not 0 <= digits <= 9):
        raise UserError(f"digits: {digits}; give a whole number from 0 to 9")
    return digits
