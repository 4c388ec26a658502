"""Hooks of mkdocs: generated pages, pages outside of docs/, notebooks, links to sources."""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from qexp.commands import report
from qexp.report import reference
from qexp.report.query import Query

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "docs/records/leaderboard"
LEADERBOARD = Query(
    rows=("label", "kind", "weight.bits", "weight.group_size", "activation"),
    metrics=("*/ppl", "against_float*"),
)
OUTSIDE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^(```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Adds the pages that docs/ does not hold."""
    made = reference.pages()
    made |= {name: (ROOT / path).read_text("utf-8") for name, path in OUTSIDE.items()}
    for path in sorted((ROOT / "docs").rglob("*.ipynb")):
        name = path.relative_to(ROOT / "docs").with_suffix(".md").as_posix()
        made[name] = notebook(json.loads(path.read_text("utf-8")), path.name)
    made["leaderboard_table.html"] = report.page([RECORDS], LEADERBOARD)
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that leave docs/: to pages of OUTSIDE there, to other files as their names."""
    name = page.file.src_uri
    folder = posixpath.dirname("docs/" + name if name not in OUTSIDE else OUTSIDE[name])
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda link: _link(link, folder, name), part) for part in parts[::2]]
    return "".join(parts)


def _link(link: re.Match[str], folder: str, page: str) -> str:
    text, target, anchor = link[1], link[2], link[3] or ""
    if ":" in target:
        return link[0]
    place = posixpath.normpath(posixpath.join(folder, target))
    known = {path: name for name, path in OUTSIDE.items()}
    if place in known:
        place = "docs/" + known[place]
    elif not place.startswith("docs/"):
        return text if text.startswith("`") else f"`{place}`"
    relative = posixpath.relpath(place.removeprefix("docs/"), posixpath.dirname(page) or ".")
    return f"[{text}]({relative}{anchor})"


def notebook(content: dict[str, Any], name: str) -> str:
    """The cells of a notebook as Markdown."""
    parts = []
    for cell in content["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join([*parts, f"The notebook: [{name}]({name})."]) + "\n"
