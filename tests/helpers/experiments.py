"""Jobs of the experiments in conf/."""

from hydra import compose
from omegaconf import OmegaConf


def jobs(experiment: str) -> list[list[str]]:
    """The overrides of the sweep's first job, and of those that differ from it in one choice."""
    cfg = compose("config", [f"experiment={experiment}"], return_hydra_config=True)
    params = OmegaConf.to_container(cfg.hydra.sweeper.params)
    assert cfg.hydra.mode.name == "MULTIRUN" and isinstance(params, dict)
    values = {key: str(params[key]).split(",") for key in params if key != "seed"}
    first = {key: choices[0] for key, choices in values.items()}
    others = [first | {key: each} for key, choices in values.items() for each in choices[1:]]
    return [[f"{key}={value}" for key, value in job.items()] for job in (first, *others)]
