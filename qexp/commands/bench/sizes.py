"""Sizes of the random model that is measured: by default those of Llama 2 7B."""

from dataclasses import dataclass, field
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from qexp.config.location import conf


def _number(default: int, text: str) -> Any:
    return field(default=default, metadata={"help": f"{text}; {default} by default"})


@dataclass(frozen=True)
class Sizes:
    """Of the model and of its data; the fields are arguments of the command."""

    hidden: int = _number(4096, "width of the model")
    intermediate: int = _number(11008, "width inside the MLP")
    heads: int = _number(32, "attention heads")
    kv_heads: int = _number(32, "heads of keys and values")
    vocabulary: int = _number(32000, "tokens of the embedding and of the head")
    blocks: int = _number(4, "blocks of the larger model")
    sequences: int = _number(16, "calibration sequences")
    length: int = _number(2048, "tokens of a sequence")
    group: int = _number(128, "columns that share a scale")
    steps: int = _number(20, "steps of Quadapter's first phase")

    def config(self, device: str, *words: str, blocks: int | None = None) -> DictConfig:
        """The configuration of a run on the random model, in bfloat16."""
        sizes = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.blocks if blocks is None else blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.length,
            "initializer_range": 0.02,
        }
        shared = [f"device={device}", "model=tiny_llama", "model.dtype=bfloat16"]
        shared += [f"model.sizes.{key}={value}" for key, value in sizes.items()]
        shared += ["data=synthetic", "calibration=synthetic", "progress=false"]
        shared += [f"calibration.length={self.length}", f"calibration.sequences={self.sequences}"]
        with initialize_config_dir(version_base="1.3", config_dir=str(conf())):
            return compose("config", [*shared, *words])

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return self.sequences * self.length
