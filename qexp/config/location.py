"""Location of the configuration files."""

from pathlib import Path

from qexp.config import chains


def conf() -> Path:
    """The folder conf/: inside an installed package, or next to the package in a checkout. Hydra,
    which is pointed to it, then also knows chains of its transforms."""
    chains.register()
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"
