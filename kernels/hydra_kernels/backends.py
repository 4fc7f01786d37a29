"""Which implementation of an operation runs."""

import torch

from .triton_language import available, check_device

BACKENDS = ("auto", "triton", "torch", "reference", "mamba")


def check_backend(backend: str) -> None:
    """ValueError naming the choices unless `backend` is one of BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; choose one of {', '.join(map(repr, BACKENDS))}")


def resolve_backend(backend: str, tensor: torch.Tensor) -> str:
    """`backend`, "auto" replaced: "triton" on CUDA where Triton is installed and takes the dtype, else "torch".

    ValueError for an unknown backend, and for "triton" where its kernels cannot run: nothing else runs instead.
    """
    check_backend(backend)
    if backend == "triton":
        check_device(tensor)
    if backend != "auto":
        return backend
    fits = tensor.is_cuda and tensor.dtype != torch.float64 and available
    return "triton" if fits else "torch"
