"""The report page: its data, its safety, and its behaviour in a browser."""

import base64
import hashlib
import json
from pathlib import Path

import pytest
from helpers.folders import folder, seeded, some
from helpers.page import Page

from qexp.cli import command
from qexp.commands.bench.chromium import chromium, find
from qexp.report import html, plots

TITLE = "held_out/ppl [12345678]"


@pytest.fixture
def sweep(tmp_path, monkeypatch) -> Path:
    """The float model, GPTQ at three bit-widths and a run that failed."""
    monkeypatch.chdir(tmp_path)
    return some(Path("outputs"))


@pytest.fixture
def seeds(sweep) -> Path:
    """RTN too, and a second seed of both at 3 and 4 bits; GPTQ is better at 3."""
    return seeded(sweep)


def test_the_page_needs_nothing_else_and_says_what_its_marks_are(seeds) -> None:
    assert command("report", [str(seeds), "--out", "made", "--baseline", "method=rtn"]) == 0
    page = Page(Path("made/report.html"))
    assert page.open == []
    assert all(each.startswith(("#", "data:")) for each in page.refers)
    [table] = page.tables
    assert table[0][:3] == ["method", "weight.bits", "bits"]
    assert ["gptq", "3", "3.50"] in [row[:3] for row in table]
    settings = page.data["settings"]
    assert len(settings) == 6 and sum(len(setting["runs"]) for setting in settings) == 10
    assert [at for row in page.data["rows"] for at in row] == [0, 1, 2, 3, 4, 5]
    names = [each["name"] for each in page.data["quantities"]]
    assert names[page.data["x"]] == "weight/bits" and names[page.data["y"]] == TITLE
    [gptq] = [each for each in settings if each["words"] == "gptq, bits=3"]
    assert gptq["values"][page.data["y"]] == [37.5, 0.707107, None] and gptq["count"] == 2
    assert gptq["values"][page.data["x"]] == 3.5
    assert "method=gptq seed=1 weight.bits=3" in gptq["runs"][1]["command"]
    assert "outputs/" in gptq["runs"][1]["folder"]
    [grid] = page.data["layers"]["grids"]
    assert grid["names"] == ["model.layers.0.mlp.up_proj", "<b>"]
    assert gptq["layers"] == [0, [0.25, 0.001], None]
    assert [line["name"] for line in page.data["series"][""]] == ["gptq", "rtn"]


def test_nothing_of_a_run_is_markup(sweep) -> None:
    """Names, reasons and definitions of runs are text, and no other script may run."""
    attack = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    made = folder(sweep, "gptq", 5, note=1, errors={attack: 0.5, "a.0.b": float("inf")})
    content = json.loads((made / "provenance.json").read_text())
    content["machine"] = {"processor": attack}
    content["protocols"]["held_out"]["definition"] = {"name": attack}
    (made / "provenance.json").write_text(json.dumps(content))
    (sweep / "gptq-11-0/failure.json").write_text(json.dumps({"reason": attack}))
    assert command("report", [str(sweep), "--out", "made"]) == 0
    text = Path("made/report.html").read_text()
    assert "<script>alert" not in text and "<img" not in text
    page = Page(Path("made/report.html"))
    assert len(page.scripts) == 3 and page.open == []
    assert any(run["machine"] == attack for each in page.data["settings"] for run in each["runs"])
    policy = text.partition('Content-Security-Policy" content="')[2].partition('"')[0]
    for script in page.scripts[::2]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy


@pytest.mark.skipif(find() is None, reason="no browser on this machine")
def test_a_browser_draws_sorts_filters_and_obeys_the_keyboard(seeds) -> None:
    folder(seeds, "none", seed=1)
    assert command("report", [str(seeds), "--out", "made"]) == 0
    with chromium(str(find())) as page:
        page.show(Path("made/report.html"), 360, 780)
        assert page.evaluate("document.documentElement.scrollWidth") == 360  # nothing sticks out
        page.show(Path("made/report.html"), 1400, 900, dark=True)
        paper = "getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(paper)
        for _ in range(2):  # auto, light, dark
            page.evaluate("document.getElementById('theme').click()")
            assert (page.evaluate(paper) == dark) == bool(_)
        wide = "document.querySelector('#panels svg').getBoundingClientRect().width"
        assert page.evaluate(wide) > 1300

        column = "[...document.querySelectorAll('tbody tr:not([hidden], .detail)')]"
        column += ".map(row => row.cells[3].dataset.value)"
        heads = "document.querySelectorAll('.sort')"
        page.evaluate(f"{heads}[3].focus()")
        page.press("Enter")
        values = [float(value) for value in page.evaluate(column)]
        assert values == sorted(values) and len(set(values)) > 2
        assert page.evaluate("document.querySelectorAll('thead th')[3].ariaSort") == "ascending"

        page.press("/", "/")
        assert page.evaluate("document.activeElement.id") == "query"
        for letter in "rtn":
            page.press(letter, letter)
        assert len(page.evaluate(column)) == 2
        assert page.evaluate("document.querySelectorAll('#names li').length") == 1
        assert page.evaluate("document.getElementById('count').textContent") == "2 of 6 rows"
        assert "q=rtn" in page.evaluate("location.hash")

        page.evaluate("document.querySelector('.row[tabindex=\"0\"]').focus()")
        page.press("ArrowDown")
        page.press("Enter")
        assert "method=rtn" in page.evaluate("document.querySelector('.detail code').textContent")
        page.evaluate("document.querySelector('#panels svg').focus()")
        page.press("ArrowRight")
        tip = page.evaluate("document.getElementById('tip').textContent")
        assert "rtn, bits=3" in tip and "perplexity: 40.5 ± 0.7071 (2)" in tip


@pytest.mark.skipif(find() is None, reason="no browser on this machine")
def test_the_page_and_the_png_plots_have_the_same_front() -> None:
    points = [(3.0, 5.0), (1.0, 9.0), (2.0, 9.5), (2.0, 7.0), (4.0, 5.0), (5.0, 1.0)]
    script = (Path(html.PAGE) / "axes.js").read_text()
    with chromium(str(find())) as page:
        for higher in (False, True):
            given = json.dumps([{"x": x, "y": y} for x, y in points])
            found = page.evaluate(
                f"(() => {{ {script}; return pareto({given}, {str(higher).lower()}) }})()"
            )
            assert [(p["x"], p["y"]) for p in found] == plots.pareto(points, higher)


def test_linears_of_different_bits_have_a_map_of_them(sweep) -> None:
    """Chosen bits, such as those of `method=allocated`; nearly equal ones have no map."""
    for bits, stored in ((3, (2.28, 4.31)), (4, (4.31, 4.4))):
        path = sweep / f"gptq-{bits}-0" / "layers.csv"
        lines = [f"model.layers.{block}.up,{each},0.5\n" for block, each in enumerate(stored)]
        path.write_text("name,bits,error\n" + "".join(lines))
    assert command("report", [str(sweep), "--out", "made"]) == 0
    page = Page(Path("made/report.html"))
    shown = {each["words"]: each["layers"] for each in page.data["settings"]}
    assert shown["gptq, bits=3"][1:] == [[0.5, 0.5], [2.28, 4.31]]
    assert shown["gptq, bits=4"][1:] == [[0.5, 0.5], None]
    assert page.data["layers"]["bits"] == [2.28, 4.31]
