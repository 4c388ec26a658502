"""Lists of transforms: `transform=[rotate,smooth]` is the choice `transform=rotate+smooth`."""

import re
from collections.abc import Sequence

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

GROUP, JOIN = "transform", "+"


def register() -> None:
    """Let Hydra know choices of several transforms; may be called repeatedly."""
    for plugin in (Chains, ChainsInSearchPath):
        Plugins.instance().register(plugin)


def as_choices(words: Sequence[str]) -> list[str]:
    """Overrides in which each list of transforms is the choice that stands for it."""
    return [
        re.sub(r"\[([^][]*)\]", lambda found: JOIN.join(_names(found[1])), word)
        if word.startswith(f"{GROUP}=")
        else word
        for word in words
    ]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


class Chains(ConfigSource):
    """Files transform/A+B.yaml that nobody writes: a chain whose steps are the files of A and B."""

    @staticmethod
    def scheme() -> str:
        return "qexp-chains"

    def load_config(self, config_path: str) -> ConfigResult:
        names = config_path.removesuffix(".yaml").rpartition("/")[2].split(JOIN)
        keys = [
            name if n == 0 else f"{name}_{n + 1}"
            for k, name in enumerate(names)
            for n in [names[:k].count(name)]
        ]
        steps = [{f"/{GROUP}@steps.{key}": name} for key, name in zip(keys, names, strict=True)]
        content = {
            "defaults": [*steps, "_self_"],
            "_target_": "qexp.transforms.chain.Chain",
            "order": keys,
        }
        config = OmegaConf.create(content)
        return ConfigResult(self.provider, f"{self.scheme()}://", config, {"package": None})

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return False

    def is_config(self, config_path: str) -> bool:
        group, _, name = config_path.removesuffix(".yaml").rpartition("/")
        return group == GROUP and JOIN in name

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        return []


class ChainsInSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("qexp", f"{Chains.scheme()}://")
