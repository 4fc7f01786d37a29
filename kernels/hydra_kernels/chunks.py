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
    last_S: torch.Tensor | None
    """Last chunk of each document."""

    @property
    def first_S(self) -> torch.Tensor:
        """First chunk of each document, where there are borders."""
        assert self.last_S is not None
        return _first(self.last_S)


def _first(last_S: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(last_S[:-1] + 1, (1, 0))


def cut(num_tokens: int, borders: torch.Tensor | None, largest: int) -> Chunks:
    """Chunks of a power of two of tokens, from 16 to `largest`. borders: cu_seqlens (S + 1,)."""
    size = 1 << (max(_SHORTEST, largest).bit_length() - 1)
    per_segment = max(1, SEGMENT_TOKENS // size)
    if borders is None:
        num = -(-num_tokens // size)
        return Chunks(size, num, -(-num // per_segment), per_segment, None, None, 1, None)
    # As many chunks as any lengths could need: how many are used stays on the device.
    num_documents = borders.numel() - 1
    num = num_tokens // size + num_documents
    last = ((borders.diff() + size - 1) // size).cumsum(0) - 1
    chunk = torch.arange(num, device=last.device)
    documents = torch.searchsorted(last, chunk).clamp_max(num_documents - 1)
    start = borders[documents] + (chunk - _first(last)[documents]) * size
    starts = torch.where(chunk <= last[-1], start, num_tokens).to(torch.int32)
    segments = -(-num // per_segment)
    return Chunks(size, num, segments, per_segment, starts, documents.to(torch.int32), num_documents, last)
