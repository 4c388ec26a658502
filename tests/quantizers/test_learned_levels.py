"""KVQuant's parts: levels by squared gradients, outliers of vectors in float, Q-Norm."""

from dataclasses import replace

import pytest
import torch
from helpers.models import batches, joined, task_of

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.grid.codebook import CodebookGrid
from qexp.grid.observers import RowHistogramObserver
from qexp.grid.trimmed import Trimmed
from qexp.quantizers.activation import FakeQuant
from qexp.quantizers.attention import counting_outliers, window_of
from qexp.quantizers.cache_window import CacheWindow
from qexp.quantizers.learned_levels import Positions
from qexp.quantizers.scheme import quantize_activations
from qexp.solvers.codebook import nearest_codes

SCHEME = CacheWindow(
    CodebookGrid(2), sinks=1, static_keys=True, before_rotary=True, per_head=False, outliers=0.05
)


def rows(count: int = 6, columns: int = 40) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(0)) ** 3


def quantized(scheme):
    task = task_of("llama")
    quantize_activations(task, [scheme], lambda: batches("llama"))
    return task


def test_an_empty_table_is_evenly_spaced():
    x, even = rows(), IntGrid(3, include_zero=False, real_zero=True, scale_dtype="float32")
    torch.testing.assert_close(CodebookGrid(3, scale_dtype="float32")(x), even(x))


def test_as_many_levels_as_values_are_exact():
    values = torch.tensor([[-1.0, -0.3, 0.1, 1.0]])
    grid = CodebookGrid(2, scale_dtype="float32")
    grid = grid.fitted(values.double(), torch.ones(1, 4), torch.ones(1, 4))
    x = 3 * values[:, [0, 1, 1, 2, 3]] + 7
    torch.testing.assert_close(grid(x), x)


def test_matched_moments_are_those_of_the_values():
    values = torch.linspace(-1, 1, 201).double()[None] ** 3
    mass, counts = values.abs() + 0.01, torch.rand(values.shape).double() + 0.1
    plain, matched = (
        CodebookGrid(2, scale_dtype="float32", match_moments=on).fitted(values, mass, counts)
        for on in (False, True)
    )
    assert matched.table == plain.table
    share = counts / counts.sum()

    def moments(x):
        mean = (share * x).sum()
        return torch.stack([mean, (share * (x - mean).square()).sum().sqrt()])

    q = matched.scales_of(torch.tensor([[-1.0, 1.0]]))
    torch.testing.assert_close(moments(matched.round(values, q)), moments(values))
    assert not torch.allclose(moments(plain.round(values, q)), moments(values), rtol=1e-3)


def test_positions_count_gradients_and_leave_out_what_lies_beyond():
    found = Positions()
    found.add(torch.tensor([-1.0, 0.5, 0.5, 1.2]), torch.tensor([2.0, 1.0, 3.0, 5.0]))
    assert found.counts.sum() == 3 and found.mass.sum() == 4 + 1 + 9
    assert found.mass.max() == 10


def test_a_trimmed_range_leaves_out_a_share_at_each_end():
    x = torch.arange(100.0)[None].flip(1)
    grid = IntGrid(8)
    for share, ends in ((0.1, (5, 94)), (0.001, (1, 98)), (0.11, (6, 93))):
        low, high = Trimmed(share)(x, grid)
        assert (float(low), float(high)) == ends
        assert (float(low), float(high)) == tuple(
            map(float, Trimmed(share)(x, grid, torch.ones_like(x)))
        )
    with pytest.raises(UserError, match="share=1"):
        Trimmed(1)


def test_a_histogram_of_rows_keeps_their_quantiles():
    x = rows(4, 3000) * torch.tensor([[1.0], [100.0], [1e-3], [5.0]])
    one, two = RowHistogramObserver(), RowHistogramObserver()
    for part in x.split(700, 1):
        one.add(part)
    two.add(x[:, :1000])
    other = RowHistogramObserver()
    other.add(x[:, :1000])
    other.restart()  # as in another process
    other.add(x[:, 1000:])
    two.merge([other])
    exact = torch.cat(Trimmed(0.02)(x, IntGrid(8)), 1)
    width = 2 * x.abs().amax(1, keepdim=True) / 512
    for observer in (one, two):
        found = torch.cat(Trimmed(0.02)(observer.values()[0], IntGrid(8), observer.values()[1]), 1)
        assert (found - exact).abs().le(width).all()


def test_outliers_pass_and_the_others_have_their_own_range():
    x = rows()
    grid = IntGrid(3, include_zero=False, real_zero=True, scale_dtype="float32")
    quantizer = FakeQuant(replace(grid, range=Trimmed(0.1)), True, keep_clipped=True)
    quantizer.fix_range()
    quantizer.kept = []
    y = quantizer(x)
    order = x.argsort(1)
    ends, inner = order[:, [0, 1, -2, -1]], order[:, 2:-2]
    assert torch.equal(y.gather(1, ends), x.gather(1, ends))
    torch.testing.assert_close(y.gather(1, inner), grid(x.gather(1, inner)))
    assert quantizer.kept == [(6 * 4, x.numel())]


def test_every_value_an_outlier_is_the_float_cache():
    ids = joined("llama")["input_ids"]
    tokens = replace(SCHEME, static_keys=False, before_rotary=False, keys="token")
    with torch.no_grad():  # the middle of a vector is an interval of its own
        every, plain = quantized(replace(tokens, outliers=0.9999)), task_of("llama").hidden(ids)
        torch.testing.assert_close(every.hidden(ids), plain, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(quantized(tokens).hidden(ids), plain, atol=1e-2, rtol=1e-2)


def test_levels_are_learned_in_each_block_with_the_model_unchanged():
    task = quantized(SCHEME)
    tables = {q.grid.table for q in task.quantizers.values()}
    assert len(tables) == len(task.quantizers) == 6
    for table in tables:
        assert list(table) == sorted(table) and -1 <= table[0] < table[-1] <= 1
    assert all(p.grad is None for p in task.parameters())
    with pytest.raises(UserError, match=r"^calibration: there are no sequences"):
        quantize_activations(
            task_of("llama"), [replace(SCHEME, static_keys=False, keys="token")], list
        )


def test_squared_gradients_draw_levels_to_where_the_loss_is_steep():
    """With all levels moved off the steep values, the weighted error rises."""
    task, seen = task_of("llama"), []
    fitted = CodebookGrid.fitted
    try:
        CodebookGrid.fitted = lambda own, *parts: seen.append(parts) or fitted(own, *parts)
        quantize_activations(task, [SCHEME], lambda: batches("llama"))
    finally:
        CodebookGrid.fitted = fitted
    for values, mass, counts in seen:
        weighted, plain = (fitted(CodebookGrid(2), values, by, counts) for by in (mass, counts))
        tables = (torch.tensor(grid.table).double() for grid in (weighted, plain))
        errors = [
            float((mass * (values - table[nearest_codes(values, table[None])]).square()).sum())
            for table in tables
        ]
        assert 0 < errors[0] < errors[1]
    assert len(seen) == 6


def test_bits_count_the_outliers_that_occurred():
    task = quantized(SCHEME)
    window = window_of(task.model)
    ids = joined("llama")["input_ids"]
    with torch.no_grad(), counting_outliers(task.model) as shares:
        task.hidden(ids)
        keys, values = shares()
    assert values == pytest.approx(2 / 32)  # of both key heads' values one at each end
    assert 0 < keys < 0.5
    more = window.stored_bits(20, (keys, values)) - window.stored_bits(20)
    assert more == pytest.approx(32 * 19 / 20 * (keys + values) / 2)
    assert all(q.kept is None for q in task.quantizers.values())
