"""What becomes of gradients on a GPU: products that add them in fp32, and AdamW's kernel."""

import pytest
import torch
from compare import assert_close
from test_adamw import check_updates

from hydra_scale.parallel.product import place_of_gradient, product_adding

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("num_elements", [1, 2047, 5_000_000])
def test_adamw(num_elements: int) -> None:
    check_updates("triton", "cuda", num_elements)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_product_adds_the_gradient_of_its_weight(dtype: torch.dtype) -> None:
    """In fp32, twice, to what was there; under autocast, as training calls it."""
    torch.manual_seed(0)
    x, grad = (torch.randn(333, width, device="cuda", dtype=dtype) for width in (96, 72))
    weight = torch.randn(72, 96, device="cuda", requires_grad=True)
    bias = torch.randn(72, device="cuda", requires_grad=True)
    assert place_of_gradient(x, weight) is None
    weight.main_grad = torch.ones_like(weight)  # type: ignore[attr-defined]
    place = place_of_gradient(x, weight)
    assert place is not None and place_of_gradient(x.float(), weight) is None
    x.requires_grad_()
    with torch.autocast("cuda", dtype=dtype):
        for _ in range(2):
            y = product_adding(x, weight, place, bias)
            y.backward(grad)
    low, wide_grad = weight.detach().to(dtype).double(), grad.double()
    assert weight.grad is None
    assert_close(place, 1.0 + 2.0 * wide_grad.T @ x.detach().double(), 1e-6)
    assert x.grad is not None and bias.grad is not None
    assert_close(y, x.detach().double() @ low.T + bias.detach().double(), 1e-2)
    assert_close(x.grad, 2.0 * wide_grad @ low, 1e-2)
    assert_close(bias.grad, 2.0 * wide_grad.sum(0), 1e-2)
