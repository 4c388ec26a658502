"""Pages that are generated from runs, and what a check finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.folders import PROTOCOL, folder

from qexp.cli import command
from qexp.config import location

PPL = f"{PROTOCOL}/ppl"
RECORDS = Path("docs/records/demo")
PAGE = Path("docs/page.md")
TEXT = f"""# Page

<!-- qexp table
records: {RECORDS}
where: {{method: [rtn, gptq], weight.bits: 3}}
rows: [method]
metrics: {PPL}
baseline: method=rtn
titles: {{{PPL}: perplexity}}
labels: {{method: {{gptq: GPTQ, rtn: RTN}}}}
digits: 1
-->
<!-- qexp end -->

GPTQ has <!-- qexp value {{records: {RECORDS}, where: {{method: gptq, weight.bits: 3}}, metrics: {PPL}}} --><!-- qexp end -->.

| typed | by hand |
|---|--:|
| x | 3.45 |
"""  # noqa: E501
FIGURE = f"""
<!-- qexp figure
records: {RECORDS}
file: figures/demo.svg
-->
<!-- qexp end -->
"""
DRAWN = Path("docs/figures/demo.svg")


@pytest.fixture
def page(tmp_path, monkeypatch) -> Path:
    """A page of two methods at two widths over two seeds, written."""
    monkeypatch.chdir(tmp_path)
    for bits in (3, 4):
        for seed in (0, 1):
            folder(RECORDS, "gptq", bits, seed)
            folder(RECORDS, "rtn", bits, seed, 43.0 - bits + 1.5 * seed)
    PAGE.write_text(TEXT)
    Path("README.md").write_text("# Readme\n\n```\n<!-- qexp table -->\n```\n")
    assert command("docs", []) == 0
    return PAGE


@pytest.fixture
def drawn(page) -> Path:
    """The page with a figure of all runs."""
    page.write_text(page.read_text() + FIGURE)
    assert command("docs", []) == 0
    return page


def changed(page: Path, old: str, new: str) -> int:
    """Writes `new` for `old` to the page; the line of it."""
    text = page.read_text()
    assert text.count(old) >= 1, old
    page.write_text(text.replace(old, new, 1))
    return text.count("\n", 0, text.index(old)) + 1


def refused(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The sentences of a failed check, which changes nothing."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    capsys.readouterr()
    assert command("docs", ["--check"]) == 1
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    return capsys.readouterr().err.splitlines()


def test_a_page_has_its_numbers_and_where_they_come_from(page, capsys) -> None:
    text = page.read_text()
    lines = text.splitlines()
    rows = [line.replace(" ", "") for line in lines if line.startswith("|")]
    assert rows[0] == "|method|bits|perplexity|"
    assert rows[2].startswith("|RTN|3.50|40.8±1.1(2)|")  # the order of `where`
    assert "|GPTQ|3.50|**37.5±0.7(2)**,Δ-8.0%[" in rows[3]
    assert "GPTQ has " in text and "-->37.50<!--" in text
    assert "qexp -m method=rtn,gptq weight.bits=3 seed=0,1" in lines
    assert "Commit: code c0de." in text and f"Protocols: {PROTOCOL} `12345678`." in text
    assert text.count("± … (n) is") == 1
    capsys.readouterr()
    assert command("docs", ["--check"]) == 0
    said = capsys.readouterr().out
    assert "2 pages, generated: 1 table, 1 value; all as" in said


def test_a_second_run_writes_nothing(drawn, capsys) -> None:
    files = [path for path in Path().rglob("*") if path.is_file()]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    capsys.readouterr()
    assert command("docs", []) == 0
    assert capsys.readouterr().out == ""
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_figures_have_equal_bytes_in_another_process(page, suffix) -> None:
    page.write_text(FIGURE.replace(".svg", f".{suffix}"))
    assert command("docs", ["docs"]) == 0
    text, made = page.read_text(), DRAWN.with_suffix(f".{suffix}")
    assert f"![held_out/ppl against weight/bits](figures/demo.{suffix})" in text
    before = made.read_bytes()
    assert before.startswith(b"<svg" if suffix == "svg" else b"\x89PNG")
    program = "from qexp.cli import command; raise SystemExit(command('docs', ['--check', 'docs']))"
    env = os.environ | {"PYTHONPATH": str(location.conf().parent), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", program], env=env, check=True)
    assert made.read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("**37.5 ±", "**37.4 ±", "is: **37.4 ± 0.7 (2)**, Δ"),
        (" perplexity |", " ppl |", "is: ppl; the records give: perplexity"),
        (">37.50<", ">37.51<", "is: 37.51; the records give: 37.50"),
        ("seed=0,1\n", "seed=0,1,2\n", "the records give: qexp -m method=rtn,gptq"),
    ],
)
def test_an_edit_is_found_in_its_line(page, capsys, old, new, said) -> None:
    line = changed(page, old, new)
    [sentence] = refused(capsys)
    assert sentence.startswith(f"docs/page.md:{line}: ") and said in sentence
    assert sentence.endswith("; `qexp docs docs/page.md` writes what the records give")
    assert command("docs", []) == 0
    assert command("docs", ["--check"]) == 0


def test_a_deleted_record_is_named(page, capsys) -> None:
    lost = RECORDS / "gptq-3-1"
    for path in sorted(lost.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    lost.rmdir()
    sentences = refused(capsys)
    assert sentences[0] == (
        f"docs/page.md:3: {lost} is missing; restore it, or write the page without it by "
        "`qexp docs docs/page.md`"
    )
    assert any("is: 37.50; the records give: 37.00" in each for each in sentences)  # the value
    assert command("docs", []) == 0
    assert f"{lost} is missing; the page is written without it" in capsys.readouterr().err
    assert command("docs", ["--check"]) == 0


def test_records_of_runs_give_the_page_of_the_runs(page, capsys) -> None:
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert command("record", [str(RECORDS), "--topic", "json"]) == 0
    page.write_text(page.read_text().replace(str(RECORDS), "docs/records/json"))
    assert command("docs", []) == 0
    assert [line for line in page.read_text().splitlines() if line.startswith("|")] == rows
    listed = page.read_text().partition("<!-- runs in docs/records/json: ")[2].split()[:4]
    lost = Path("docs/records/json", listed[2])
    lost.unlink()
    assert refused(capsys)[0].startswith(f"docs/page.md:3: {lost} is missing; restore it")
    lost.write_text("{}")
    assert f"records: {lost}: left out, {lost}: is no record" in refused(capsys)[0]


def test_another_number_in_a_record_is_found(page, capsys) -> None:
    path = RECORDS / "rtn-3-0" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {PPL: 41.0}))
    assert any("is: 40.8 ± 1.1 (2); the records give: 41.2 ±" in each for each in refused(capsys))


def test_a_figure_that_differs_or_is_not_there_is_named(drawn, capsys) -> None:
    assert drawn.read_text().count("qexp -m") == 2  # of the table, and of all runs
    DRAWN.write_bytes(DRAWN.read_bytes().replace(b"gptq", b"gqtp"))
    [sentence] = refused(capsys)
    assert f"the figure {DRAWN} is not the one that the records give" in sentence
    DRAWN.unlink()
    [sentence] = refused(capsys)
    assert f"the figure {DRAWN} is missing" in sentence
    changed(drawn, "demo.svg\n", "demo.jpg\n")
    [sentence] = refused(capsys)
    assert "file: figures/demo.jpg; name a file .svg or .png" in sentence
    changed(drawn, "demo.jpg\n", "demo.svg\nx: weight/bit\n")
    [sentence] = refused(capsys)
    assert "x weight/bit: no run has this number" in sentence


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (f"metrics: {PPL}\n", "metrics: held_out/pp\n", "metrics held_out/pp: none fits; there"),
        ("rows: [method]", "rows: [methd]", "rows methd: no run has this key; perhaps method"),
        ("rows: [method]", "rows: [method]\nsort: x/ppl", "sort x/ppl: no run has this metric"),
        ("rows: [method]", "row: [method]", "row: a table has no such field; perhaps rows"),
        ("[rtn, gptq]", "[rtn, spqr]", "where method=spqr: no run has it; there are gptq, rtn"),
        ("weight.bits: 3}\nrows", "weight.bits: [3, 4]}\nrows", "would contain several settings"),
        ("weight.bits: 3}, m", "weight.bits: [3, 4]}, m", "where: 2 settings meet it; they di"),
        ("baseline: method=rtn", "baseline: method=awq", "baseline method=awq: no run has it"),
        (f"records: {RECORDS}\nwhere", "records: docs/record\nwhere", "docs/record: is not a fo"),
        (f"records: {RECORDS}\nwhere", "where", "records: missing; name a folder of records"),
        ("rows: [method]", "rows: [method", "the query is not yaml"),
        ("digits: 1", "digits: one", "digits: one; give a whole number from 0 to 9"),
        ("digits: 1", "costs: [second]", "costs second: unknown; give some of bits, seconds"),
        ("<!-- qexp end -->\n\nGPTQ", "\nGPTQ", "qexp table has no end; add <!-- qexp end -->"),
    ],
)
def test_a_query_without_an_answer_is_one_sentence(page, capsys, old, new, said) -> None:
    changed(page, old, new)
    [sentence, *_] = refused(capsys)
    assert said in sentence and sentence.startswith("docs/page.md:")
    before = page.read_bytes()
    assert command("docs", []) == 1
    assert page.read_bytes() == before
    assert "nothing was written" in capsys.readouterr().err


def test_the_list_says_what_is_typed(page, capsys) -> None:
    capsys.readouterr()
    assert command("docs", ["--list"]) == 0
    readme, listed = capsys.readouterr().out.splitlines()
    assert readme == "README.md: generated: nothing; typed tables with numbers: 0"
    line = page.read_text().split("| typed")[0].count("\n") + 1
    assert listed == (
        f"docs/page.md: generated: 1 table, 1 value; typed tables with numbers: 1 (lines {line})"
    )
    assert command("docs", ["absent.md"]) == 1
    assert "absent.md: is no page; run this in the folder of README.md" in capsys.readouterr().err
