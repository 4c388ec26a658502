"""Searches: every one composes at its own choices, is passed to W&B's agents, and resumes."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from helpers.stub import SMALL
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from omegaconf import OmegaConf

from qexp.commands import wandb_sweep
from qexp.common.errors import UserError
from qexp.config import location

SEARCHES = sorted(path.stem for path in (location.conf() / "search").glob("*.yaml"))


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_is_a_wandb_sweep_of_single_runs(name: str) -> None:
    sweep = yaml.safe_load(wandb_sweep.wandb_sweep([f"search={name}", "data=synthetic"]))
    assert sweep["metric"]["name"].endswith("/ppl") and sweep["metric"]["goal"] == "minimize"
    assert sweep["method"] == "grid" or sweep["run_cap"] > 0
    ends = {key: _end(words) for key, words in sweep["parameters"].items()}
    assert len(ends) > 1
    words = [word for word in sweep["command"][3:] if not word.startswith("${")]
    with initialize_config_dir(version_base="1.3", config_dir=str(location.conf())):
        chosen = [f"{key}={value}" for key, value in ends.items()]
        cfg = compose("config", [*words, *chosen], return_hydra_config=True)
    assert cfg.hydra.mode == RunMode.RUN
    choices = cfg.hydra.runtime.choices
    for key, value in ends.items():
        assert (choices[key] if key in choices else OmegaConf.select(cfg, key)) == value


def _end(words: dict) -> object:
    """One value that the parameter may take."""
    if "value" in words:
        return words["value"]
    if "values" in words:
        return words["values"][-1]
    assert words["min"] < words["max"] and words["distribution"].startswith("log_uniform")
    return words["max"]


JUDGED = [
    ("eval=wikitext2_raw_512x40", "the test split of wikitext2.*eval=wikitext2_choose_512x16"),
    ("eval=c4_raw_512x40", "the validation split of c4.*eval=c4_train_512x16"),
    ("eval=held_out", r"the test split of synthetic.*eval\.held_out\.split"),
    ("eval=against_float", "the test split of synthetic"),
    ("eval=harness", "tasks of the harness"),
    ("eval=[c4_train_512x16,wikitext2_gptq_2048]", r"eval\.wikitext2_gptq_2048 reads the test"),
]


@pytest.mark.parametrize(("words", "said"), JUDGED)
def test_a_search_refuses_what_tables_are_judged_on(words: str, said: str) -> None:
    chosen = ["search=gptq_damping", "data=synthetic", words]
    if words == "eval=harness":
        chosen.append("eval.harness.tasks=[piqa]")
    with pytest.raises(UserError, match=said):
        wandb_sweep.wandb_sweep(chosen)


def test_a_search_refuses_text_that_was_seen() -> None:
    words = ["search=gptq_damping", "data=wikitext2", "eval=wikitext2_choose_512x16"]
    with pytest.raises(UserError, match=r"and so does calibration.*calibration\.split=calibrate"):
        wandb_sweep.wandb_sweep(words)  # calibration reads the whole validation text
    assert "wikitext2_choose_512x16/ppl" in wandb_sweep.wandb_sweep(
        [*words, "calibration.split=calibrate"]
    )
    with pytest.raises(UserError, match=r"of c4, and so does calibration.*wikitext2_choose"):
        wandb_sweep.wandb_sweep(["search=gptq_damping", "data=c4"])
    with pytest.raises(UserError, match="of wikitext2_tokens, and so does calibration"):
        wandb_sweep.wandb_sweep(
            [*words[:2], "eval=wikitext2_tokens_choose_512x16"]
        )  # the same text
    trained = ["search=learning_rates", "data=wikitext2_tokens", "calibration=random_windows"]
    trained += ["+calibration@method.train=shuffled", "eval=wikitext2_tokens_choose_512x16"]
    assert wandb_sweep.wandb_sweep(trained)
    with pytest.raises(UserError, match="and so does train"):
        wandb_sweep.wandb_sweep([*trained, "method.train.split=validation"])


def test_a_grid_search_ends_before_its_first_job(qexp, capsys) -> None:
    words = (*SMALL, "search=damping", "logger=none", "method=gptq", "method/hessian=layerwise")
    assert qexp(*words, "eval=held_out") == 1
    assert "which tables are judged on" in capsys.readouterr().err
    assert not list(Path("outputs").glob("*/metrics.json"))
    assert qexp(*words, "method.solver.damp=0.1,1.0") == 0
    assert len(list(Path("outputs").glob("*/metrics.json"))) == 2


def test_without_a_search_there_is_nothing_to_tell() -> None:
    with pytest.raises(UserError, match="search=gptq_damping"):
        wandb_sweep.wandb_sweep(["method=rtn"])


@pytest.mark.skipif(find_spec("optuna") is not None, reason="is installed here")
def test_without_optuna_a_search_names_the_extra(qexp, capsys) -> None:
    assert qexp(*SMALL, "search=gptq_damping") == 1
    assert "pip install 'qexp[optuna]'" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("hydra_plugins") is not None, reason="one is installed here")
def test_without_the_extra_a_launcher_names_it(qexp, capsys) -> None:
    assert qexp("-m", *SMALL, "hydra/launcher=cpu_pool", "weight.bits=3,4") == 1
    said = capsys.readouterr().err
    assert "joblib is not installed; pip install 'qexp[launchers]'" in said
    assert "Traceback" not in said


@pytest.mark.filterwarnings("ignore")  # Optuna's own
def test_trials_of_all_launches_count(qexp) -> None:
    optuna = pytest.importorskip("optuna", reason="extra `optuna`")
    words = (*SMALL, "logger=none", "search=bits_and_ppl", "threads=1")
    for trials in (2, 5, 5):
        assert qexp(*words, f"hydra.sweeper.n_trials={trials}") == 0
    storage = f"sqlite:///{Path('outputs/.sweeps/search.db').absolute()}"
    [summary] = optuna.get_all_study_summaries(storage)
    study = optuna.load_study(summary.study_name, storage)
    assert len(study.trials) == 5
    assert all(len(trial.values) == 2 for trial in study.trials)
