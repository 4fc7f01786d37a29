"""The one place that knows whether Triton is there. Kernel modules take it from here, imported only if it is."""

import secrets
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton: Any = None  # type: ignore[no-redef]
    tl: Any = None  # type: ignore[no-redef]

available: bool = triton is not None
interpreted: bool = available and bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 when they were made."""

OPERATORS = "hydra_kernels" if __package__ == "hydra_kernels" else f"hydra_kernels_{secrets.token_hex(4)}"
"""Namespace of the PyTorch operators. Exported folders carry copies of these modules; one that registered these names
again would take the operators away from whoever has them, whose next call reads freed memory."""


def check_device(tensor: torch.Tensor) -> None:
    """ValueError naming what to do unless Triton kernels can run on `tensor`."""
    if not available:
        raise ValueError("backend is 'triton' but Triton is not installed; pip install triton, or choose 'torch'")
    if tensor.device.type != "cuda" and not interpreted:
        raise ValueError(
            f"backend is 'triton' but the input is on {tensor.device}; choose 'torch' or 'auto', or set "
            "TRITON_INTERPRET=1 before the start to run the kernels in Triton's interpreter"
        )
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"backend is 'triton' but the input is {tensor.dtype}; its kernels take fp32, bf16 and fp16")


def dot_precision(dtype: torch.dtype) -> str:
    """How products of two fp32 tiles are computed: three tf32 products, exact to fp32, unless tf32 was asked for."""
    if dtype != torch.float32:
        return "ieee"  # no say: 16 bit tiles are multiplied exactly
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def padded_width(width: int) -> int:
    """Smallest power of two a tile of `width` columns fits in; matrix units take no less than 16."""
    return max(16, 1 << (width - 1).bit_length())
