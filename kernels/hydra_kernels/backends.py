"""Which implementation of an operation runs."""

import torch

from . import triton_language

BACKENDS = ("auto", "triton", "torch", "reference", "mamba")


def check_backend(backend: str) -> None:
    """ValueError naming the choices unless `backend` is one of BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; choose one of {', '.join(map(repr, BACKENDS))}")


def resolve_backend(backend: str, tensor: torch.Tensor) -> str:
    """`backend`, "auto" replaced: "triton" on CUDA where Triton is installed and takes the dtype, else "torch"."""
    check_backend(backend)
    if backend != "auto":
        return backend
    fits = tensor.is_cuda and tensor.dtype != torch.float64 and triton_language.available
    return "triton" if fits else "torch"
