"""Reference pages of the documentation, generated from conf/ and from docstrings."""

import ast
import re
import textwrap
from collections.abc import Iterator

from qexp.common.modules import sources
from qexp.config import options
from qexp.config.options import Option

TARGET = re.compile(r"^(?:  )?_target_: (qexp\.[\w.]+)", re.MULTILINE)
PART = re.compile(r"^(Args|Returns|Raises):\n", re.MULTILINE)
ENTRY = re.compile(r"^(\w+): (.*)")
MODULE = "qexp.api"
TOPICS = {  # page → its heading, and what its groups choose
    "model": ("Models", "What is quantized."),
    "data": ("Texts and images", "What calibration, training and evaluation read."),
    "calibration": ("Calibration", "How calibration data are taken from `data`."),
    "weight": ("Weight grids", "Which values a weight may take, and how a range is fitted."),
    "activation": ("Activations", "Whether, where and on which grid activations are rounded."),
    "kv": ("KV cache", "Whether keys and values are rounded."),
    "transform": ("Transforms", "Changes before the method that keep the model's function."),
    "method": ("Methods", "How weights are rounded, reconstructed or trained."),
    "trainer": ("Trainers", "Precision, steps and devices of methods that train."),
    "eval": ("Evaluations", "What is measured, under which protocol."),
    "logger": ("Loggers", "Where metrics go in addition to the run's folder."),
    "experiment": ("Experiments", "Ready configurations and papers' tables."),
    "search": ("Searches", "Settings that are searched, and over which values."),
    "hydra": ("Launchers and sweepers", "Where the jobs of a sweep run, and in which order."),
}


def pages() -> dict[str, str]:
    """Markdown by the page's path below docs/: a page for each top group of conf/, their index and
    the Python interface."""
    found = {"reference/python.md": interface(), "reference/index.md": index()}
    for topic in _topics():
        found[f"reference/{topic}.md"] = "\n".join(_page(topic))
    return found


def index() -> str:
    """The list of groups."""
    chosen = options.defaults()
    lines = [
        "# Configuration reference",
        "",
        "One option of each group makes a run: `GROUP=OPTION` on the command line. Single keys of",
        "an option are set by `KEY.SUBKEY=VALUE`. These pages are generated from the files of",
        "`conf/`; `qexp ls GROUP` prints the same in a terminal.",
        "",
        "| group | options | default |",
        "|---|--:|---|",
    ]
    for name, found in options.groups().items():
        link = f"[`{name}`]({_topic(name)}.md#{_anchor(name)})"
        default = f"`{chosen[name]}`" if name in chosen else ""
        lines.append(f"| {link} | {len(found)} | {default} |")
    return "\n".join([*lines, "", *_root_keys()])


def _root_keys() -> Iterator[str]:
    """The keys of conf/config.yaml that belong to no group."""
    text = (options.conf() / "config.yaml").read_text(encoding="utf-8")
    start, stop = text.index("\nseed:") + 1, text.index("\nhydra:")
    yield from ("## Keys of no group", "", "```yaml", text[start:stop].rstrip(), "```", "")


def _topics() -> dict[str, list[str]]:
    """The groups of each page."""
    found: dict[str, list[str]] = {}
    for name in options.groups():
        found.setdefault(_topic(name), []).append(name)
    return {topic: found[topic] for topic in sorted(found, key=list(TOPICS).index)}


def _page(topic: str) -> Iterator[str]:
    title, purpose = TOPICS[topic]
    yield from (f"# {title}", "", purpose, "")
    for group in sorted(_topics()[topic], key=lambda name: (name.count("/"), name)):
        yield from (f"## `{group}` {{#{_anchor(group)}}}", "")
        for option in options.group(group):
            yield from _option(option)


def _option(option: Option) -> Iterator[str]:
    """Heading, comment, commands, papers, docstring of the class, and the fields with comments."""
    yield from (
        f"### `{option.group}={option.name}` {{#{_anchor(option.group)}-{option.name}}}",
        "",
    )
    yield from (_escaped(option.summary), "")
    if option.papers:
        links = [f"[arXiv:{each}](https://arxiv.org/abs/{each})" for each in option.papers]
        yield from ("Paper: " + ", ".join(links), "")
    if option.examples:
        yield from ("```bash", *option.examples, "```", "")
    if target := TARGET.search(option.text):
        yield from (*_described(target[1]), "")
    body = "\n".join(line for line in option.text.splitlines() if not line.startswith("#"))
    if body.strip() and not body.startswith("{}"):
        yield from ("```yaml", body.strip("\n"), "```", "")


def interface() -> str:
    """The page of the Python interface."""
    tree = ast.parse(sources().texts[MODULE])
    lines = ["# Python interface", "", *_paragraphs(ast.get_docstring(tree) or ""), ""]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            head = ast.unparse(ast.FunctionDef(**{**vars(node), "body": [ast.Pass()]}))
            signature = head.removeprefix("def ").rpartition(":\n")[0]
            signature = re.sub(r"(?<=[\w\]])=(?=[\w'])", " = ", signature)
            lines += [f"## `qexp.{node.name}`", "", "```python", f"qexp.{signature}", "```", ""]
            lines += [*_sections(ast.get_docstring(node) or ""), ""]
    lines += ["## `qexp.Run`", "", _docstring("qexp.runs.run.Run"), ""]
    return "\n".join([*lines, *_members("qexp.runs.run", "Run")])


def _members(module: str, name: str) -> Iterator[str]:
    """A table of the fields and documented properties of a class."""
    [node] = [
        each
        for each in ast.parse(sources().texts[module]).body
        if isinstance(each, ast.ClassDef) and each.name == name
    ]
    yield from ("| attribute | |", "|---|---|")
    text = sources().texts[module].splitlines()
    for each in node.body:
        if isinstance(each, ast.AnnAssign):
            said = text[each.lineno - 1].partition("#")[2].strip()
            kind = _cell(ast.unparse(each.annotation))
            yield f"| `{ast.unparse(each.target)}`: `{kind}` | {said} |"
        if isinstance(each, ast.FunctionDef) and not each.name.startswith("_"):
            call = "" if each.decorator_list else "(" + ast.unparse(each.args)[6:] + ")"
            said = " ".join((ast.get_docstring(each) or "").split())
            yield f"| `{each.name}{_cell(call)}` | {_cell(said)} |"


def _sections(docstring: str) -> Iterator[str]:
    """A docstring whose sections Args, Returns and Raises become lists."""
    before, *parts = PART.split(docstring)
    yield from _paragraphs(before)
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        yield from ("", f"**{title}**", "")
        entries: list[str] = []
        for line in textwrap.dedent(body).splitlines():
            if entries and line.startswith(" "):
                entries[-1] += f" {line.strip()}"
            elif title == "Returns" and entries:
                entries[-1] += f" {line}"
            elif line:
                entries.append(ENTRY.sub(r"`\1`: \2", line) if title != "Returns" else line)
        yield from (f"- {entry}" for entry in entries)


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in text.strip().split("\n\n"):
        yield from (" ".join(paragraph.split()), "")


def _described(target: str) -> Iterator[str]:
    """The docstring of a class, in which what is said of a field (`damp: …`) is an entry of a
    list."""
    said, node = _docstring(target), _node(target)
    fields = [
        ast.unparse(each.target)
        for each in (node.body if isinstance(node, ast.ClassDef) else [])
        if isinstance(each, ast.AnnAssign)
    ]
    names = "|".join(map(re.escape, map(_escaped, fields)))
    if not names:
        yield f"Class `{target}`. {said}"
        return
    first, *rest = re.split(rf"(?:^|(?<=\s))`?((?:{names})(?:, (?:{names}))*)`?: ", said)
    yield f"Class `{target}`. {first.strip()}"
    yield ""
    for field, text in zip(rest[::2], rest[1::2], strict=True):
        keys = ", ".join(f"`{key}`" for key in field.replace("\\", "").split(", "))
        yield f"- {keys}: {text.strip()}"


def _docstring(target: str) -> str:
    """The docstring of a class or function as one paragraph; empty where it has none."""
    node = _node(target)
    return _escaped(" ".join((ast.get_docstring(node) or "").split())) if node else ""


def _node(target: str) -> ast.ClassDef | ast.FunctionDef | None:
    name = target.rpartition(".")[2]
    for node in ast.walk(ast.parse(sources().texts[sources().module(target)])):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
    return None


def _escaped(text: str) -> str:
    """Text in which markup of Markdown and HTML outside of code is shown as it is."""
    parts = re.split(r"(`[^`]*`)", text)
    plain = [re.sub(r"([\[\]*_<])", r"\\\1", part) for part in parts[::2]]
    return "".join(a + b for a, b in zip(plain, [*parts[1::2], ""], strict=True))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _topic(group: str) -> str:
    return group.partition("/")[0]


def _anchor(group: str) -> str:
    return group.replace("/", "-")
