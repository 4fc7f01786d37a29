"""x W^T + b whose weight has a place for its gradient: the product that makes it adds it there, in fp32."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def place_of_gradient(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """Where `product_adding` can add the gradient of the weight: its `main_grad` (`FlatGradients`), for 16 bit inputs
    on a GPU."""
    return getattr(weight, "main_grad", None) if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) else None


def product_adding(
    x_TD: torch.Tensor, weight_ED: torch.Tensor, place_ED: torch.Tensor, bias_E: torch.Tensor | None = None
) -> torch.Tensor:
    """(T, D), a weight (E, D) and a bias (E,), both of any dtype, to (T, E) in x's. The gradient of the weight is added
    to `place`, fp32, without being rounded to 16 bits before; autograd gets none.
    """
    return _Product.apply(x_TD, weight_ED, place_ED, bias_E)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, weight_ED: torch.Tensor, place_ED: torch.Tensor, bias_E: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        ctx.place_ED, ctx.bias_dtype = place_ED, None if bias_E is None else bias_E.dtype
        bias_E = None if bias_E is None else bias_E.to(x_TD.dtype)
        return torch.nn.functional.linear(x_TD, weight_ED.to(x_TD.dtype), bias_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, weight_ED = ctx.saved_tensors
        torch.addmm(ctx.place_ED, grad_TE.T, x_TD, out_dtype=ctx.place_ED.dtype, out=ctx.place_ED)
        grad_bias_E = None if ctx.bias_dtype is None else grad_TE.sum(0).to(ctx.bias_dtype)
        return grad_TE @ weight_ED.to(grad_TE.dtype), None, None, grad_bias_E
