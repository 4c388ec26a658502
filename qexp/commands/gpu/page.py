"""The Markdown page of what was measured on an accelerator."""

from collections.abc import Mapping
from typing import Any

UNITS = {
    "bytes": (1e9, "GB"),
    "operations": (1e12, "10¹² operations"),
    "share": (0.01, "% of peak"),
}
TITLES = {
    "tests": "Tests on the device",
    "solving": "Block-wise methods",
    "replay": "The column loop as one graph",
    "training": "A training step in bfloat16",
    "distributed": "Two training steps by strategy, on one device",
    "evaluation": "Perplexity",
}


def page(result: Mapping[str, Any]) -> str:
    """The page of a `gpu.json`."""
    machine, versions = result["numerics"], result["versions"]
    title = "# One accelerator"
    parts = [f"{title} (simulated)" if result["simulated"] else f"{title}: {machine['device']}"]
    if result["simulated"]:
        parts.append(
            "The device is a simulation that computes on the CPU: this page shows that every part "
            "runs, and has no speeds."
        )
    else:
        parts.append(f"Measured in {result['seconds']:.0f} s by `python scripts/gpu.py`.")
    settings = ", ".join(f"{key}={value}" for key, value in machine.items() if key != "device")
    parts.append(
        f"torch {versions.get('torch')}, commit {str(result['git']['revision'])[:10]}; numerics: "
        f"{settings}. A random Llama with "
        + ", ".join(f"{key} {value}" for key, value in result["sizes"].items())
        + ", weights in bfloat16."
    )
    for name, measured in result["parts"].items():
        parts += [f"## {TITLES[name]}", section(measured)]
    return "\n\n".join(parts) + "\n"


def section(measured: Mapping[str, Any]) -> str:
    """The numbers of a part as a table, or its single values."""
    rows = {key: value for key, value in measured.items() if isinstance(value, Mapping)}
    lines = [f"- {key}: {text(key, value)}" for key, value in measured.items() if key not in rows]
    if rows:
        columns = list(dict.fromkeys(key for row in rows.values() for key in row))
        lines += ["| | " + " | ".join(map(heading, columns)) + " |"]
        lines += ["|---|" + "--:|" * len(columns)]
        lines += [
            f"| {name} | "
            + " | ".join(text(key, row[key]) if key in row else "" for key in columns)
            + " |"
            for name, row in rows.items()
        ]
    return "\n".join(lines)


def heading(key: str) -> str:
    """A column's title, with its unit."""
    if key.endswith("rate"):
        return f"{key}, 10¹² operations / s"
    return UNITS[key][1] if key in UNITS else key


def text(key: str, value: Any) -> str:
    """A number in the unit of its column; words as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    size = 1e12 if key.endswith("rate") else UNITS[key][0] if key in UNITS else 1
    return f"{value / size:.4g}" if isinstance(value, float) or size != 1 else str(value)
