"""Documents cut into blocks of equal length, so that a block belongs to exactly one document.

Every document is filled up to a whole number of blocks. The blocks are ordered by their place in their document: first
the first block of every document, then the second of every document that has one, and so on, longest documents first.
The blocks of one such step are then consecutive and so are those of the documents that go on, which makes passing
states from block to block a loop over slices, as in torch's PackedSequence.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class BlockLayout:
    """Where each token of a (num_tokens, ...) tensor stands in blocks, and the way back."""

    block_len: int
    documents_S: torch.Tensor
    """(num_documents,) the documents in the order of the layout, longest first."""
    first_S: torch.Tensor
    """(num_documents,) the first token of each document, in the documents' own order."""
    last_S: torch.Tensor
    """(num_documents,) the last token of each document, in the documents' own order."""
    blocks_per_step: list[int]
    """How many documents have a first block, a second block, ..."""
    source: torch.Tensor
    """(num_blocks * block_len,) the token at each place; at filling, the last token of the same document."""
    place: torch.Tensor
    """(num_tokens,) the place of each token."""
    filling: torch.Tensor
    """The places that hold no token."""
    is_identity: bool
    """Every token already stands at its place and there is no filling."""

    def align(self, tokens: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """(..., num_tokens, ...) to (..., num_blocks, block_len, ...), zeros at filling; a view if nothing moves."""
        aligned = tokens if self.is_identity else _Align.apply(tokens, self.source, self.place, self.filling, dim)
        return aligned.unflatten(dim, (-1, self.block_len))

    def restore(self, blocks: torch.Tensor) -> torch.Tensor:
        """(num_blocks, block_len, ...) back to (num_tokens, ...)."""
        places = blocks.flatten(0, 1)
        return places if self.is_identity else _Restore.apply(places, self.source, self.place, self.filling)


def block_layout(lengths: list[int], block_len: int, device: torch.device) -> BlockLayout:
    """The layout of documents of these lengths, each at least 1, laid end to end; at least one document."""
    length_S = torch.tensor(lengths)
    num_blocks_S = (length_S + block_len - 1).div(block_len, rounding_mode="floor")
    first_S = length_S.cumsum(0) - length_S
    documents_S = num_blocks_S.argsort(descending=True, stable=True)
    num_steps = int(num_blocks_S.max())
    # step k has as many blocks as there are documents of more than k blocks
    per_step = len(lengths) - num_blocks_S.bincount(minlength=num_steps).cumsum(0)[:num_steps]

    step_K = torch.arange(num_steps).repeat_interleave(per_step)
    document_K = documents_S[torch.arange(len(step_K)) - (per_step.cumsum(0) - per_step)[step_K]]
    offset_KQ = step_K[:, None] * block_len + torch.arange(block_len)
    is_filling_KQ = offset_KQ >= length_S[document_K, None]
    source = (first_S[document_K, None] + offset_KQ.minimum(length_S[document_K, None] - 1)).flatten()
    is_filling = is_filling_KQ.flatten()
    taken = (~is_filling).nonzero()[:, 0]
    place = torch.empty_like(taken).index_copy_(0, source[taken], taken)
    return BlockLayout(
        block_len=block_len,
        documents_S=documents_S.to(device),
        first_S=first_S.to(device),
        last_S=(first_S + length_S - 1).to(device),
        blocks_per_step=per_step.tolist(),
        source=source.to(device),
        place=place.to(device),
        filling=is_filling.nonzero()[:, 0].to(device),
        is_identity=bool(len(taken) == len(source) and (len(lengths) == 1 or num_steps == 1)),
    )


class _Align(torch.autograd.Function):
    """Tokens to their places, zeros elsewhere. Its transpose is `_Restore`."""

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, source: torch.Tensor, place: torch.Tensor, filling: torch.Tensor, dim: int
    ) -> torch.Tensor:
        ctx.save_for_backward(place)
        ctx.dim = dim
        return tokens.index_select(dim, source).index_fill_(dim, filling, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        return grad.index_select(ctx.dim, place), None, None, None, None


class _Restore(torch.autograd.Function):
    """Places to tokens. Its transpose is `_Align`."""

    @staticmethod
    def forward(
        ctx: Any, places: torch.Tensor, source: torch.Tensor, place: torch.Tensor, filling: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(source, filling)
        return places.index_select(0, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        source, filling = ctx.saved_tensors
        return grad.index_select(0, source).index_fill_(0, filling, 0), None, None, None
