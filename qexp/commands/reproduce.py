"""A paper's table or a leaderboard: missing jobs run, published numbers are compared."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir

from qexp.common.errors import UserError
from qexp.config import messages
from qexp.config.location import conf
from qexp.report import comparison, formats, origin, tables
from qexp.report.comparison import Comparison
from qexp.report.pivot import Setting
from qexp.report.tables import Cell, Sheet
from qexp.runs import finished, recorded, results
from qexp.runs.finished import Column
from qexp.sweeps import dry_run, in_process

OUTPUTS = Path("outputs")
PAPERS, BOARDS = "paper", "leaderboard"  # folders of conf/experiment
TITLES = ("row", "column", "published", "measured", "off", "verdict", "run")
OF_PUBLISHED = ("published", "off")
DATA = ("model", "data", "calibration", "eval")  # overriding one of them leaves the paper's setup


@dataclass(frozen=True)
class Measured:
    """The runs of one row in one column, or the reason why there are none."""

    setting: Setting | None
    reason: str = ""

    def column(self, metric: str) -> Column:
        """The metric's column, if all seeds have the same definition."""
        found = [c for c in self.setting.seeded if c.name == metric] if self.setting else []
        return found[0] if len(found) == 1 else Column(metric, "")


def main(arguments: Sequence[str]) -> int:
    """The command line of `qexp reproduce`; 0 where every number that is judged is reached and
    every order holds, else 1 (also for level, reversed, untested and not run)."""
    parser = argparse.ArgumentParser(prog="qexp reproduce", description=__doc__)
    parser.add_argument("ids", nargs="*", help=f"of {', '.join(ids())}; or key=value for all jobs")
    parser.add_argument("--columns", help="by commas; the paper's own models by default")
    parser.add_argument("--seeds", help="by commas, instead of those of each column")
    parser.add_argument("--show", action="store_true", help="run nothing: what stands on disk")
    parser.add_argument("--dry-run", action="store_true", help="the jobs and what they would take")
    chosen = parser.parse_intermixed_args(arguments)
    extra = [word for word in chosen.ids if "=" in word]
    code = 0
    for name in [word for word in chosen.ids if "=" not in word] or ids():
        asked = load(name)
        if chosen.seeds:
            asked = asked.over(chosen.seeds)
        if chosen.columns:
            columns = chosen.columns.split(",")
        else:
            columns = [key for key, place in asked.columns.items() if not place.replaced]
        for column in columns:
            if column not in asked.columns:
                raise UserError(f"--columns {column}: {messages.nearest(column, asked.columns)}")
        if not chosen.ids:
            print(f"{name}: {asked.title}; columns {', '.join(asked.columns)}")
            continue
        if chosen.dry_run:
            print(plans(name, asked, columns, extra))
            continue
        text, well = report(name, asked, columns, extra, chosen.show)
        print(text)
        code = code or int(not well)
    return code


def ids() -> list[str]:
    """The ids of all tables: of papers as they are, of others with their folder."""
    top = conf() / "experiment"
    papers = sorted(path.stem for path in (top / PAPERS).glob("[!_]*.yaml"))
    return papers + sorted(f"{BOARDS}/{path.stem}" for path in (top / BOARDS).glob("[!_]*.yaml"))


def experiment(name: str) -> str:
    """The experiment of a table."""
    return name if "/" in name else f"{PAPERS}/{name}"


def load(name: str) -> Comparison:
    """A table by its id. Raises UserError for an unknown one."""
    if name not in ids():
        raise UserError(f"{name}: is no table; {messages.nearest(name, ids())}")
    with initialize_config_dir(version_base="1.3", config_dir=str(conf())):
        found = compose("config", [f"experiment={experiment(name)}"])
        return comparison.read(found.table, experiment(name))


def report(
    name: str, asked: Comparison, columns: Sequence[str], extra: Sequence[str], show: bool
) -> tuple[str, bool]:
    """The table as Markdown, and whether all numbers are reached and all orders hold."""
    found = {
        (row, column): measure(name, asked, row, column, extra, show)
        for column in columns
        for row in asked.wanted(column)
    }
    changed = ", ".join(word for word in extra if word.partition("=")[0].partition(".")[0] in DATA)
    numbers = [_judge(asked, *place, measured, changed) for place, measured in found.items()]
    orders = []
    for column in columns:
        for less, more in asked.pairs(column):
            one, other = found.get((less, column)), found.get((more, column))
            if one is not None and other is not None:
                said = ("not run", "")
                if one.setting is not None and other.setting is not None:
                    metric = one.column(asked.columns[column].metric)
                    seeded = asked.rows[less].seeded, asked.rows[more].seeded
                    said = comparison.order(one.setting, other.setting, metric, seeded)
                orders.append([f"{less} < {more}", column, *said])
    text = [f"## {name}: {asked.title}"]
    if asked.source:
        text.append(f"Source: {asked.source}. Inferred: {asked.inferred}")
    lines = [TITLES, *numbers]
    if not asked.is_published:
        kept = [at for at, title in enumerate(TITLES) if title not in OF_PUBLISHED]
        lines = [[line[at] for at in kept] for line in lines]
    text.append(_table(lines[0], lines[1:]))
    if orders:
        text.append(_table(("expected", "column", "verdict", "seeds"), orders))
    text.append(_machines([each.setting for each in found.values() if each.setting is not None]))
    verdicts = [line[5] for line in numbers] + [line[2] for line in orders]
    well = all(v in ("", "reached", "holds") or v.startswith("not comparable") for v in verdicts)
    return "\n\n".join([*text, ""]), well


def _judge(asked: Comparison, row: str, column: str, measured: Measured, changed: str) -> list[str]:
    """A line of the table."""
    wanted = asked.rows[row].published.get(column, math.nan)
    setting, metric = measured.setting, asked.columns[column].metric
    if setting is None:
        said = f"not run ({measured.reason})" if measured.reason else "not run"
        return [row, column, tables.number(wanted), "", "", said, ""]
    at = measured.column(metric)
    value = setting.spread(at)
    verdict = asked.verdict(row, column, value, changed or sampled(setting))
    share = value.mean / wanted - 1
    off = "" if math.isnan(share) else f"{share:+.1%}"
    folders = ", ".join(run.place for run in setting.runs)
    return [
        *(row, column, tables.number(wanted), tables.spread(setting, at)),
        *(off, verdict, folders),
    ]


def measure(
    name: str, asked: Comparison, row: str, column: str, extra: Sequence[str], show: bool
) -> Measured:
    """The runs of a cell. Missing runs are started by the command `qexp` unless `show`."""
    made = []
    for job in asked.jobs(row, column):
        words = [f"experiment={experiment(name)}", *job, *extra]
        try:
            cfg, folder = in_process.composed(words)
        except UserError as error:
            return Measured(None, str(error))
        if not show and results.stale(folder) is not None:
            in_process.command([*words, f"hydra.run.dir={folder}"])
        failed = finished.failure(folder)
        place = folder if (folder / results.METRICS).is_file() else recorded.lookup(cfg).path
        if place is None or (failed and not show):
            return Measured(None, "" if show else failed or "it did not finish")
        made.append(finished.load(place))
    return Measured(Setting(tuple(made)))


def plans(name: str, asked: Comparison, columns: Sequence[str], extra: Sequence[str]) -> str:
    """The jobs of some columns, which of them have finished, and the estimated cost of others."""
    past = dry_run.finished_runs(OUTPUTS)
    found = [
        dry_run.plan(
            *in_process.composed([f"experiment={experiment(name)}", *job, *extra]),
            f"{column} {row}",
            past,
        )
        for column in columns
        for row in asked.wanted(column)
        for job in asked.jobs(row, column)
    ]
    return "\n".join([f"{name}: {asked.title}", *map(str, found), dry_run.total(found, len(past))])


def sampled(setting: Setting) -> str:
    """Corpora of which a run read a local sample that differs from the hub's."""
    from qexp.data.catalog import CATALOG

    parts = [(corpus, part) for corpus, facts in CATALOG.items() for part in facts.parts.values()]
    samples = {part.local: c for c, part in parts if part.local_share != part.hub_share}
    files = [name for run in setting.runs for name in run.provenance.get("inputs", {})]
    found = {
        corpus for local, corpus in samples.items() for f in files if local and f.endswith(local)
    }
    return ", ".join(sorted(found))


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = tuple(tuple(Cell(text) for text in row) for row in rows)
    return formats.markdown(Sheet(tuple(("", title) for title in titles), len(titles), lines, {}))


def _machines(settings: Sequence[Setting]) -> str:
    runs = [run for setting in settings for run in setting.runs]
    parts = (*origin.machines(runs), *origin.commits(runs))
    return "Measured on: " + ("; ".join(parts) or "nothing yet")
