"""How the tokens of a scan are cut into chunks, and chunks put together to segments."""

from typing import NamedTuple

import torch

SEGMENT_TOKENS = 2048
"""A state is carried through so many tokens by one program of the GPU, or through more where there are many."""
_LONGEST_SEGMENT = 16384
PART_TOKENS = 1024
"""What leaves a segment is summed by programs of so many tokens each: those that a head has forgotten are skipped."""
_SWEEPS_WANTED = 512
"""Nearly four programs for each of 132 multiprocessors: more do not fit, and fewer leave memory idle."""
_SHORTEST = 16


class Chunks(NamedTuple):
    """Without borders of documents chunks lie at fixed places; with them each belongs to one document."""

    size: int
    num: int
    num_segments: int
    per_segment: int
    parts: int
    """Of a segment, each as many chunks; 1 with borders."""
    starts: torch.Tensor | None
    """First token of each chunk, the number of tokens for those that do not exist; int32, with borders only."""
    documents: torch.Tensor | None
    """The document of each."""
    num_documents: int


def cut(num_tokens: int, num_heads: int, borders: torch.Tensor | None, largest: int) -> Chunks:
    """Chunks of a power of two of tokens, from 16 to `largest` and a segment. borders: cu_seqlens (S + 1,)."""
    of_segment = segment_tokens(num_tokens, num_heads)
    size = 1 << (max(_SHORTEST, min(largest, SEGMENT_TOKENS)).bit_length() - 1)
    if borders is None:
        num = -(-num_tokens // size)
        per_segment = _per_segment(size, num, of_segment)
        parts = min(per_segment, max(1, per_segment * size // PART_TOKENS))
        return Chunks(size, num, -(-num // per_segment), per_segment, parts, None, None, 1)
    # As many chunks as any lengths could need: how many are used stays on the device.
    num_documents = borders.numel() - 1
    num = num_tokens // size + num_documents
    last = ((borders.diff() + size - 1) // size).cumsum(0) - 1
    chunk = torch.arange(num, device=last.device)
    documents = torch.searchsorted(last, chunk).clamp_max(num_documents - 1)
    first = torch.nn.functional.pad(last[:-1] + 1, (1, 0))
    start = borders[documents] + (chunk - first[documents]) * size
    starts = torch.where(chunk <= last[-1], start, num_tokens).to(torch.int32)
    per_segment = _per_segment(size, num, of_segment)
    segments = -(-num // per_segment)
    return Chunks(size, num, segments, per_segment, 1, starts, documents.to(torch.int32), num_documents)


def _per_segment(size: int, num: int, of_segment: int) -> int:
    """Those of a whole segment, or the power of two that all chunks of a short input fit in: kernels count to it."""
    return min(of_segment // size, 1 << (num - 1).bit_length())


def segment_tokens(num_tokens: int, num_heads: int) -> int:
    """As many as leave enough programs, one for each direction of each head of each segment."""
    tokens = _LONGEST_SEGMENT
    while tokens > SEGMENT_TOKENS and 2 * num_heads * num_tokens < _SWEEPS_WANTED * tokens:
        tokens //= 2
    return tokens


def num_segments(num_tokens: int, num_heads: int) -> int:
    """Of tokens without borders, whatever the size of their chunks."""
    return -(-num_tokens // segment_tokens(num_tokens, num_heads))
