"""AdamW in one pass over memory: 28 bytes an element. torch's kernel writes divided gradients back, 4 more."""

import torch

from .adamw_arguments import AdamWNumbers, AdamWState
from .triton_language import tl, triton

_BLOCK = 2048


@triton.jit
def _adamw_kernel(
    weights, gradient, exp_avg, exp_avg_sq, sizes, divisor, refused, num_elements,
    new1, beta2, new2, eps, decay, BLOCK: tl.constexpr,
):  # fmt: skip
    """sizes: lr / (1 - beta1^t) and 1 / sqrt(1 - beta2^t). new1, new2: 1 - beta1, 1 - beta2. decay: lr times it."""
    if tl.load(refused) != 0.0:
        return
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_elements
    g = tl.load(gradient + place, mask=inside, other=0.0) / tl.load(divisor)
    m = tl.load(exp_avg + place, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + place, mask=inside, other=0.0)
    w = tl.load(weights + place, mask=inside, other=0.0)
    m += new1 * (g - m)
    v = beta2 * v + new2 * g * g
    w -= decay * w
    w -= tl.load(sizes) * m / (tl.sqrt(v) * tl.load(sizes + 1) + eps)
    tl.store(exp_avg + place, m, mask=inside)
    tl.store(exp_avg_sq + place, v, mask=inside)
    tl.store(weights + place, w, mask=inside)


def triton_adamw(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    state: AdamWState,
    numbers: AdamWNumbers,
    divisor: torch.Tensor,
    refused: torch.Tensor,
) -> None:
    """As `adamw_`."""
    lr, (beta1, beta2), eps, weight_decay = numbers
    state.step.add_(1.0 - refused)
    # 1 - beta in fp64, for fp32 would leave five digits of it
    t = state.step.double()
    sizes = torch.stack((lr / (1.0 - beta1**t), (1.0 - beta2**t).rsqrt())).float()
    num_elements = weights.numel()
    _adamw_kernel[(triton.cdiv(num_elements, _BLOCK),)](
        weights, gradient, state.exp_avg, state.exp_avg_sq, sizes, divisor, refused, num_elements,
        1.0 - beta1, beta2, 1.0 - beta2, eps, lr * weight_decay, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
