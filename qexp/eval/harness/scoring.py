"""Log-likelihoods of continuations, with shared prefixes computed once (tree attention).

Requests with a common prefix form one tree. Each token of a tree is computed once. Its position is
its depth, and it attends only to its ancestors, so the results are those of separate requests.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from qexp.common.errors import UserError
from qexp.eval.loop import measured
from qexp.task import CausalLM

# Shorter common prefixes are not worth a tree.
SHARED = 4
# Cost of one more attended token, relative to the cost of a token, measured at a width of 576
# (less in wider models). In a tree attention is computed between all tokens, then mostly masked.
PAIR = 1e-3
# A tree smaller than this share of the batch's largest starts a new batch, to limit the padding.
SIMILAR = 0.8

Tokens = tuple[int, ...]  # an input: a request without its last target


class Request(NamedTuple):
    """Tokens, of which the last `scored` are targets."""

    tokens: Tokens
    scored: int


class Answer(NamedTuple):
    loglikelihood: float
    greedy: bool  # whether every target has the largest logit


class Tree:
    """The prefix tree (trie) of inputs; a node is a token with all tokens before it."""

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
        """The position of each node in its inputs, from 0."""
        depths = [0] * len(self.tokens)
        for path in self.paths:
            for depth, node in enumerate(path):
                depths[node] = depth
        return depths

    def sees(self, size: int) -> Bool[Tensor, "size size"]:
        """The attention mask: [i, j] is true if j is i or an ancestor of i. Padding sees itself."""
        sees = torch.eye(size, dtype=torch.bool)
        for path in self.paths:
            way = torch.tensor(path)
            sees[way[:, None], way] |= torch.ones(len(path), len(path), dtype=torch.bool).tril()
        return sees


def score(task: CausalLM, requests: Sequence[Request], rows: int, name: str) -> list[Answer]:
    """The answer to each request, in order. `rows`: the batch size, counted in single inputs.

    Raises UserError with the evaluator's `name` if a log-likelihood is not finite.
    """
    # requests that differ only in their last token (choices A, B, C, D) have one input
    by_input: dict[Tokens, list[int]] = {}
    for index, request in enumerate(requests):
        by_input.setdefault(request.tokens[:-1], []).append(index)

    def step(batch: list[Tree]) -> dict[int, Answer]:
        hidden = _hidden(task, batch)
        size = hidden.shape[1]
        order: list[int] = []
        places: list[int] = []  # indices of the hidden states that predict the targets
        for row, tree in enumerate(batch):
            for tokens, path in zip(tree.inputs, tree.paths, strict=True):
                for index in by_input[tokens]:
                    order.append(index)
                    places += [row * size + node for node in path[-requests[index].scored :]]
        part = _answers(task, hidden.flatten(0, 1), places, [requests[i] for i in order])
        return dict(zip(order, part, strict=True))

    forest = trees(list(by_input), rows, _window(task))
    answers: dict[int, Answer] = {}
    for part in measured(task, name, list(batches(forest, rows)), step):
        answers |= part
    if not all(math.isfinite(answer.loglikelihood) for answer in answers.values()):
        raise UserError(
            f"eval {name}: a log-likelihood is not finite: the model's weights or activations "
            "contain NaN or infinity"
        )
    return [answers[index] for index in range(len(requests))]


def trees(inputs: Sequence[Tokens], rows: int, window: float = math.inf) -> Iterator[Tree]:
    """Groups sorted inputs into trees of at most `rows` inputs.

    A new tree starts at an input that shares much more with its successor than with its
    predecessor, and where attention in a larger tree would cost more than the shared tokens save.
    An input longer than `window` (sliding-window attention) gets its own tree.
    """
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


def batches(forest: Iterable[Tree], rows: int) -> Iterator[list[Tree]]:
    """Batches of trees of similar size, largest first, so that running out of memory shows early.

    A batch has at most as many tokens, with padding, as `rows` inputs of the longest length, which
    is the batch of the harness's own model. Trees of one input form separate batches: they need
    no mask.
    """

    def shape(tree: Tree) -> tuple[bool, int]:
        return len(tree.inputs) > 1, len(tree.tokens)

    batch: list[Tree] = []
    longest = 0
    for tree in sorted(forest, key=shape, reverse=True):
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
    """The hidden states of all nodes, padded to the largest tree."""
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
    """The sliding window of attention in tokens, which an explicit mask would ignore."""
    return float(getattr(task.model.config, "sliding_window", None) or math.inf)


def _answers(
    task: CausalLM,
    hidden: Float[Tensor, "nodes width"],
    places: list[int],
    requests: list[Request],
) -> Iterator[Answer]:
    """The answers to requests; `places`: the nodes that predict their targets, concatenated.

    The logits of a node are computed once, also if it predicts several targets.
    """
    target = torch.tensor([token for each in requests for token in each.tokens[-each.scored :]])
    nodes, where = torch.tensor(places).unique(return_inverse=True)
    logprobs, hits = torch.empty(len(where)), torch.empty(len(where), dtype=torch.bool)
    chunks = task.logits(hidden[nodes.to(hidden.device)])
    for start, logits in zip(range(0, len(nodes), task.positions), chunks, strict=True):
        inside = (where >= start) & (where < start + task.positions)
        rows = (where[inside] - start).to(logits.device)
        columns = target[inside].to(logits.device)
        logprobs[inside] = logits.log_softmax(-1)[rows, columns].cpu()
        hits[inside] = (logits.argmax(-1)[rows] == columns).cpu()
    at = 0
    for each in requests:
        part = slice(at, at + each.scored)
        yield Answer(float(logprobs[part].double().sum()), bool(hits[part].all()))
        at += each.scored


def _padded(sequences: Sequence[Sequence[int]]) -> Int64[Tensor, "rows tokens"]:
    """Pads on the right with zeros, to which no real token attends."""
    width = max(map(len, sequences))
    return torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in sequences])


def _common(one: Tokens, other: Tokens) -> int:
    """The length of the common prefix."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))
