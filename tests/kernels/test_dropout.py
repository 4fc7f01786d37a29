"""Keyed dropout: rate, scale, independence, and that it depends on nothing but its keys."""

import pytest
import torch

from hydra_kernels import keyed_dropout
from hydra_kernels.triton_language import interpreted

DEVICE = "cpu" if interpreted else "cuda"


def test_rate_and_scale() -> None:
    x = torch.ones(2000, 64)
    y = keyed_dropout(x, torch.arange(2000), 0.1, key=3)
    dropped = (y == 0).double()
    deviation = (0.1 * 0.9 / dropped.numel()) ** 0.5
    assert abs(dropped.mean() - 0.1) < 5 * deviation
    assert torch.equal(y[y != 0].unique(), torch.tensor([1 / 0.9], dtype=torch.float32))
    for axis in (0, 1):  # no token and no channel is dropped unusually often
        count = dropped.shape[axis]
        assert (dropped.mean(axis) - 0.1).abs().max() < 5 * (0.09 / count) ** 0.5


def test_neighbouring_tokens_channels_and_keys_are_uncorrelated() -> None:
    masks = keyed_dropout(torch.ones(4000, 32), torch.arange(4000), 0.5, key=1) != 0
    other = keyed_dropout(torch.ones(4000, 32), torch.arange(4000), 0.5, key=2) != 0
    pairs = [(masks[1:], masks[:-1]), (masks[:, 1:], masks[:, :-1]), (masks, other)]
    for a, b in pairs:
        agreement = (a == b).double().mean()
        assert abs(agreement - 0.5) < 5 * 0.5 / a.numel() ** 0.5


def test_a_mask_belongs_to_the_token_not_to_its_place_in_the_batch() -> None:
    x, keys = torch.randn(50, 16), torch.randint(0, 2**40, (50,))
    order = torch.randperm(50)
    assert torch.equal(keyed_dropout(x, keys, 0.3, 7)[order], keyed_dropout(x[order], keys[order], 0.3, 7))


def test_large_keys_differ_beyond_32_bits() -> None:
    keys = torch.tensor([5, 5 + 2**32, 5 + 2**33])
    masks = keyed_dropout(torch.ones(3, 4096), keys, 0.5, 1) != 0
    assert 0.4 < (masks[0] == masks[1]).double().mean() < 0.6
    assert 0.4 < (masks[1] == masks[2]).double().mean() < 0.6


def test_seeds_of_64_bits_differ() -> None:
    x, keys = torch.ones(3, 4096), torch.arange(3)
    masks = [keyed_dropout(x, keys, 0.5, seed) != 0 for seed in (7, 2**32 + 7, 2**63 + 7, 2**64 - 1)]
    for index, mask in enumerate(masks):
        for other in masks[:index]:
            assert 0.4 < (mask == other).double().mean() < 0.6


@pytest.mark.parametrize("seed", [12345, 2**63 + 12345])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_gradient_is_dropped_like_the_value(backend: str, seed: int) -> None:
    """By every backend the same elements, also of rows with a stride."""
    keys = torch.tensor([0, 1, 2**31, 2**32 + 1, 2**40, 2**50], device=DEVICE)
    wide = torch.randn(6, 2100, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    x, rate = wide[:, :1100], 0.6
    y = keyed_dropout(x, keys, rate, seed, backend=backend)
    kept = keyed_dropout(torch.ones_like(x), keys, rate, seed, backend="torch") != 0
    assert 0.3 < kept.double().mean() < 0.5
    assert torch.equal(y, torch.where(kept, x * (1 / (1 - rate)), 0.0))
    (grad,) = torch.autograd.grad(y, wide, torch.full_like(y, 3.0))
    assert torch.equal(grad[:, :1100], torch.where(kept, torch.tensor(3.0, device=DEVICE) * (1 / (1 - rate)), 0.0))
    assert not grad[:, 1100:].any()


@pytest.mark.parametrize(
    ("keys", "rate", "message"),
    [
        (torch.arange(4), 1.0, "rate is 1.0; expected at least 0 and less than 1"),
        (torch.arange(4), -0.5, "rate is -0.5"),
        (torch.arange(3), 0.5, r"token_keys is torch.int64 of shape \(3,\); expected int64 of shape \(4,\)"),
        (torch.arange(4).int(), 0.5, "token_keys is torch.int32"),
    ],
)
def test_misuse_is_named(keys: torch.Tensor, rate: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keyed_dropout(torch.ones(4, 3), keys, rate, 0)
