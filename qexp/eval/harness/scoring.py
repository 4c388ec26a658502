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

from qexp.common.errors import UserError
from qexp.common.progress import bar
from qexp.task import CausalLM

# A beginning of fewer tokens is not worth a tree.
SHARED = 4
# What it costs a token to attend to one token more, in tokens: measured at a width of 576, less in
# wider models. In a tree every token attends to all others, and the mask takes most of it back.
PAIR = 1e-3
# A tree smaller than this share of another begins a batch of its own: the rest would be padding.
SIMILAR = 0.8
# Positions whose logits exist at one time: at 50 k tokens they stay in a processor's cache.
POSITIONS = 128

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
        self.longest = max(map(len, inputs))

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
    """The answer to each request, in order; about as many tokens go through the model at once as
    `rows` inputs have."""
    asked: dict[Tokens, list[int]] = {}
    for index, request in enumerate(requests):  # A, B, C and D after one question: one input
        asked.setdefault(request.tokens[:-1], []).append(index)
    answers: dict[int, Answer] = {}
    with torch.no_grad():
        for batch in bar(list(batches(trees(list(asked), rows, _window(task)), rows)), name):
            hidden = _hidden(task, batch)
            size = hidden.shape[1]
            order: list[int] = []
            places: list[int] = []  # of the hidden states that predict the targets of each
            for row, tree in enumerate(batch):
                for tokens, path in zip(tree.inputs, tree.paths, strict=True):
                    for index in asked[tokens]:
                        order.append(index)
                        places += [row * size + node for node in path[-requests[index].scored :]]
            found = _answers(task, hidden.flatten(0, 1), places, [requests[i] for i in order])
            answers |= zip(order, found, strict=True)
    if not all(math.isfinite(answer.loglikelihood) for answer in answers.values()):
        raise UserError(
            f"eval {name}: a log-likelihood is not a finite number: there is NaN or infinity in "
            "the model's weights or activations"
        )
    return [answers[index] for index in range(len(requests))]


def trees(inputs: Sequence[Tokens], rows: int, window: float = math.inf) -> Iterator[Tree]:
    """Sorted inputs, cut where a neighbour has much more in common with the other side, or where
    attention within a larger tree would cost more than what is shared. Inputs longer than `window`
    stay alone."""
    ordered = sorted(inputs)
    common = [_common(a, b) for a, b in pairwise(ordered)]
    members: list[Tokens] = []
    nodes = 0
    for tokens, before, after in zip(ordered, [0, *common], [*common, 0], strict=True):
        new = len(tokens) - before
        apart = before < max(SHARED, 2 * PAIR * nodes * new) or 2 * before < after
        long = members and max(len(members[-1]), len(tokens)) > window
        if members and (apart or long or len(members) == rows):
            yield Tree(members)
            members, nodes = [], 0
        nodes += new if members else len(tokens)
        members = [*members, tokens]
    if members:
        yield Tree(members)


def batches(found: Iterable[Tree], rows: int) -> Iterator[list[Tree]]:
    """Trees of similar size, with padding no more tokens than `rows` inputs as long as their
    longest, which is what the harness's model has at a time. The largest first: what does not fit
    into memory fails at once. Inputs that share nothing go apart: they need no mask."""

    def shape(tree: Tree) -> tuple[bool, int]:
        return len(tree.inputs) > 1, len(tree.tokens)

    batch: list[Tree] = []
    longest = 0
    for tree in sorted(found, key=shape, reverse=True):
        if batch:
            (shared, size), room = shape(batch[0]), max(longest, tree.longest)
            fits = (len(batch) + 1) * size <= rows * room
            if not fits or shape(tree)[0] != shared or shape(tree)[1] < SIMILAR * size:
                yield batch
                batch, longest = [], 0
        batch.append(tree)
        longest = max(longest, tree.longest)
    if batch:
        yield batch


def _hidden(task: CausalLM, batch: list[Tree]) -> Float[Tensor, "trees nodes width"]:
    """The hidden states of all nodes."""
    ids = _padded([tree.tokens for tree in batch])
    if all(len(tree.inputs) == 1 for tree in batch):
        return task.hidden(ids)
    dtype, size = task.model.dtype, ids.shape[1]
    sees = torch.stack([tree.sees(size) for tree in batch])[:, None].to(task.device)
    mask = torch.zeros(sees.shape, dtype=dtype, device=task.device)
    return task.encode(
        {
            "input_ids": ids,
            "position_ids": _padded([tree.depths() for tree in batch]),
            "attention_mask": mask.masked_fill(~sees, torch.finfo(dtype).min),
        }
    )


def _window(task: CausalLM) -> float:
    """How far back attention sees: a mask of one's own knows no window."""
    return float(getattr(task.model.config, "sliding_window", None) or math.inf)


def _answers(
    task: CausalLM,
    hidden: Float[Tensor, "nodes width"],
    places: list[int],
    requests: list[Request],
) -> Iterator[Answer]:
    """The answers to requests whose targets are predicted at `places`, one after the other. The
    logits of a place are made once, however many targets it predicts."""
    target = torch.tensor([token for each in requests for token in each.tokens[-each.scored :]])
    nodes, where = torch.tensor(places).unique(return_inverse=True)
    gains, hits = torch.empty(len(where)), torch.empty(len(where), dtype=torch.bool)
    chunks = task.logits(hidden[nodes.to(hidden.device)], positions=POSITIONS)
    for start, logits in zip(range(0, len(nodes), POSITIONS), chunks, strict=True):
        inside = (where >= start) & (where < start + POSITIONS)
        rows = (where[inside] - start).to(logits.device)
        columns = target[inside].to(logits.device)
        gains[inside] = logits.log_softmax(-1)[rows, columns].cpu()
        hits[inside] = (logits.argmax(-1)[rows] == columns).cpu()
    at = 0
    for each in requests:
        part = slice(at, at + each.scored)
        yield Answer(float(gains[part].double().sum()), bool(hits[part].all()))
        at += each.scored


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
