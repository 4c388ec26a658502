"""Commands that made some runs."""

from itertools import product
from pathlib import Path

import pytest

from qexp.report import origin
from qexp.runs.finished import Run


def run(words: str) -> Run:
    choices = {"method": "gptq", "method/hessian": "layerwise", "model": "tiny"}
    return Run(Path(words), choices, {}, {}, tuple(words.split()), {}, {})


def expanded(command: str) -> set[tuple[str, ...]]:
    """The jobs of a command whose values have no commas."""
    words = [word for word in command.split() if word not in ("qexp", "-m")]
    values = [[f"{w.partition('=')[0]}={v}" for v in w.partition("=")[2].split(",")] for w in words]
    return {tuple(sorted(job)) for job in product(*values)}


def test_a_full_grid_is_one_sweep() -> None:
    runs = [run(f"method={m} weight.bits={b} seed={s}") for s in "10" for m in "ba" for b in "432"]
    assert origin.commands(runs) == ["qexp -m method=b,a weight.bits=2,3,4 seed=0,1"]


def test_commands_start_the_runs_and_no_others() -> None:
    jobs = [f"method={m} seed={s} weight.bits={b}" for m in "ab" for s in "012" for b in "23"]
    jobs.remove("method=b seed=2 weight.bits=3")
    jobs += ["model=tiny method=none seed=0"]
    commands = origin.commands(map(run, jobs))
    started = [job for command in commands for job in expanded(command)]
    assert sorted(started) == sorted(tuple(sorted(job.split())) for job in jobs)
    assert len(commands) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("seed=0 method/hessian=output method=a", "qexp method=a method/hessian=output seed=0"),
        ("weight.scales.bits=3 weight.scales=null", "qexp weight.scales.bits=3 weight.scales=null"),
        ("logger=csv threads=2 progress=false seed=0 hydra.run.dir=x", "qexp seed=0"),
        ("eval=[a,b] ~weight", "qexp 'eval=[a,b]' '~weight'"),
    ],
)
def test_words_keep_their_order_where_it_matters(words, said) -> None:
    assert origin.commands([run(words)]) == [said]
