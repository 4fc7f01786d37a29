"""AdamW's update against its formula in float64, over several steps, clipped and refused ones among them."""

import math

import pytest
import torch
from compare import assert_close

from hydra_kernels import AdamWNumbers, AdamWState, adamw_

NUMBERS = AdamWNumbers(lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
DIVISORS = [1.0, 2.5, 1.0, 40.0, 1.0]
REFUSED = 2
"""The step that is to change nothing: its gradient is not even finite."""


def check_updates(backend: str, device: str, num_elements: int) -> None:
    generator = torch.Generator().manual_seed(num_elements)
    weights, *gradients = torch.randn(1 + len(DIVISORS), num_elements, generator=generator).to(device)
    state = AdamWState(torch.zeros_like(weights), torch.zeros_like(weights), torch.zeros((), device=device))
    expected, mean, square, count = weights.double(), weights.double() * 0, weights.double() * 0, 0
    start = weights.double()
    for index, (gradient, divisor) in enumerate(zip(gradients, DIVISORS, strict=True)):
        is_refused = index == REFUSED
        given = gradient * math.nan if is_refused else gradient.clone()
        numbers = torch.tensor([divisor, float(is_refused)], device=device)
        adamw_(weights, given, state, NUMBERS, divisor=numbers[0], refused=numbers[1], backend=backend)
        if is_refused:
            continue
        count += 1
        g = gradient.double() / divisor
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
        change = (mean / (1 - 0.9**count)) / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
        expected = expected - 3e-3 * 0.01 * expected - 3e-3 * change
    assert float(state.step) == count
    assert_close(state.exp_avg, mean, 1e-6)
    assert_close(state.exp_avg_sq, square, 1e-6)
    assert_close(
        weights.double() - start, expected - start, 2e-5
    )  # of a change of 0.3% of the weights fp32 has so much


@pytest.mark.parametrize("num_elements", [1, 2047, 5000])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_updates(backend: str, num_elements: int) -> None:
    check_updates(backend, "cpu", num_elements)


def test_what_does_not_fit_is_refused() -> None:
    weights, one = torch.zeros(8), torch.ones(())
    state = AdamWState(torch.zeros(8), torch.zeros(8), torch.zeros(()))
    for gradient in (torch.zeros(7), torch.zeros(8, dtype=torch.bfloat16), torch.zeros(16)[::2]):
        with pytest.raises(ValueError, match=r"expected contiguous fp32 of the weights' shape \(8,\)"):
            adamw_(weights, gradient, state, NUMBERS, divisor=one, refused=one)
