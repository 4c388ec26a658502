"""Searched scales: what a race drops and what it keeps; the choices of a search over all data."""

from dataclasses import replace
from math import inf

import pytest
import torch
from helpers.channels import ALL, TENSOR, planted
from helpers.models import task_of

from qexp.grid import IntGrid
from qexp.hessian.layerwise import mirrored
from qexp.quantizers.placement import LinearInputs
from qexp.quantizers.scheme import FloatActivations, QuantizedActivations
from qexp.transforms import os_plus
from qexp.transforms.awq import AWQ
from qexp.transforms.channels import channels_of
from qexp.transforms.input_moments import input_moments
from qexp.transforms.os_plus import OutlierSuppression
from qexp.transforms.race import LOSS, least, mixed
from qexp.transforms.scale_search import pieces
from qexp.transforms.site_collection import collect_statistics
from qexp.transforms.site_statistics import ScaleShift
from qexp.walk import walk

GRID, FLOAT = IntGrid(3, group_size=32), FloatActivations()
PER_TOKEN = QuantizedActivations(LinearInputs(), IntGrid(4), dynamic=True)


def table(seed: int, spread: float) -> torch.Tensor:
    """Errors [candidates, parts, samples] with a least one; samples are of very different size."""
    generator = torch.Generator().manual_seed(seed)
    curve = 1 + 1.5 * (torch.arange(20) / 20 - 0.45).square()
    size = torch.randn(16, 1, generator=generator).exp()
    size = size * (1.5 * torch.randn(16, 100, generator=generator)).exp()
    drift = 1 + 0.005 * torch.randn(20, 16, 1, generator=generator)
    noise = 1 + spread * torch.randn(20, 16, 100, generator=generator)
    return (curve[:, None, None] * size * drift * noise).double()


@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_a_race_ends_as_the_whole_comparison_does_and_measures_less(spread):
    measured, same = 0, 0
    for seed in range(40):
        errors = table(seed, spread)

        def asked(index, parts, errors=errors):
            nonlocal measured
            measured += len(parts)
            return list(errors[index, list(parts)])

        totals = errors.sum((1, 2))
        chosen = least(asked, 20, 16, AWQ(GRID).margin)
        same += chosen == int(totals.argmin())
        assert totals[chosen] <= 1.004 * totals.min()
    assert same >= 38  # neighbours are nearly equal
    assert 1 / 16 < measured / (40 * 20 * 16) < 0.5


def test_a_race_without_limit_measures_everything_once_and_takes_the_first_of_equals():
    seen = []

    def asked(index, parts):
        seen.extend((index, part) for part in parts)
        return [torch.tensor([0.0 if index else 1.0]) for _ in parts]

    assert least(asked, 3, 5, inf) == 1
    assert sorted(seen) == [(index, part) for index in range(3) for part in range(5)]
    assert least(asked, 3, 16, 4.0) == 1  # no error at all: nothing to divide by


def test_mixed_parts_are_all_samples_and_the_largest_come_first():
    for count in (1, 2, 63, 130, 5000, 16384):
        sizes = torch.randn(count, generator=torch.Generator().manual_seed(count)).exp()
        first, *others = mixed(sizes)
        assert torch.equal(torch.cat([first, *others]).sort().values, torch.arange(count))
        assert len(first) == max(count // 64, 1)
        assert all(sizes[first].min() >= sizes[part].max() for part in others)
        assert all(len(part) >= 64 or len(others) == 1 for part in others)
        assert len(others) <= 128
        # random order: no part has only neighbours
        assert count < 5000 or all(part.sort().values.diff().max() > 64 for part in others)


@pytest.mark.parametrize("margin", [3.0, 4.0])
def test_a_race_of_mixed_parts_finds_the_least_where_few_samples_have_most_of_the_error(margin):
    measured, same, samples = 0, 0, 8192
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        size = torch.randn(samples, generator=generator).exp()
        size[torch.randperm(samples, generator=generator)[:16]] = 3e4
        curve = 1 + 1.5 * (torch.arange(20) / 20 - 0.45).square()
        # what is best for the few is not for the others
        few = torch.where(size == 3e4, 1 + (torch.arange(20)[:, None] / 20 - 0.8).square(), 1)
        errors = curve[:, None] * few * size
        errors = errors * (1 + 0.3 * torch.randn(20, samples, generator=generator))
        parts = mixed(size * (1 + 0.3 * torch.rand(samples, generator=generator)))

        def asked(index, own, errors=errors, parts=parts):
            nonlocal measured
            found = [errors[index, parts[part]] for part in own]
            measured += sum(map(len, found))
            return found

        same += least(asked, 20, len(parts), margin, True) == int(errors.double().sum(1).argmin())
    assert same == 20
    assert 1 / 64 < measured / (20 * 20 * samples) < 0.25


def total(errors: list[torch.Tensor]) -> float:
    return float(torch.cat(errors).sum())


def sequences() -> list[dict]:
    ids = torch.randint(256, (16, 96), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": ids[:7]}, {"input_ids": ids[7:]}]


def test_pieces_are_the_same_sequences_in_order():
    data = sequences()
    for batches, most in ((data, 1), (data * 3, 2), (data[:1], 1)):
        cut = pieces(batches)
        assert max(len(piece["input_ids"]) for piece in cut) == most
        joined = [torch.cat([each["input_ids"] for each in parts]) for parts in (batches, cut)]
        assert torch.equal(*joined)
    assert pieces([]) == []


@torch.no_grad()
def test_awq_chooses_as_a_direct_search_over_whole_forward_passes():
    step = AWQ(GRID, points=10, clip=False, grouped_values=True, sites=ALL)
    ours, direct = planted("llama", 10), planted("llama", 10)
    step(ours, sequences)
    chosen = []
    for block in walk(direct, sequences()):
        for site in collect_statistics(block, channels_of(direct, block.index, ALL), replay=True):
            changes, every = step.propose(site), range(len(site.calls))
            errors = [total(site.errors(change, every, GRID, FLOAT)) for change in changes]
            chosen.append(errors.index(min(errors)))
            site.channels.fold(*changes[chosen[-1]])
    assert len(set(chosen)) > 3  # there is something to choose
    for one, two in zip(ours.parameters(), direct.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_race_of_rounded_inputs_finds_the_least_error_of_all_tokens():
    step, task, chosen = OutlierSuppression(GRID, PER_TOKEN, points=20), planted("llama", 10), set()
    for block in walk(task, pieces(sequences())):
        for site in collect_statistics(block, channels_of(task, block.index, ALL), replay=True):
            changes, every = step.propose(site), range(len(site.calls))
            errors = [total(site.errors(change, every, GRID, PER_TOKEN)) for change in changes]
            best = site.best(changes, GRID, PER_TOKEN, step.margin)
            [place] = [index for index, change in enumerate(changes) if change is best]
            assert errors[place] <= min(errors) * (1 + LOSS)
            chosen.add(place)
            site.channels.fold(*best)
    assert len(chosen) > 3


def test_ranges_of_whole_tensors_are_searched_on_all_tokens(monkeypatch):
    """Those of a part would be others."""
    margins = []
    monkeypatch.setattr(os_plus, "search_and_fold", lambda *_, margin, **__: margins.append(margin))
    for activation in (PER_TOKEN, TENSOR, replace(PER_TOKEN, outliers=6.0)):
        OutlierSuppression(GRID, activation)(task_of("llama"), sequences)
    assert margins == [3.0, inf, inf]


@torch.no_grad()
def test_the_moment_of_its_inputs_gives_a_linears_output_error():
    task = planted("llama", 10)
    block = next(walk(task, sequences()))
    channels = [each for each in channels_of(task, 0, ALL) if len(each.linears) == 1]
    replayed = collect_statistics(block, channels, replay=True)
    with input_moments(block, block.groups) as moments:
        kept = collect_statistics(block, channels, replay=True, moments=True)
    assert len(kept) == 2 and not kept[0].calls
    for one, two in zip(replayed, kept, strict=True):
        change = ScaleShift(one.mean.sqrt())
        expected = total(one.errors(change, range(len(one.calls)), GRID, FLOAT))
        whole = mirrored(moments[two.module])
        rows = torch.arange(two.module.out_features)
        errors = two.moment_errors(change, whole, GRID, rows)
        assert float(errors.sum()) == pytest.approx(expected, rel=1e-3)
        torch.testing.assert_close(two.moment_errors(change, whole, GRID, rows[3:5]), errors[3:5])
