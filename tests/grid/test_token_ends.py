"""Ranges from tokens' extremes."""

import pytest
import torch

from qexp.common.errors import UserError
from qexp.grid import IntGrid
from qexp.grid.ranges import MinMax
from qexp.grid.token_ends import TokenQuantile


def observed(share: float, x: torch.Tensor, parts: int = 1) -> torch.Tensor:
    observer = TokenQuantile(share).observer()
    for part in x.chunk(parts):
        observer.add(part)
    return observer.values()[0]


def test_a_share_of_one_is_min_max():
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(observed(1.0, x), torch.stack(x.aminmax())[None])
    grid = IntGrid(8, per_tensor=True)
    one, two = (IntGrid(8, per_tensor=True, range=r) for r in (TokenQuantile(), MinMax()))
    assert torch.equal(one.fit(x.flatten(1)).scale, two.fit(x.flatten(1)).scale)
    assert grid == two


def test_outlying_tokens_are_cut_and_outlying_channels_are_not():
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 20.0  # of every token
    x[7] *= 50  # one token
    [[low, high]] = observed(0.98, x, 4)
    assert high == 20 and -4 < low < -1
    by_hand = x.amin(1).quantile(0.02)
    torch.testing.assert_close(low, by_hand)


def test_refusals():
    with pytest.raises(UserError, match="not finite"):
        observed(1.0, torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(UserError, match="never reached"):
        TokenQuantile().observer().values()
    with pytest.raises(UserError, match=r"range\.share=0\.2: give a number above 0\.5"):
        TokenQuantile(0.2)
