"""The folder of the configurations."""

from pathlib import Path


def conf() -> Path:
    """The folder of the configurations: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"
