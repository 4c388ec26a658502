"""Settings over their seeds, tables of them, and who is better than whom."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from qexp.common.errors import UserError
from qexp.report import formats, pivot, query, significance, tables
from qexp.runs.finished import Column, Run, flat

PPL = Column("text/ppl", "12345678")
STAGES = {"stages": {"quantize": {"seconds": 1.5}}}


def run(method: str, seed: int, ppl: float, finished: str = "", **fields: object) -> Run:
    """A run without a folder; `digest` and `bits` are what they say, other fields are keys."""
    digest, bits = str(fields.pop("digest", PPL.digest)), fields.pop("bits", 3)
    config = {
        "method": {"_target_": method, "grid": "" if method == "none" else "${weight}", **fields},
        "weight": {"bits": bits},
        "seed": seed,
        "label": f"{method} {seed}",
    }
    return Run(
        Path(f"{method}-{bits}-{seed}"),
        {"model": "tiny", "method": method, "hydra/launcher": "basic", "logger": "csv"},
        config,
        flat(config, without=["label"]),
        (),
        {"text/ppl": float(ppl), "weight/bits": float(str(bits))},
        {"protocols": {"text": {"digest": digest}}, "finished": finished} | STAGES,
    )


def seeds(method: str, *ppl: float, **fields: object) -> list[Run]:
    return [run(method, seed, value, **fields) for seed, value in enumerate(ppl)]


def test_seeds_are_averaged_and_nothing_else_is() -> None:
    found = pivot.group([*seeds("gptq", 10, 11, 13), *seeds("gptq", 7, bits=4), *seeds("rtn", 20)])
    spreads = [setting.spread(PPL) for setting in found]
    assert [spread.count for spread in spreads] == [3, 1, 1]
    assert spreads[0].mean == pytest.approx(34 / 3)
    assert spreads[0].deviation == pytest.approx(math.sqrt(7 / 3))
    assert math.isnan(spreads[1].deviation)
    [whole] = pivot.group([*seeds("gptq", 1, damp=1), *seeds("gptq", 2, damp=2)], ["method.damp"])
    assert whole.spread(PPL).values == {"1": 1, "2": 2}


def test_a_seed_counts_once_and_the_latest_run_speaks_for_it() -> None:
    old, new = run("gptq", 0, 10, finished="2026-01"), run("gptq", 0, 12, finished="2026-02")
    [setting] = pivot.group([new, old])
    assert setting.spread(PPL).values == {"0": 12}


def test_changes_from_the_float_model_are_as_good_as_their_metric() -> None:
    changes = ("acc_change", "acc_wrong_to_right", "acc_right_to_wrong", "loss_change")
    names = [f"tasks/{name}" for name in ("acc", *changes, "wrong_to_right")]
    own = {"protocols": {"tasks": {"digest": "", "higher_is_better": ["acc"]}}}
    errors = {f"{name}_stderr": 1.0 for name in names}
    one = replace(run("gptq", 0, 10), provenance=own, metrics=dict.fromkeys(names, 0.5) | errors)
    higher = {column.name.rpartition("/")[2]: column.higher for column in one.columns}
    better = ["acc", "acc_change", "acc_wrong_to_right", "wrong_to_right"]
    assert [name for name, more in higher.items() if more] == better
    assert len(higher) == len(names)


def test_definitions_do_not_mix() -> None:
    other = Column(PPL.name, "another0")
    [setting] = pivot.group([run("gptq", 0, 10), run("gptq", 1, 99, digest="another0")])
    assert setting.spread(PPL).values == {"0": 10}
    assert setting.spread(other).values == {"1": 99}
    assert pivot.pivot([setting]).columns == (PPL, other)


def test_only_keys_that_tell_settings_apart_are_shown() -> None:
    runs = [
        *seeds("gptq", 1, 2, damp=0.1),
        *seeds("gptq", 3, damp=1.0),
        *seeds("rtn", 4),
        *seeds("rtn", 4, bits=2),
    ]
    assert pivot.differing(pivot.group(runs)) == ["method", "weight.bits", "method.damp"]
    # another key of every run with that method tells nothing more
    assert pivot.differing(pivot.group([*seeds("gptq", 1, damp=1), *seeds("rtn", 4)])) == ["method"]


def test_rows_and_columns_are_chosen() -> None:
    runs = [r for bits in (2, 3) for m in ("rtn", "gptq") for r in seeds(m, bits, bits=bits)]
    table = pivot.pivot(pivot.group(runs), columns=["weight.bits"])
    assert table.row_keys == ("method",)
    assert table.places == (("2",), ("3",))
    assert [row.labels for row in table.rows] == [("rtn",), ("gptq",)]
    assert table.rows[1].cells["3",].spread(PPL).mean == 3
    with pytest.raises(UserError, match=r"rtn would contain several settings; add weight.bits"):
        pivot.pivot(pivot.group(runs), rows=["method"])


def test_the_best_is_among_equals() -> None:
    runs = [
        *seeds("none", 5),
        *seeds("rtn", 20),
        *seeds("gptq", 10),
        *seeds("rtn", 6, bits=4),
    ]
    table = pivot.pivot(pivot.group(runs))
    bold = significance.standing(table).best
    assert [s.label("method") for s in table.settings if (id(s), PPL) in bold] == ["gptq"]


def test_caches_compete_by_their_own_bits() -> None:
    """Whatever the choice; and nothing is the best by its number of bits."""

    def cache(kv: str, ppl: float, bits: float) -> Run:
        plain = run("none", 0, ppl, kv=kv)
        metrics = {"text/ppl": ppl, "text/cache_bits": bits}
        return replace(plain, choices=plain.choices | {"kv": kv}, metrics=metrics)

    runs = [cache("kivi", 9, 6.2), cache("kvquant", 8, 2.45), cache("token", 7.5, 2.49)]
    table = pivot.pivot(pivot.group(runs))
    assert {column.name for column in table.columns} == {"text/ppl", "text/cache_bits"}
    ranks = significance.standing(table)
    names = {id(s): s.label("kv") for s in table.settings}
    assert [(names[each], column.name) for each, column in ranks.best] == [("token", "text/ppl")]


@pytest.mark.parametrize("columns", [(), ("weight.bits",)], ids=["rows", "columns"])
def test_settings_within_a_twentieth_of_a_bit_compete(columns) -> None:
    """2.52 and 3.30 are both 3 when rounded, and no rivals."""
    runs = [
        *seeds("gptq", 20, bits=2.52),
        *seeds("rtn", 19, bits=3.30),
        *seeds("spqr", 18, bits=3.35),
        *seeds("oac", 17, bits=3.41),
    ]
    for each in runs:  # one column of the table for all, as nominal bits make it
        each.config["weight"]["bits"] = each.leaves["weight.bits"] = 3
    table = pivot.pivot(pivot.group(runs), columns=list(columns))
    bold = significance.standing(table).best
    assert [s.label("method") for s in table.settings if (id(s), PPL) in bold] == ["spqr"]


def test_a_rival_whose_interval_includes_zero_is_level_with_the_best() -> None:
    """`near` is worse at two seeds of three, `far` is worse at all by nearly as much."""
    runs = [
        *seeds("best", 10, 21, 30),
        *seeds("near", 10.5, 20.9, 30.6),
        *seeds("far", 10.5, 22.1, 31.4),
        *seeds("single", 40),
        *seeds("wider", 10, 21, 30.1, bits=4),
    ]
    table = pivot.pivot(pivot.group(runs))
    ranks = significance.standing(table)
    names = {id(s): s.label("method") for s in table.settings}
    assert [names[each] for each, _ in ranks.best] == ["best"]
    assert [names[each] for each, _ in ranks.level] == ["near"]
    sheet = tables.lay(table, {})
    marked = {row[0].text: cell for row in sheet.rows for cell in row if cell.level}
    assert list(marked) == ["near"]
    assert f"{marked['near'].text} {tables.LEVEL} |" in formats.markdown(sheet)
    assert formats.latex(sheet).count(r"(3)$^\dagger$") == 1
    assert any(tables.LEVEL in line for line in tables.legend(sheet))
    alone = tables.lay(pivot.pivot(pivot.group(runs[:1] + runs[3:4])), {})
    assert not any(cell.level for row in alone.rows for cell in row)  # one seed tests nothing
    assert not any(tables.LEVEL in line or "±" in line for line in tables.legend(alone))


def test_samples_of_one_seed_are_averaged_before_the_test() -> None:
    """Three seeds with two calibration samples each are three pairs, not six."""
    over = ["calibration", "seed"]

    def samples(method: str, *ppl: float) -> list[Run]:
        return [
            replace(
                each,
                leaves={**each.leaves, "calibration.split": split},
                choices={**each.choices, "calibration": split},
            )
            for at, split in enumerate(("train", "valid"))
            for each in seeds(method, *ppl[at::2])
        ]

    found = pivot.group(
        [*samples("gptq", 9, 19, 28, 10, 20, 30), *samples("rtn", 10, 20, 31, 9, 22, 34)], over
    )
    gptq, rtn = found
    assert pivot.differing(found) == ["method"]
    assert gptq.spread(PPL).count == 6
    moved = significance.compare(gptq, rtn, PPL)
    logs = [
        (math.log(9 / 10) + math.log(19 / 20)) / 2,
        (math.log(28 / 31) + math.log(10 / 9)) / 2,
        (math.log(20 / 22) + math.log(30 / 34)) / 2,
    ]
    mean = sum(logs) / 3
    half = 4.303 * math.sqrt(sum((x - mean) ** 2 for x in logs) / 2 / 3)
    assert moved is not None and moved.count == 3
    assert math.log1p(moved.change) == pytest.approx(mean)
    assert math.log1p(moved.low) == pytest.approx(mean - half, rel=1e-3)
    assert tables.said(moved) == f"Δ {moved.change:+.1%} [{moved.low:+.1%}, {moved.high:+.1%}]"


def test_a_difference_is_paired_over_seeds() -> None:
    gptq, rtn = pivot.group([*seeds("gptq", 10, 21, 30.5), *seeds("rtn", 11, 22, 32, 99)])
    moved = significance.compare(gptq, rtn, PPL)
    assert moved is not None and moved.count == 3
    assert moved.mean == pytest.approx(-3.5 / 3)
    # unpaired, the seeds' own spread of 10 would hide it; t of the logarithms by hand
    logs = [math.log(10 / 11), math.log(21 / 22), math.log(30.5 / 32)]
    mean = sum(logs) / 3
    t = mean / math.sqrt(sum((x - mean) ** 2 for x in logs) / 2 / 3)
    assert moved.p == pytest.approx(1 - abs(t) / math.sqrt(2 + t * t))  # of two degrees of freedom
    # 4.303 is the 97.5 % quantile of t with two degrees of freedom
    assert math.log1p(moved.low) == pytest.approx(mean + 4.303 * mean / abs(t), rel=1e-3)
    assert math.log1p(moved.high) == pytest.approx(mean - 4.303 * mean / abs(t), rel=1e-3)
    assert moved.below == 3
    one = significance.compare(pivot.group(seeds("gptq", 10))[0], rtn, PPL)
    assert one is not None and math.isnan(one.p)
    other = pivot.group([run("gptq", 7, 1.0)])[0]
    assert significance.compare(other, rtn, PPL) is None


def test_an_effect_over_several_rows_is_tested_by_seed() -> None:
    """Two rows of one seed are not two samples: their mean is one."""
    a, b, c, d = pivot.group(
        [
            *seeds("a", 9, 19, 28),
            *seeds("b", 10, 20, 31),
            *seeds("c", 18, 39, 55),
            *seeds("d", 20, 41, 64, 5),
        ]
    )
    logs = [
        (math.log(x / y) + math.log(z / w)) / 2
        for x, y, z, w in ((9, 10, 18, 20), (19, 20, 39, 41), (28, 31, 55, 64))
    ]
    mean = sum(logs) / 3
    t = mean / math.sqrt(sum((x - mean) ** 2 for x in logs) / 2 / 3)
    moved = significance.effect([(a, b), (c, d)], PPL)
    assert moved is not None and moved.count == 3
    assert moved.mean == pytest.approx((-1 - 2 - 1 - 2 - 3 - 9) / 6)
    assert moved.p == pytest.approx(1 - abs(t) / math.sqrt(2 + t * t))


def test_the_baseline_is_like_the_setting_in_all_else() -> None:
    runs = [
        *seeds("none", 5),
        *seeds("rtn", 20),
        *seeds("rtn", 8, bits=4),
        *seeds("gptq", 10, damp=0.1),
        *seeds("gptq", 9, damp=1.0),
        *seeds("gptq", 6, bits=4, damp=1.0),
    ]
    settings = pivot.group(runs)
    found = significance.counterparts(settings, {"method": "rtn"})
    ppl = {s.spread(PPL).mean: found[id(s)].spread(PPL).mean for s in settings if id(s) in found}
    assert ppl == {10: 20, 9: 20, 6: 8}
    assert len(significance.counterparts(settings, {"method": "none"})) == 5
    with pytest.raises(UserError, match="no run has it; there are gptq, none, rtn"):
        significance.counterparts(settings, {"method": "awq"})


def test_a_baseline_by_its_label_is_a_whole_row() -> None:
    """Other grids and groups may differ; of two budgets the one of nearer stored bits counts."""
    runs = [
        run("SpQR", 0, 9, bits=3.3, group=64),
        run("SpQR", 0, 90, bits=2.3, group=64),
        run("OWQ", 0, 10, bits=3.25, group=128),
        run("QuIP", 0, 99, bits=2.02, group=None),
    ]
    settings = pivot.group(
        [replace(each, config=each.config | {"label": each.choices["method"]}) for each in runs]
    )
    found = significance.counterparts(settings, {"label": "SpQR"})
    ppl = {s.spread(PPL).mean: found[id(s)].spread(PPL).mean for s in settings if id(s) in found}
    assert ppl == {10: 9, 99: 90}


def test_rows_in_the_order_of_a_metric() -> None:
    runs = [*seeds("gptq", 10, 12), *seeds("rtn", 20), *seeds("oac", 9), *seeds("quip", math.nan)]
    table = query.ask(runs, query.Query(rows=["method"], sort="text/ppl")).table
    assert [setting.label("method") for setting in table.settings] == ["oac", "gptq", "rtn", "quip"]


def test_a_null_is_a_value_and_no_key_is_none() -> None:
    """Rows without groups are not compared with rows in groups; a run without the key is."""
    runs = [*seeds("gptq", 9, group=None), *seeds("gptq", 8, group=64), *seeds("rtn", 20, group=64)]
    found = pivot.group(runs)
    assert [setting.label("method.group") for setting in found] == ["null", "64", "64"]
    words = [setting.words(["method", "method.group"]) for setting in found[:2]]
    assert [[*each.values()] for each in words] == [["gptq", "group=null"], ["gptq", "group=64"]]
    assert list(significance.counterparts(found, {"method": "rtn"})) == [id(found[1])]
    [bare] = pivot.group(seeds("gptq", 9))
    assert bare.label("method.group") == "" and bare.words(["method.group"]) == {}
    [scaled] = pivot.group(seeds("gptq", 9, scales={"_target_": "a.module.IntGrid"}))
    assert scaled.words(["method.scales._target_"]) == {"method.scales._target_": "scales=IntGrid"}


def test_names_are_as_short_as_tells_them_apart() -> None:
    keys = ["weight.bits", "activation.grid.bits", "damp", "method.solver.damp", "bits._target_"]
    short = ["weight.bits", "grid.bits", "damp", "solver.damp", "bits"]
    assert list(pivot.names(keys).values()) == short
