"""Losses, their gradient and the likeliest class against the textbook's log softmax in float64."""

import pytest
import torch
from compare import assert_close

from hydra_kernels import cross_entropy
from hydra_kernels.triton_language import interpreted

DEVICE = "cpu" if interpreted else "cuda"
BACKENDS = {"torch": (torch.float64, 1e-12), "triton": (torch.float32, 1e-6)}


@pytest.mark.parametrize("num_classes", [1, 5, 1024, 2500])
@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_and_gradient(backend: str, num_classes: int) -> None:
    """Of scores far apart, and so far from zero that their exponentials have no place in fp32."""
    dtype, tolerance = BACKENDS[backend]
    generator = torch.Generator().manual_seed(num_classes)
    offsets = torch.tensor([0.0, 300.0, -300.0, 5.0])[:, None]
    scores = 8.0 * torch.randn(4, num_classes, generator=generator) + offsets
    targets = torch.randint(num_classes, (4,), generator=generator)
    weights = torch.randn(4, generator=generator, dtype=torch.float64)

    wide = scores.double().requires_grad_()
    expected = torch.log(torch.exp(wide - offsets.double()).sum(1)) - (wide - offsets.double())[range(4), targets]
    (expected_grad,) = torch.autograd.grad(expected, wide, weights)

    leaf = scores.to(DEVICE, dtype).requires_grad_()
    losses, likeliest = cross_entropy(leaf, targets.to(DEVICE), backend=backend)
    (grad,) = torch.autograd.grad(losses, leaf, weights.to(losses))
    # fp32 has no more of a score of 300 than 2e-5, and a loss is a difference of two
    assert (losses.cpu().double() - expected).abs().max() <= (1e-9 if dtype == torch.float64 else 1e-4)
    assert grad.dtype == dtype
    assert_close(grad.cpu(), expected_grad, tolerance if dtype == torch.float64 else 1e-4, "gradient")
    assert likeliest.tolist() == [row.index(max(row)) for row in scores.tolist()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_of_equal_scores_is_the_likeliest(backend: str) -> None:
    scores = torch.zeros(2, 3000, device=DEVICE, dtype=BACKENDS[backend][0])
    scores[1, [7, 1031, 2999]] = 2.0
    _, likeliest = cross_entropy(scores, torch.tensor([0, 5], device=DEVICE), backend=backend)
    assert likeliest.tolist() == [0, 7]


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_that_are_not_finite_make_losses_that_are_not(backend: str) -> None:
    """And a score of -inf, which is never drawn, changes nothing."""
    scores = torch.ones(4, 2000, device=DEVICE, dtype=BACKENDS[backend][0])
    scores[0, 1500], scores[1, 3], scores[2, 1999] = torch.nan, torch.inf, -torch.inf
    losses, _ = cross_entropy(scores, torch.zeros(4, dtype=torch.int64, device=DEVICE), backend=backend)
    assert losses.isfinite().tolist() == [False, False, True, True]
    assert losses[2:].tolist() == pytest.approx([torch.tensor(1999.0).log().item(), torch.tensor(2000.0).log().item()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_are_one_for_each_row(backend: str) -> None:
    scores = torch.zeros(4, 7, device=DEVICE)
    with pytest.raises(ValueError, match=r"targets have shape \(3,\); expected \(4,\), one for each row"):
        cross_entropy(scores, torch.zeros(3, dtype=torch.int64, device=DEVICE), backend=backend)


def test_scores_of_16_bits_are_summed_in_fp32() -> None:
    scores = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    targets = torch.tensor([1, 4999, 77], device=DEVICE)
    expected = torch.nn.functional.cross_entropy(scores.double(), targets, reduction="none")
    for backend in BACKENDS:
        leaf = scores.clone().requires_grad_()
        losses, _ = cross_entropy(leaf, targets, backend=backend)
        assert losses.dtype == torch.float32
        assert_close(losses, expected, 1e-6, backend)
        losses.sum().backward()
        assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16


def test_a_target_that_is_no_class_is_not_scored_as_one() -> None:
    """Neither by what lies beside the scores nor as nothing: the row's loss and gradient are NaN, others' are not."""
    scores = torch.randn(5, 2500, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    losses, _ = cross_entropy(scores, torch.tensor([0, 2500, 2499, -1, -100], device=DEVICE), backend="triton")
    assert losses.isnan().tolist() == [False, True, False, True, True]
    (grad,) = torch.autograd.grad(losses.sum(), scores)
    assert grad.isnan().all(1).tolist() == grad.isnan().any(1).tolist() == losses.isnan().tolist()
