"""Hadamard matrices: Sylvester's doubling, and Paley's and Williamson's constructions."""

from functools import cache
from itertools import combinations_with_replacement

import torch
from jaxtyping import Float
from torch import Tensor

from qexp.common.errors import UserError

LARGEST = 128  # side of one factor of a fast transform


def factors(size: int) -> list[int] | None:
    """Sides of Hadamard matrices whose Kronecker product has `size` rows: one that is no power of
    two where `size` is none, and powers of two of at most LARGEST. None where none is known."""
    first = known(size)
    if first is None:
        return None
    doublings = (size // first).bit_length() - 1
    parts = -(-doublings // (LARGEST.bit_length() - 1))
    powers = [2 ** (doublings // parts + (n < doublings % parts)) for n in range(parts)]
    return [*([first] if first > 1 else []), *powers] or [1]


def known(size: int) -> int | None:
    """The least K with a Hadamard matrix such that size = K 2^k; None where there is none."""
    odd = size // (size & -size)
    if odd == 1:
        return 1
    for each in (4 * odd, 8 * odd, 16 * odd):
        if size % each == 0 and _built(each) is not None:
            return each
    return None


def hadamard(size: int) -> Float[Tensor, "size size"]:
    """A matrix H of 1 and -1 with H Hᵀ = size · I, float32. UserError where none is known."""
    first = known(size)
    if first is None:
        raise UserError(f"no Hadamard matrix of {size} rows is known here; give a random rotation")
    h = torch.ones(1, 1) if first == 1 else _built(first)
    assert h is not None
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


@cache
def _built(size: int) -> Float[Tensor, "size size"] | None:
    """By Paley's first construction (size - 1 a prime), his second (size / 2 - 1 a prime or the
    square of one), or Williamson's with symmetries (size / 4 a prime)."""
    if _root(size - 1) == size - 1:
        return _paley(size)
    if (size // 2 - 1) % 4 == 1 and _root(size // 2 - 1) is not None:
        return _paley_twice(size)
    return _williamson(size // 4)


def _root(q: int) -> int | None:
    """The prime p with q = p or q = p²."""
    for p in {q, round(q**0.5)}:
        if p > 2 and p in (q, q / p) and all(p % d for d in range(2, round(p**0.5) + 1)):
            return p
    return None


def _jacobsthal(q: int) -> Float[Tensor, "q q"]:
    """The quadratic character of differences in the field of q elements: 1 for squares, -1 for
    others, 0 for 0. Elements of the field of p² are a + b √n with n not a square mod p."""
    p = _root(q)
    assert p is not None
    n = next(n for n in range(2, p) if pow(n, (p - 1) // 2, p) == p - 1)
    i = torch.arange(q)
    a, b = i % p, i // p  # b is 0 where q is prime
    squares = (a * a + n * b * b) % p + p * ((2 * a * b) % p)
    character = torch.full((q,), -1.0)
    character[squares] = 1.0
    character[0] = 0.0
    return character[(a[:, None] - a) % p + p * ((b[:, None] - b) % p)]


def _bordered(q: int, corner: float) -> Float[Tensor, "size size"]:
    core = torch.cat([torch.full((1, q), 1.0), _jacobsthal(q)])
    return torch.cat([torch.full((q + 1, 1), corner), core], 1)


def _paley(size: int) -> Float[Tensor, "size size"]:
    """I + S with S skew, for size - 1 = 3 mod 4."""
    skew = _bordered(size - 1, -1.0)
    skew[0, 0] = 0
    return skew + torch.eye(size)


def _paley_twice(size: int) -> Float[Tensor, "size size"]:
    """From the symmetric conference matrix of size / 2, for size / 2 - 1 = 1 mod 4."""
    conference = _bordered(size // 2 - 1, 1.0)
    conference[0, 0] = 0
    one, other = torch.tensor([[1.0, 1], [1, -1]]), torch.tensor([[1.0, -1], [-1, -1]])
    return torch.kron(conference, one) + torch.kron(torch.eye(size // 2), other)


def _williamson(n: int) -> Float[Tensor, "size size"] | None:
    """From four symmetric circulants of n rows with A² + B² + C² + D² = 4n I, for n = 1 mod 6 a
    prime: those that are unchanged under cubic residues' subgroup of order 3 are few enough to try
    all of them."""
    if n % 6 != 1 or _root(n) != n:
        return None
    third = next(t for t in range(2, n) if pow(t, 3, n) == 1)
    orbits = {frozenset(s * pow(third, k, n) % n for s in (1, -1) for k in range(3)): None}
    for i in range(1, n):
        orbits[frozenset(s * i * pow(third, k, n) % n for s in (1, -1) for k in range(3))] = None
    classes = [sorted(each) for each in orbits]
    rows = torch.ones(2 ** len(classes), n)
    for bit, members in enumerate(classes):
        signs = 1.0 - 2 * ((torch.arange(len(rows)) >> bit) & 1)
        rows[:, members] = signs[:, None]
    power = torch.fft.fft(rows.double()).real.square()[:, [0, *(each[0] for each in classes)]]
    whole = (power * 1000).round().long()
    pairs = list(combinations_with_replacement(range(len(rows)), 2))
    left, right = torch.tensor(pairs).T
    sums = whole[left] + whole[right]
    seen = {tuple(s): k for k, s in enumerate((sums + 2).div(5, rounding_mode="floor").tolist())}
    rest = (4000 * n - sums + 2).div(5, rounding_mode="floor")
    for k, s in enumerate(rest.tolist()):
        if tuple(s) in seen:
            four = [rows[index] for index in (*pairs[k], *pairs[seen[tuple(s)]])]
            h = _array([torch.stack([r.roll(shift) for shift in range(n)]) for r in four])
            if torch.equal(h @ h.T, 4 * n * torch.eye(4 * n)):
                return h
    return None


def _array(circulants: list[Tensor]) -> Tensor:
    a, b, c, d = circulants
    rows = [[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]]
    return torch.cat([torch.cat(row, 1) for row in rows])
