"""Log-likelihoods of continuations, with what requests have in common computed once.

Requests whose tokens begin alike go through the model as one tree: each token once, at its depth,
seeing only what comes before it in its own text. So the answers are those of one request at a time.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from qexp import task as tasks
from qexp.errors import UserError
from qexp.progress import bar
from qexp.task import CausalLM

# A beginning of fewer tokens, or of a smaller part of an input, is not worth a tree.
SHARED, PART = 4, 0.125

Tokens = tuple[int, ...]  # of an input: of a request without its last target


class Request(NamedTuple):
    """Tokens, of which the last `scored` are targets."""

    tokens: Tokens
    scored: int


class Answer(NamedTuple):
    loglikelihood: float
    greedy: bool  # whether every target is the model's first choice


class Tree:
    """Inputs that begin alike; a token that follows the same tokens is one node."""

    def __init__(self, inputs: list[Tokens]) -> None:
        self.inputs = inputs
        nodes: dict[tuple[int, int], int] = {}  # by parent and token
        self.paths: list[list[int]] = []
        for tokens in inputs:
            path: list[int] = []
            for token in tokens:
                parent = path[-1] if path else -1
                path.append(nodes.setdefault((parent, token), len(nodes)))
            self.paths.append(path)
        self.tokens = [token for _, token in nodes]

    def depths(self) -> list[int]:
        found = [0] * len(self.tokens)
        for path in self.paths:
            for depth, node in enumerate(path):
                found[node] = depth
        return found

    def sees(self, size: int) -> Bool[Tensor, "size size"]:
        """Which node is on the way to which; up to `size`, what is no node sees itself."""
        sees = torch.eye(size, dtype=torch.bool)
        for path in self.paths:
            way = torch.tensor(path)
            sees[way[:, None], way] |= torch.ones(len(path), len(path), dtype=torch.bool).tril()
        return sees


def score(task: CausalLM, requests: Sequence[Request], rows: int, name: str) -> list[Answer]:
    """The answer to each request, in order; `rows` inputs go through the model at once."""
    asked: dict[Tokens, list[int]] = {}
    for index, request in enumerate(requests):  # A, B, C and D after one question: one input
        asked.setdefault(request.tokens[:-1], []).append(index)
    scored = {key: max(requests[i].scored for i in indices) for key, indices in asked.items()}
    answers: dict[int, Answer] = {}
    with torch.no_grad():
        for batch in bar(list(batches(trees(list(asked), rows, _window(task)), rows)), name):
            hidden = _hidden(task, batch, scored)
            order = [asked[key] for tree in batch for key in tree.inputs]
            found = _answers(task, hidden, [[requests[i] for i in part] for part in order])
            answers |= zip((i for part in order for i in part), found, strict=True)
    if not all(math.isfinite(answer.loglikelihood) for answer in answers.values()):
        raise UserError(
            f"eval {name}: a log-likelihood is not a finite number: there is NaN or infinity in "
            "the model's weights or activations"
        )
    return [answers[index] for index in range(len(requests))]


def trees(inputs: Sequence[Tokens], rows: int, window: float = math.inf) -> Iterator[Tree]:
    """Sorted inputs, cut where a neighbour has much more in common with the other side. Inputs
    longer than `window` stay alone."""
    ordered = sorted(inputs)
    common = [_common(a, b) for a, b in pairwise(ordered)]
    members: list[Tokens] = []
    shared = 0
    for tokens, before, after in zip(ordered, [0, *common], [*common, 0], strict=True):
        reach = min(before, shared)
        apart = reach < max(SHARED, PART * len(tokens)) or 2 * before < after
        if members and (apart or len(members) == rows or len(tokens) > window):
            yield Tree(members)
            members = []
        shared = reach if members else (len(tokens) if len(tokens) <= window else 0)
        members = [*members, tokens]
    if members:
        yield Tree(members)


def batches(found: Iterable[Tree], rows: int) -> Iterator[list[Tree]]:
    """Trees of similar size, up to `rows` inputs together, the largest first: what does not fit
    into memory fails at once. Inputs that share nothing go apart: they need no mask."""

    def shape(tree: Tree) -> tuple[bool, int]:
        return len(tree.inputs) > 1, len(tree.tokens)

    batch: list[Tree] = []
    for tree in sorted(found, key=shape, reverse=True):
        count = sum(len(other.inputs) for other in batch) + len(tree.inputs)
        if batch and (count > rows or shape(batch[0])[0] != shape(tree)[0]):
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


def _hidden(
    task: CausalLM, batch: list[Tree], scored: dict[Tokens, int]
) -> list[Float[Tensor, "_ width"]]:
    """The hidden states of each input's last `scored` positions."""
    ids = _padded([tree.tokens for tree in batch])
    if all(len(tree.inputs) == 1 for tree in batch):
        hidden = task.hidden(ids)
    else:
        dtype, size = task.model.dtype, ids.shape[1]
        sees = torch.stack([tree.sees(size) for tree in batch])[:, None].to(task.device)
        mask = torch.zeros(sees.shape, dtype=dtype, device=task.device)
        hidden = task.encode(
            {
                "input_ids": ids,
                "position_ids": _padded([tree.depths() for tree in batch]),
                "attention_mask": mask.masked_fill(~sees, torch.finfo(dtype).min),
            }
        )
    return [
        states[path[-scored[tokens] :]]
        for states, tree in zip(hidden, batch, strict=True)
        for tokens, path in zip(tree.inputs, tree.paths, strict=True)
    ]


def _window(task: CausalLM) -> float:
    """How far back attention sees: a mask of one's own knows no window."""
    return float(getattr(task.model.config, "sliding_window", None) or math.inf)


def _answers(
    task: CausalLM, hidden: list[Float[Tensor, "_ width"]], wanted: list[list[Request]]
) -> Iterator[Answer]:
    """The answers to the requests of each input, a few positions' logits at a time."""
    starts = torch.tensor([0, *(len(part) for part in hidden)]).cumsum(0).tolist()
    positions: list[int] = []
    targets: list[int] = []
    for end, requests in zip(starts[1:], wanted, strict=True):
        for request in requests:
            positions += range(end - request.scored, end)
            targets += request.tokens[-request.scored :]
    where, target = torch.tensor(positions), torch.tensor(targets)
    gains, hits = torch.empty(len(where)), torch.empty(len(where), dtype=torch.bool)
    states = torch.cat(hidden)
    for start in range(0, len(states), tasks.POSITIONS):
        part = states[start : start + tasks.POSITIONS]
        logits = task.head(part).float()
        inside = (where >= start) & (where < start + len(part))
        rows = (where[inside] - start).to(logits.device)
        columns = target[inside].to(logits.device)
        gains[inside] = (logits[rows, columns] - logits.logsumexp(-1)[rows]).cpu()
        hits[inside] = (logits.argmax(-1)[rows] == columns).cpu()
    at = 0
    for request in (request for requests in wanted for request in requests):
        few = slice(at, at + request.scored)
        yield Answer(float(gains[few].double().sum()), bool(hits[few].all()))
        at += request.scored


def _padded(sequences: Sequence[Sequence[int]]) -> Int64[Tensor, "rows tokens"]:
    """Zeros behind the shorter ones: no real token sees them."""
    width = max(map(len, sequences))
    return torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in sequences])


def _common(one: Tokens, other: Tokens) -> int:
    """How many first tokens are the same."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))
