"""Published tables: what is missing is run, what stands is judged."""

import math
from pathlib import Path

import pytest
from helpers.stub import SMALL
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qexp.cli import command
from qexp.commands import reproduce
from qexp.common.errors import UserError
from qexp.config import location
from qexp.config.instantiate import instantiate
from qexp.report import comparison
from qexp.report.comparison import Comparison, Place, Row
from qexp.report.pivot import Setting, Spread
from qexp.runs.finished import Column, Run
from qexp.runs.signature import signature

IDS = reproduce.ids()
COLUMN = Column("text/ppl", "")


def paper(**fields: object) -> Comparison:
    """GPTQ published at 37.1 and RTN at 80, which the stub of a run measures as 37 and 38."""
    own = Place("held_out/ppl", [*SMALL, "logger=none"])
    other = Place("held_out/ppl", [*SMALL, "logger=none"], [0, 1], replaced="model")
    rows = {
        "gptq": Row(["method=gptq", "weight.bits=3"], {"own": 37.1}),
        "rtn": Row(["method=rtn", "weight.bits=2"], {"own": 80.0}),
    }
    content = {"columns": {"own": own, "other": other}, "rows": rows, "orders": ["gptq < rtn"]}
    facts = {"title": "A table", "source": "a book", "inferred": "nothing", "tolerance": 0.01}
    return Comparison(**{**facts, **content, **fields})


def verdicts(text: str) -> dict[tuple[str, str], str]:
    """By row and column, of both tables."""
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    found = {(line[1], line[2]): line[6] for line in lines if len(line) == 9}
    return found | {(line[1], line[2]): line[3] for line in lines if len(line) == 6}


def test_a_number_is_reached_or_not_and_a_stand_in_is_judged_by_order(qexp) -> None:
    text, well = reproduce.report("gptq_opt", paper(), ["own", "other"], [], False)
    found = verdicts(text)
    assert found["gptq", "own"] == "reached"
    assert found["rtn", "own"] == "not reached"
    assert found["gptq", "other"] == found["rtn", "other"] == "not comparable: model replaced"
    assert found["gptq < rtn", "own"] == "untested"  # one seed
    assert verdicts(text)["gptq < rtn", "other"] == "holds"
    assert "2 of 2 seeds, -3.0% to -2.2%, p 0.0084" in text and "-52.5%" in text
    assert not well
    folders = {path.parent for path in Path("outputs").glob("*/metrics.json")}
    assert len(folders) == 4 and all(str(folder) in text for folder in folders)


def test_what_stands_is_not_run_again_and_show_runs_nothing(qexp, capsys) -> None:
    text, well = reproduce.report("gptq_opt", paper(), ["other"], [], True)
    assert verdicts(text)["gptq", "other"] == "not run" and not well
    assert not list(Path("outputs").glob("*/metrics.json"))
    first, well = reproduce.report("gptq_opt", paper(), ["other"], [], False)
    assert well
    written = {path: path.stat().st_mtime_ns for path in Path("outputs").glob("*/metrics.json")}
    again, _ = reproduce.report("gptq_opt", paper(), ["other"], [], False)
    assert again == first
    assert written == {p: p.stat().st_mtime_ns for p in Path("outputs").glob("*/metrics.json")}


def test_overrides_may_follow_options(monkeypatch, capsys) -> None:
    seen = []
    monkeypatch.setattr(reproduce, "plans", lambda *given: seen.append(given) or "")
    words = ["gptq_opt", "--columns", "tiny", "save_weights=false", "--dry-run"]
    assert command("reproduce", words) == 0
    [(name, _, columns, extra)] = seen
    assert (name, columns, extra) == ("gptq_opt", ["tiny"], ["save_weights=false"])


def test_a_dry_run_lists_every_job_and_runs_none(qexp) -> None:
    before = reproduce.plans("gptq_opt", paper(), ["own", "other"], ["save_weights=false"])
    assert before.splitlines()[-1] == "6 jobs: 6 to run" and "other rtn: to run" in before
    assert not list(Path("outputs").glob("*/metrics.json"))
    reproduce.report("gptq_opt", paper(), ["own"], [], False)
    after = reproduce.plans("gptq_opt", paper(), ["own", "other"], ["save_weights=false"])
    assert after.count(": answered") == 4  # the first seed of `other` is `own`
    assert "6 jobs: 2 to run, about" in after and "of 2 finished runs" in after


def settings(*rows: tuple[float, ...]) -> list[Setting]:
    """One for each row, with a run for each seed."""
    config = {"seed": 0, "method": ""}
    made = []
    for number, row in enumerate(rows):
        runs = []
        for seed, value in enumerate(row):
            leaves = {**config, "seed": seed, "method": str(number)}
            metrics = {COLUMN.name: float(value)}
            runs.append(Run(Path(f"{number}-{seed}"), {}, config, leaves, (), metrics, {}))
        made.append(Setting(tuple(runs)))
    return made


@pytest.mark.parametrize(
    ("less", "more", "verdict"),
    [
        ((10, 11, 12), (11, 12.1, 13.3), "holds"),
        ((11, 12.1, 13.3), (10, 11, 12), "reversed"),
        ((19.96, 20.2, 19.7), (19.98, 19.9, 20.1), "level"),  # the lower mean, p 0.9
        ((10, 11, 12), (10.1, 10.9, 12.9), "level"),
        ((10,), (20,), "untested"),
        ((10, 10), (20, 20), "untested"),  # no seed changes anything
        ((10, math.inf), (20, 20), "untested"),
    ],
)
def test_an_order_holds_where_the_interval_of_the_paired_difference_says_so(
    less: tuple[float, ...], more: tuple[float, ...], verdict: str
) -> None:
    one, other = settings(less, more)
    assert comparison.order(one, other, COLUMN)[0] == verdict


def test_a_row_that_no_seed_changes_is_paired_with_every_seed() -> None:
    one, other = settings((10, 11, 10.4), (20,))
    assert comparison.order(one, other, COLUMN) == ("untested", "one seed of both")
    verdict, said = comparison.order(one, other, COLUMN, (True, False))
    assert verdict == "holds" and said.startswith("3 of 3 seeds, -5")
    assert comparison.order(other, one, COLUMN, (False, True))[0] == "reversed"


def test_what_is_not_tested_level_or_reversed_is_no_success(qexp, monkeypatch) -> None:
    """The exit code of one order alone, in a column that nothing else is judged in."""
    table = paper()
    monkeypatch.setattr(reproduce, "load", lambda name: table)
    words = ["gptq_opt", "--columns", "other"]
    assert reproduce.main(words) == 0
    assert reproduce.main([*words, "--seeds", "0"]) == 1
    with pytest.raises(UserError, match="--seeds 0,one"):
        reproduce.main([*words, "--seeds", "0,one"])
    table = paper(orders=["rtn < gptq"])
    assert reproduce.main(words) == 1


def test_a_job_that_fails_says_why_and_takes_no_other_with_it(qexp) -> None:
    rows = {**paper().rows, "gptq": Row(["method=gptq", "weight.bits=11"], {"own": 1.0})}
    text, well = reproduce.report("gptq_opt", paper(rows=rows), ["own"], [], False)
    assert "weight.bits=11: is not wanted" in verdicts(text)["gptq", "own"]
    assert verdicts(text)["rtn", "own"] == "not reached"
    assert verdicts(text)["gptq < rtn", "own"] == "not run" and not well


def test_another_model_on_the_command_line_is_not_the_papers(qexp) -> None:
    text, _ = reproduce.report("gptq_opt", paper(), ["own"], ["data.count=100"], False)
    assert verdicts(text)["gptq", "own"] == "not comparable: data.count=100 replaced"


def test_a_number_far_from_the_published_one_is_not_reached() -> None:
    table = paper()
    assert table.verdict("gptq", "own", Spread({"0": 37.4})) == "reached"
    assert table.verdict("gptq", "own", Spread({"0": 37.6})) == "not reached"
    assert table.verdict("gptq", "own", Spread({"0": float("nan")})) == "not reached"
    assert table.verdict("gptq", "own", Spread({})) == "not run"


def test_a_table_that_names_what_is_not_there_is_refused() -> None:
    content = {
        "title": "a", "source": "b", "inferred": "c", "tolerance": 0.1,
        "columns": {"own": {"metric": "x/ppl"}},
        "rows": {"gptq": {"published": {"own": 1}}},
    }  # fmt: skip
    made = comparison.read(OmegaConf.create(content), "paper/it")
    assert made.rows["gptq"].published == {"own": 1.0}
    for wrong in (
        {"orders": ["gptq < rtn"]},
        {"columns": {"own": {"metric": "x/ppl", "orders": ["rtn < gptq"]}}},
        {"tolerance_": 1},
        {"rows": {"a": {"published": {"b": 1}}}},
    ):
        with pytest.raises(UserError, match=r"experiment/paper/it\.yaml"):
            comparison.read(OmegaConf.create({**content, **wrong}), "paper/it")


@pytest.mark.parametrize("name", [name for name in IDS if "/" not in name])
def test_published_numbers_are_in_the_expected_order(name) -> None:
    table = reproduce.load(name)
    for column in table.columns:
        for less, more in table.pairs(column):
            one, other = (table.rows[row].published.get(column) for row in (less, more))
            assert one is None or other is None or one < other, (column, less, more)
    stand_ins = {key for key, place in table.columns.items() if place.replaced and place.judged}
    assert "smollm2" in stand_ins and all(table.pairs(column) for column in stand_ins)
    assert not table.columns["tiny"].judged


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if "/" in name else ()) for name in IDS],
)
def test_every_job_composes_and_none_is_another(name) -> None:
    table = reproduce.load(name)
    whole = "smollm2" if "smollm2" in table.columns else next(iter(table.columns))
    with initialize_config_dir(version_base="1.3", config_dir=str(location.conf())):
        for column in table.columns:
            metric = table.columns[column].metric.split("/")[0]
            rows = table.wanted(column)
            if column != whole:  # one row: the rows are the same
                rows = rows[:1]
            seen = set()
            for row in rows:
                words = [f"experiment={reproduce.experiment(name)}", *table.jobs(row, column)[0]]
                cfg = compose("config", words)
                instantiate(cfg.model)  # no key of another kind of model is left
                assert metric in [node.name for node in cfg.eval.values()]
                seen.add(signature(cfg))
            assert len(seen) == len(rows)


# The project's four papers, and the tables whose kinds of columns or methods no other table has.
TINY = (
    *("autoround_llama", "bitdistiller_llama2", "contapprox", "flatquant_llama", "gptq_opt"),
    *("kivi", "kvquant_llama", "loftq_llama2", "oac_2bit", "oac_binary", "quadapter", "quanttune"),
    *("squeezellm_llama", "leaderboard/kv", "leaderboard/weights_2"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_the_tiny_stand_in_runs(name, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("reproduce", [name, "--columns", "tiny"]) == 0
    said = capsys.readouterr().out
    assert "not comparable: model and data replaced" in said and "not run" not in said


def test_ids_and_columns_are_listed_and_misspellings_answered(capsys) -> None:
    assert command("reproduce", ["gptq_optt"]) == 1
    assert "did you mean gptq_opt?" in capsys.readouterr().err
    assert command("reproduce", ["gptq_opt", "--columns", "smolm2"]) == 1
    assert "did you mean smollm2?" in capsys.readouterr().err
