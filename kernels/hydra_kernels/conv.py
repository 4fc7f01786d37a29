"""The centred depthwise convolution with SiLU that stands in front of the scan."""

import torch

from .backends import resolve_backend
from .documents import Documents
from .reference import conv_silu
from .triton_language import available

if available:
    from .triton_operators import triton_conv_silu


def depthwise_conv_silu(
    x_BLC: torch.Tensor,
    weight_C1K: torch.Tensor,
    bias_C: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | Documents | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """silu(bias[c] + sum_k weight[c, k] x[t + k - K // 2, c]), zeros beyond both ends of a document.

    x: (batch, seqlen, channels). weight: (channels, 1, K), K odd. bias: (channels,).
    cu_seqlens: (num_documents + 1,) borders of documents laid end to end in a batch of 1; absent: every row is one.
    Returns (batch, seqlen, channels), in x's dtype; PyTorch's own convolution is in that of autocast where it is on.
    Raises ValueError for an even K, shapes or borders that do not fit, or an unknown backend.
    """
    backend = resolve_backend(backend, x_BLC)
    batch, seqlen, num_channels = x_BLC.shape
    taps = weight_C1K.shape[-1]
    if taps % 2 == 0:
        raise ValueError(f"weight has {taps} taps; a centred convolution needs an odd number")
    if weight_C1K.shape != (num_channels, 1, taps):
        raise ValueError(f"weight has shape {tuple(weight_C1K.shape)}; expected {(num_channels, 1, taps)} to go with x")
    if bias_C is not None and bias_C.shape != (num_channels,):  # a kernel would read behind its end
        raise ValueError(f"bias has shape {tuple(bias_C.shape)}; expected {(num_channels,)} to go with x")
    documents = None if cu_seqlens is None else Documents.of(cu_seqlens, batch, seqlen, x_BLC.device)
    if seqlen == 0:
        return torch.zeros_like(x_BLC)
    if backend == "reference":
        return conv_silu(x_BLC, weight_C1K, bias_C, cu_seqlens=None if documents is None else documents.borders)
    if backend == "triton":
        return triton_conv_silu(x_BLC, weight_C1K, bias_C, documents or Documents.rows(batch, seqlen, x_BLC.device))
    if documents is None:
        return torch.nn.functional.silu(_convolve(x_BLC, weight_C1K, bias_C))
    # Documents moved apart by K // 2 rows of zeros: then no tap reaches from one into another.
    gap = taps // 2
    place_L = torch.arange(seqlen, device=x_BLC.device)
    place_L = place_L + gap * (torch.searchsorted(documents.borders, place_L, right=True) - 1)
    apart = x_BLC.new_zeros(1, seqlen + gap * (len(documents.lengths) - 1), num_channels).index_copy(1, place_L, x_BLC)
    return torch.nn.functional.silu(_convolve(apart, weight_C1K, bias_C).index_select(1, place_L))


def _convolve(x_BLC: torch.Tensor, weight_C1K: torch.Tensor, bias_C: torch.Tensor | None) -> torch.Tensor:
    num_channels, _, taps = weight_C1K.shape
    x_BCL = x_BLC.mT.contiguous()
    return torch.nn.functional.conv1d(x_BCL, weight_C1K, bias_C, padding=taps // 2, groups=num_channels).mT
