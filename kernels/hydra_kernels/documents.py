"""Documents laid end to end in one row, and the way there and back from padded rows.

`cu_seqlens` holds the borders: document i is tokens cu_seqlens[i] to cu_seqlens[i + 1] of the row.
"""

from itertools import pairwise
from typing import NamedTuple

import torch


def check_cu_seqlens(cu_seqlens: torch.Tensor, batch: int, seqlen: int) -> list[int]:
    """The documents' lengths, after checking that `cu_seqlens` describes a (batch, seqlen) input.

    cu_seqlens: (num_documents + 1,) int32 or int64, starting at 0, rising, ending at seqlen; batch must be 1. No
    documents at all is [0], for seqlen 0. Reads the values, so a CUDA device is waited for.
    Raises ValueError naming what is wrong and what to do.
    """
    if not isinstance(cu_seqlens, torch.Tensor):
        raise ValueError(f"cu_seqlens is a {type(cu_seqlens).__name__}; expected a tensor: torch.tensor(cu_seqlens)")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() == 0 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}; expected int32 or int64 of shape "
            "(num_documents + 1,): the running sum of the documents' lengths, with a 0 in front"
        )
    if batch != 1:
        raise ValueError(
            f"cu_seqlens is given with a batch of {batch} rows; lay the documents end to end in one row (batch 1)"
        )
    borders = cu_seqlens.tolist()
    if borders[0] != 0:
        raise ValueError(f"cu_seqlens starts at {borders[0]}; expected 0, the start of the first document")
    lengths = [last - first for first, last in pairwise(borders)]
    for document, length in enumerate(lengths):
        if length <= 0:
            raise ValueError(
                f"cu_seqlens gives document {document} the length {length}; every document needs at least one token: "
                "drop empty documents and keep the borders in rising order"
            )
    if borders[-1] != seqlen:
        raise ValueError(
            f"cu_seqlens ends at {borders[-1]} but the input has {seqlen} tokens; the last border must be the length"
        )
    return lengths


def unpad(padded_BLX: torch.Tensor, attention_mask_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of all rows end to end, without padding.

    padded: (batch, seqlen, ...); attention_mask: (batch, seqlen), nonzero at tokens. Padding may stand anywhere in a
    row: it does not exist, so holes close up. Rows without a token are left out.
    Returns the tokens (1, num_tokens, ...) and their cu_seqlens (num_rows_with_tokens + 1,) int32.
    Raises ValueError if the mask's shape is not (batch, seqlen).
    """
    present_BL = _present(attention_mask_BL, padded_BLX.shape[:2])
    lengths_B = present_BL.sum(dim=1)
    borders = lengths_B[lengths_B > 0].cumsum(0)
    return padded_BLX[present_BL][None], torch.nn.functional.pad(borders, (1, 0)).to(torch.int32)


def pad(tokens_1TX: torch.Tensor, attention_mask_BL: torch.Tensor) -> torch.Tensor:
    """Undoes `unpad`: (1, num_tokens, ...) back to (batch, seqlen, ...), exact zeros where the mask is 0."""
    present_BL = _present(attention_mask_BL, attention_mask_BL.shape)
    padded = tokens_1TX.new_zeros(*present_BL.shape, *tokens_1TX.shape[2:])
    return padded.masked_scatter(present_BL.view(*present_BL.shape, *(1,) * (tokens_1TX.ndim - 2)), tokens_1TX[0])


def _present(attention_mask_BL: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if attention_mask_BL.shape != shape or len(shape) != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask_BL.shape)}; expected (batch, seqlen) = {tuple(shape)}, "
            "nonzero at tokens and 0 at padding"
        )
    return attention_mask_BL != 0


class Documents(NamedTuple):
    """Documents laid end to end in one row of T tokens: checked once, then given to every layer as `cu_seqlens`."""

    borders: torch.Tensor
    """(S + 1,), on the device: document i is tokens borders[i] to borders[i + 1]."""
    starts_T: torch.Tensor
    """int32 (T,): first token of each token's document."""
    ends_T: torch.Tensor
    """int32 (T,): one behind its last."""
    lengths: list[int]
    """Tokens of each document, known on the host."""

    @classmethod
    def of(
        cls, cu_seqlens: "torch.Tensor | Documents", batch: int, seqlen: int, device: torch.device | str
    ) -> "Documents":
        """Those of a (batch, seqlen) input. A tensor on the host costs no wait for the device; ValueError as
        `check_cu_seqlens`, or for documents of another number of tokens."""
        if isinstance(cu_seqlens, Documents):
            if batch != 1 or cu_seqlens.starts_T.numel() != seqlen:
                raise ValueError(
                    f"documents of {cu_seqlens.starts_T.numel()} tokens are given with an input of shape "
                    f"{(batch, seqlen)}; expected the documents' tokens end to end in one row"
                )
            return cu_seqlens
        lengths = check_cu_seqlens(cu_seqlens, batch, seqlen)
        if torch.device(device).type == "cuda" and not cu_seqlens.is_cuda:
            cu_seqlens = cu_seqlens.pin_memory()  # else the copy begins only when the device is idle
        borders = cu_seqlens.to(device, non_blocking=True)
        token = torch.arange(seqlen, device=device, dtype=borders.dtype)
        document = torch.searchsorted(borders, token, right=True)
        return cls(borders, borders[document - 1].to(torch.int32), borders[document].to(torch.int32), lengths)

    @classmethod
    def rows(cls, batch: int, seqlen: int, device: torch.device | str) -> "Documents":
        """Each row of a (batch, seqlen) input is a document, all rows laid end to end."""
        starts_T = torch.arange(batch * seqlen, device=device, dtype=torch.int32)
        starts_T = starts_T - starts_T % max(1, seqlen)
        return cls(torch.arange(batch + 1, device=device) * seqlen, starts_T, starts_T + seqlen, [seqlen] * batch)
