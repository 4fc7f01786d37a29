"""How the tokens of a scan are cut into chunks, and chunks put together to segments."""

from typing import NamedTuple

import torch

SEGMENT_TOKENS = 2048
"""A state is carried through so many tokens by one program of the GPU."""
_SHORTEST = 16


class Chunks(NamedTuple):
    """Without borders of documents chunks lie at fixed places; with them each belongs to one document."""

    size: int
    num: int
    num_segments: int
    per_segment: int
    starts: torch.Tensor | None
    """First token of each chunk, the number of tokens for those that do not exist; int32, with borders only."""
    documents: torch.Tensor | None
    """The document of each."""
    num_documents: int


def cut(num_tokens: int, borders: torch.Tensor | None, largest: int) -> Chunks:
    """Chunks of a power of two of tokens, from 16 to `largest` and a segment. borders: cu_seqlens (S + 1,)."""
    size = 1 << (max(_SHORTEST, min(largest, SEGMENT_TOKENS)).bit_length() - 1)
    if borders is None:
        num = -(-num_tokens // size)
        per_segment = _per_segment(size, num)
        return Chunks(size, num, -(-num // per_segment), per_segment, None, None, 1)
    # As many chunks as any lengths could need: how many are used stays on the device.
    num_documents = borders.numel() - 1
    num = num_tokens // size + num_documents
    last = ((borders.diff() + size - 1) // size).cumsum(0) - 1
    chunk = torch.arange(num, device=last.device)
    documents = torch.searchsorted(last, chunk).clamp_max(num_documents - 1)
    first = torch.nn.functional.pad(last[:-1] + 1, (1, 0))
    start = borders[documents] + (chunk - first[documents]) * size
    starts = torch.where(chunk <= last[-1], start, num_tokens).to(torch.int32)
    per_segment = _per_segment(size, num)
    segments = -(-num // per_segment)
    return Chunks(size, num, segments, per_segment, starts, documents.to(torch.int32), num_documents)


def _per_segment(size: int, num: int) -> int:
    """Those of a whole segment, or the power of two that all chunks of a short input fit in: kernels count to it."""
    return min(SEGMENT_TOKENS // size, 1 << (num - 1).bit_length())


def num_segments(num_tokens: int) -> int:
    """Of tokens without borders, whatever the size of their chunks."""
    return -(-num_tokens // SEGMENT_TOKENS)
