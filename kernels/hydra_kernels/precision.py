"""The precision the operations work in, decided in one place."""

import torch


def working_dtype(tensor: torch.Tensor) -> torch.dtype:
    """fp64 for an fp64 tensor, fp32 for every other: steps, decays, states and sums are never held in 16 bits."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def without_autocast(tensor: torch.Tensor) -> torch.autocast:
    """Context in which the operations on `tensor`'s device keep the dtypes they are given."""
    return torch.autocast(tensor.device.type, enabled=False)


def product_in_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b of two matrices of one dtype, not rounded to 16 bits where PyTorch offers that: on CUDA."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.itemsize == 2 else a @ b
