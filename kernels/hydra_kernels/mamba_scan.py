"""The scan of `hydra_kernels.scan` as two calls of mamba-ssm's causal chunk scan, with flips and a shift."""

import importlib
from collections.abc import Callable

import torch
from torch.nn.functional import pad

_MODULE = "mamba_ssm.ops.triton.ssd_combined"


def mamba_scan(
    x_BLHP: torch.Tensor,
    dt_2BLH: torch.Tensor,
    A_H: torch.Tensor,
    B_2BLGN: torch.Tensor,
    C_2BLGN: torch.Tensor,
    *,
    diagonal_BLH: torch.Tensor | None,
    chunk_size: int,
) -> torch.Tensor:
    """y (batch, seqlen, nheads, headdim) in x's dtype; every row is a document, all states start at zero.

    Arguments as in `quasiseparable_scan`. mamba-ssm computes, for j <= i,
    SS[i, j] = dt[j] exp(A (dt[j+1] + ... + dt[i])) <C[i], B[j]>; its row i - 1 is what row i of the quasiseparable
    matrix holds below the diagonal.

    Raises:
        ValueError: mamba-ssm cannot be imported.
    """
    scan = _chunk_scan()
    forward_BLHP = scan(x_BLHP, dt_2BLH[0], A_H, B_2BLGN[0], C_2BLGN[0], chunk_size)
    mirrored = (tensor.flip(1) for tensor in (x_BLHP, dt_2BLH[1], B_2BLGN[1], C_2BLGN[1]))
    x_flipped, dt_flipped, B_flipped, C_flipped = mirrored
    backward_BLHP = scan(x_flipped, dt_flipped, A_H, B_flipped, C_flipped, chunk_size).flip(1)
    y_BLHP = pad(forward_BLHP[:, :-1], (0, 0, 0, 0, 1, 0)) + pad(backward_BLHP[:, 1:], (0, 0, 0, 0, 0, 1))
    if diagonal_BLH is not None:
        y_BLHP = y_BLHP + diagonal_BLH.to(x_BLHP.dtype)[..., None] * x_BLHP
    return y_BLHP


def _chunk_scan() -> Callable[..., torch.Tensor]:
    try:
        module = importlib.import_module(_MODULE)
    except ImportError as error:
        raise ValueError(
            f"backend is 'mamba', but {_MODULE} cannot be imported ({error}); pip install 'hydra-scale[mamba]'"
        ) from error
    scan: Callable[..., torch.Tensor] = module.mamba_chunk_scan_combined
    return scan
