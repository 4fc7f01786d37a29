"""An attention layer of a mixer's width, by each of PyTorch's backends and by flash-attn."""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

SDPA_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_HEADDIM = 64

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q, k, v) each (batch, seqlen, nheads, headdim) to the same."""


class AttentionLayer(nn.Module):
    """q, k, v and output projection (without biases, as the mixer's) around `attend`; heads of 64."""

    def __init__(self, d_model: int, attend: Attend, device: torch.device) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=False, device=device)
        self.out_proj = nn.Linear(d_model, d_model, bias=False, device=device)
        self._attend = attend

    def forward(self, u_BLD: torch.Tensor) -> torch.Tensor:
        """(batch, seqlen, d_model) to the same."""
        q, k, v = self.qkv_proj(u_BLD).unflatten(-1, (3, -1, _HEADDIM)).unbind(2)
        return self.out_proj(self._attend(q, k, v).flatten(2))


def sdpa(name: str) -> Attend:
    """PyTorch's scaled_dot_product_attention by the backend of this name; fails where that one cannot run."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPA_BACKENDS[name]):
            y = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return y.transpose(1, 2)

    return attend


def flash_attn(package: ModuleType) -> Attend:
    """flash-attn's function for rows of one length."""
    return lambda q, k, v: package.flash_attn_func(q, k, v)


def flash_attn_packed(package: ModuleType, cu_seqlens: torch.Tensor, max_seqlen: int) -> Attend:
    """flash-attn's function for documents laid end to end in a batch of 1."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        y = package.flash_attn_varlen_func(q[0], k[0], v[0], cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return y[None]

    return attend


def torch_packed(cu_seqlens: torch.Tensor, max_seqlen: int) -> Attend:
    """PyTorch's function (2.10 or newer, CUDA) for documents laid end to end in a batch of 1."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        y = varlen_attn(q[0], k[0], v[0], cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        assert isinstance(y, torch.Tensor)  # no auxiliary results were asked for
        return y[None]

    return attend
