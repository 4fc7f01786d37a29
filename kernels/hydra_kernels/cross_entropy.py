"""The loss at scored positions, and which class has the highest score, from one reading of the scores."""

import torch

from .backends import resolve_backend
from .precision import without_autocast, working_dtype
from .triton_language import available

if available:
    from .triton_cross_entropy import triton_cross_entropy


def cross_entropy(
    logits_MV: torch.Tensor, targets_M: torch.Tensor, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """-log softmax(logits)[target] of each row, and the first of its highest scores: (M,) and int64 (M,).

    logits: (M, V), of any floating dtype; targets: int64 (M,), in [0, V). Computed and returned in fp32 (fp64); the
    gradient has the logits' dtype, and nothing as large as they are is kept beside them. What belongs to a target that
    is no class is NaN on Triton kernels; PyTorch's own raise (IndexError on a CPU).
    Raises ValueError for shapes that do not fit, or an unknown backend.
    """
    backend = resolve_backend(backend, logits_MV)
    if targets_M.shape != logits_MV.shape[:1]:  # a kernel would read behind their end
        raise ValueError(f"targets have shape {tuple(targets_M.shape)}; expected ({len(logits_MV)},), one for each row")
    with without_autocast(logits_MV):
        if backend == "triton" and logits_MV.numel():
            return triton_cross_entropy(logits_MV, targets_M)
        wide_MV = logits_MV.to(working_dtype(logits_MV))
        losses_M = torch.nn.functional.cross_entropy(wide_MV, targets_M, reduction="none")
        return losses_M, logits_MV.detach().argmax(-1)
