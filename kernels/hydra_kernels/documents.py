"""Documents laid end to end in one row, and the way there and back from padded rows.

`cu_seqlens` holds the borders: document i is tokens cu_seqlens[i] to cu_seqlens[i + 1] of the row.
"""

from itertools import pairwise

import torch


def check_cu_seqlens(cu_seqlens: torch.Tensor, batch: int, seqlen: int) -> list[int]:
    """The documents' lengths, after checking that `cu_seqlens` describes a (batch, seqlen) input.

    cu_seqlens: (num_documents + 1,) int32 or int64, starting at 0, rising, ending at seqlen; batch must be 1. No
    documents at all is [0], for seqlen 0. Reads the values, so a CUDA device is waited for.
    Raises ValueError naming what is wrong and what to do.
    """
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


def token_borders(
    cu_seqlens: torch.Tensor | None, batch: int, seqlen: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Borders of all documents (S + 1,), and the first token and the end of each token's document (T,) int32.

    With all rows end to end, T = batch * seqlen; without `cu_seqlens` each row is a document. Nothing is read on the
    host: borders that `check_cu_seqlens` would refuse give wrong masks, never an access outside the input.
    """
    num_tokens = batch * seqlen
    if cu_seqlens is None:
        borders = torch.arange(batch + 1, device=device) * seqlen
        starts = torch.arange(num_tokens, device=device, dtype=torch.int32)
        starts = starts - starts % max(1, seqlen)
        return borders, starts, starts + seqlen
    borders = cu_seqlens.to(device)
    token = torch.arange(num_tokens, device=device, dtype=borders.dtype)
    document = torch.searchsorted(borders, token, right=True).clamp(1, max(1, borders.numel() - 1))
    return borders, borders[document - 1].to(torch.int32), borders[document].to(torch.int32)
