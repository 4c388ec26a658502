"""What a yaml file may compute: `${sig:}` is the signature of the configuration it stands in."""

from omegaconf import DictConfig, OmegaConf

from qexp.signature import signature


def register() -> None:
    """Make the resolvers known to OmegaConf; calling it again changes nothing."""
    OmegaConf.register_new_resolver("sig", _sig, replace=True)


def _sig(*, _root_: DictConfig) -> str:
    return signature(_root_)
