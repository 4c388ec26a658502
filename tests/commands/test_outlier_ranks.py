"""Rank correlations of statistics over models."""

import math

import pytest

from qexp.cli import command
from qexp.commands.outlier_ranks import spearman

STATISTICS = ("gain_std", "reach")


def table(folder, count: int = 4, cell: str = "") -> str:
    for n in range(count):
        rows = [
            f"layer{i},{name},{(n + 1) * (-1) ** k}"
            for i in range(3)
            for k, name in enumerate(STATISTICS)
        ]
        (folder / f"{n}_statistics.csv").write_text("\n".join(["tensor,statistic,value", *rows]))
    lines = [f"{n}_statistics.csv,{n**3},{cell or 5 - n % 2}" for n in range(count)]
    (folder / "models.csv").write_text("\n".join(["statistics,w8a8,w4a8", *lines]))
    return str(folder / "models.csv")


def test_ranks_are_spearman_s():
    assert spearman([1, 2, 3, 40], [0.1, 0.2, 0.9, 1]) == pytest.approx(1)
    assert spearman([1, 2, 3], [9, 5, 0]) == pytest.approx(-1)
    # 1 - 6 Σd² / n(n² - 1) without ties; with two equal ones their mean rank
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / 120)
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(3**0.5 / 2)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_a_table_of_models_is_read(tmp_path, capsys):
    assert command("outliers", ["ranks", table(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "over 4 models" in said and "| gain_std | +1.00 | -0.45 |" in said
    assert "| reach | -1.00 | +0.45 |" in said


@pytest.mark.parametrize(
    ("count", "cell", "said"),
    [(2, "", "2 models have no rank correlation; give 3"), (4, "x", "give one number in every")],
)
def test_tables_that_say_nothing_are_refused(tmp_path, capsys, count, cell, said):
    assert command("outliers", ["ranks", table(tmp_path, count, cell)]) == 1
    assert said in capsys.readouterr().err


def test_missing_files_are_named(tmp_path, capsys):
    assert command("outliers", ["ranks", str(tmp_path / "no.csv")]) == 1
    assert "there is no file" in capsys.readouterr().err
    given = table(tmp_path)
    (tmp_path / "1_statistics.csv").unlink()
    assert command("outliers", ["ranks", given]) == 1
    assert "1_statistics.csv" in capsys.readouterr().err
