"""Requests that share a beginning are answered as if each stood alone."""

import pytest
import torch
from helpers.models import CONF, DECODERS
from helpers.protocols import llama
from hydra import compose, initialize_config_dir

from qexp.config.instantiate import instantiate
from qexp.eval.harness.scoring import Request, Tree, batches, score, trees
from qexp.runs import resolvers

pytestmark = pytest.mark.usefixtures("own_cache")


def drawn(seed: int, count: int = 8) -> list[Request]:
    """Questions with four answers each that sometimes begin alike, and with four letters."""
    generator = torch.Generator().manual_seed(seed)

    def some(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most, (), generator=generator))
        return torch.randint(256, (length,), generator=generator).tolist()

    made = []
    for _ in range(count):
        context, first = some(5, 60), some(1, 2)
        for index in range(4):
            answer = first * (index % 2) + some(1, 9)
            made.append(Request((*context, *answer), len(answer)))
            made.append(Request((*context, index), 1))
    return made


@pytest.mark.parametrize("family", DECODERS)
def test_trees_change_no_answer(family: str) -> None:
    task, requests = llama(family), drawn(0)
    together = score(task, requests, 16, "x")
    for request, found in zip(requests, together, strict=True):
        [alone] = score(task, [request], 1, "x")
        assert found.loglikelihood == pytest.approx(alone.loglikelihood, abs=2e-5)
        assert found.greedy == alone.greedy


def test_an_answer_is_the_sum_over_its_targets() -> None:
    task = llama()
    request = drawn(1)[2]
    with torch.no_grad():
        logits = task.model(torch.tensor([request.tokens])).logits[0].log_softmax(-1)
    wanted = range(len(request.tokens) - request.scored, len(request.tokens))
    expected = sum(float(logits[i - 1, request.tokens[i]]) for i in wanted)
    [found] = score(task, [request], 1, "x")
    assert found.loglikelihood == pytest.approx(expected, abs=1e-5)


def test_greedy_is_the_models_own_first_choice() -> None:
    task, prompt = llama(), (1, 2, 3, 4)
    with torch.no_grad():
        best = int(task.model(torch.tensor([prompt])).logits[0, -1].argmax())
    found = score(
        task, [Request((*prompt, t), 1) for t in range(20)] + [Request((*prompt, best), 1)], 4, "x"
    )
    assert found[-1].greedy and [a.greedy for a in found[:20]] == [t == best for t in range(20)]


def test_a_tree_holds_each_token_once() -> None:
    tree = Tree([(5, 6, 7), (5, 6, 8, 9), (5, 6, 8, 4)])
    assert (tree.tokens, tree.depths()) == ([5, 6, 7, 8, 9, 4], [0, 1, 2, 2, 3, 3])
    assert tree.sees(7)[4].tolist() == [True, True, False, True, True, False, False]
    assert tree.sees(7)[6].nonzero().flatten().tolist() == [6]


def test_each_input_is_in_one_batch_of_at_most_so_many_tokens() -> None:
    inputs = list({request.tokens[:-1] for request in drawn(2, 20)})
    made = list(batches(trees(inputs, 7), 7))
    flat = [tokens for batch in made for tree in batch for tokens in tree.inputs]
    assert sorted(flat) == sorted(inputs)
    for batch in made:
        longest = max(len(tokens) for tree in batch for tokens in tree.inputs)
        assert len(batch) * max(len(tree.tokens) for tree in batch) <= 7 * longest
    held = sum(len(tree.tokens) for batch in made for tree in batch)
    assert held < 0.6 * sum(map(len, inputs))


def test_what_is_much_shorter_goes_apart() -> None:
    inputs = [(n, *[n] * length) for n, length in enumerate((40, 36, 9, 40, 9, 36, 9))]
    made = [[len(tree.tokens) for tree in batch] for batch in batches(trees(inputs, 16), 16)]
    assert made == [[41, 41, 37, 37], [10, 10, 10]]


def test_the_logits_of_a_place_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    task, seen = llama(), []
    head = task.head
    monkeypatch.setattr(task, "head", lambda states: seen.append(len(states)) or head(states))
    prompt = (1, 2, 3, 4, 5)
    score(task, [Request((*prompt, 6, 7, last), 3) for last in range(9)], 16, "x")
    assert seen == [3]


def test_behind_a_sliding_window_inputs_stay_alone() -> None:
    inputs = [(*range(20), n) for n in range(4)]
    assert len(list(trees(inputs, 4))) == 1
    assert [len(tree.inputs) for tree in trees(inputs, 4, window=20.0)] == [1] * 4


PLACED = (
    ["activation=int8_token"],
    ["kv=int8_token"],
    ["activation=int8_tensor", "activation/placement=all_ops"],
)


@pytest.mark.parametrize("placed", PLACED, ids=" ".join)
def test_quantizers_see_the_same_tokens(placed: list[str]) -> None:
    resolvers.register()
    small = ["data=synthetic", "calibration.sequences=4", "calibration.length=64"]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("config", ["model=tiny_llama", "method=none", *small, *placed])
    task, requests = llama(), drawn(3, 3)
    instantiate(cfg.method)(task, lambda: instantiate(cfg.calibration)(task))
    plain, together = (score(model, requests, 16, "x") for model in (llama(), task))
    alone = [score(task, [request], 1, "x")[0] for request in requests]
    gains = torch.tensor([[a.loglikelihood for a in part] for part in (plain, together, alone)])
    effect, noise = (gains[0] - gains[2]).abs().mean(), (gains[1] - gains[2]).abs().mean()
    assert noise < 0.2 * effect  # a rounding here and there falls to the other side
