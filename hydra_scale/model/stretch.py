"""The tokens a rank holds of a micro batch, and the documents they belong to."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch

from hydra_kernels import Documents
from hydra_scale.topology import Context


class StretchTensors(NamedTuple):
    """What a Hydra layer reads of a stretch on the device; the fields are described there."""

    documents: Documents
    documents_with_halo: Documents
    outer_borders: tuple[torch.Tensor, torch.Tensor]

    def changing(self) -> list[torch.Tensor]:
        """Those whose values, but not shapes, depend on the documents."""
        both = (self.documents, self.documents_with_halo)
        return [tensor for documents in both for tensor in (documents.starts_T, documents.ends_T)] + [
            *self.outer_borders
        ]

    def copy(self) -> "StretchTensors":
        """At places of its own."""
        first, second, third, fourth, *outer = (tensor.clone() for tensor in self.changing())
        documents = self.documents._replace(starts_T=first, ends_T=second)
        with_halo = self.documents_with_halo._replace(starts_T=third, ends_T=fourth)
        return StretchTensors(documents, with_halo, (outer[0], outer[1]))


@dataclass(frozen=True)
class Stretch:
    """Tokens [first, end) of a micro batch. Without context parallelism that is all of them."""

    all_borders: tuple[int, ...]
    """Where the documents of the whole micro batch begin, and its end."""
    first: int
    end: int
    device: torch.device
    context: Context | None = None
    halo: int = 0
    """Tokens of the neighbours that the convolution reads on each side."""
    fixed: "StretchTensors | None" = None
    """Tensors whose place in memory must stay, for CUDA graphs; absent: they are made from the borders."""

    def tensors(self) -> "StretchTensors":
        """All that a Hydra layer reads of it on the device."""
        return StretchTensors(self.documents, self.documents_with_halo, self.outer_borders)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole micro batch."""
        return self.all_borders[-1]

    @cached_property
    def all_documents(self) -> Documents:
        """The documents of the whole micro batch."""
        return self._documents(0, self.num_tokens)

    @cached_property
    def opens_left(self) -> bool:
        """Whether the first document here began on a rank to the left."""
        return self.first not in self.all_borders

    @cached_property
    def opens_right(self) -> bool:
        """Whether the last document here goes on to the right."""
        return self.end not in self.all_borders

    @cached_property
    def documents(self) -> Documents:
        """The pieces of documents that lie here, from token 0 on; made once for all layers."""
        return self.fixed.documents if self.fixed else self._documents(self.first, self.end)

    @cached_property
    def documents_with_halo(self) -> Documents:
        """The same with `halo` tokens more on both sides; what lies outside the micro batch is a piece of its own."""
        if self.fixed:
            return self.fixed.documents_with_halo
        return self._documents(self.first - self.halo, self.end + self.halo)

    @cached_property
    def outer_borders(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each token here the first token of its document and one behind its last, int32, counted from `first`;
        -1 and one more than there are tokens where it goes on outside."""
        if self.fixed:
            return self.fixed.outer_borders
        num_tokens = self.end - self.first
        starts_T, ends_T = self.documents.starts_T, self.documents.ends_T
        if self.opens_left:
            starts_T = starts_T.masked_fill(starts_T == 0, -1)
        if self.opens_right:
            ends_T = ends_T.masked_fill(ends_T == num_tokens, num_tokens + 1)
        return starts_T, ends_T

    @cached_property
    def keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For each piece that lies here the tokens of its whole document, counted from the start of the micro batch,
        (pieces, tokens of the longest) int64, and which of them exist."""
        whole = [(start, end) for start, end in pairwise(self.all_borders) if start < self.end and end > self.first]
        start_S, end_S = torch.tensor(whole, device=self.device).T[..., None]
        token_SK = start_S + torch.arange(max(end - start for start, end in whole), device=self.device)
        return token_SK.minimum(end_S - 1), token_SK < end_S

    def _documents(self, first: int, end: int) -> Documents:
        borders = [0, *(border - first for border in self.all_borders if first < border < end), end - first]
        return Documents.of(torch.tensor(borders, dtype=torch.int32), 1, end - first, self.device)
