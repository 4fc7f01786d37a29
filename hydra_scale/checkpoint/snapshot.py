"""A copy of a rank's slices in the memory of the host: what a save writes while training goes on."""

from collections.abc import Iterable, Iterator

import torch

from hydra_scale.checkpoint.geometry import Rectangle, flat_range, placed
from hydra_scale.checkpoint.manifest import Piece
from hydra_scale.parallel.slices import MOMENTS, LocalSlice

Record = tuple[str, str, tuple[int, ...], Piece]
"""Tensor name, dtype, global shape, and a piece of it."""


class Snapshot:
    """Buffers that are made once and reused by every copy; page-locked for slices on a GPU."""

    def __init__(self, file: str) -> None:
        """`file` is the name under which the pieces will be stored."""
        self.tensors: dict[str, torch.Tensor] = {}
        self.records: list[Record] = []
        self.file = file

    def reserve(self, slices: Iterable[LocalSlice]) -> None:
        """Make the buffers, so that the first copy need not: locking their pages takes seconds."""
        for part in slices:
            for name, view, target in _pieces(part):
                key = _key(name, target)
                self.tensors[key] = _buffer_for(view, self.tensors.get(key)).zero_()

    def take(self, slices: Iterable[LocalSlice]) -> None:
        """Copy the slices that are this rank's to save; returns when all of them are here."""
        previous, self.tensors, self.records = self.tensors, {}, []
        device = torch.device("cpu")
        for part in slices:
            for name, view, target in _pieces(part):
                key = _key(name, target)
                host = _buffer_for(view, previous.get(key))
                host.copy_(view, non_blocking=True)
                device, self.tensors[key] = view.device if view.is_cuda else device, host
                piece = Piece(file=self.file, key=key, offset=target.offset, size=target.size)
                self.records.append((name, str(view.dtype).removeprefix("torch."), part.placement.shape, piece))
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def _key(name: str, target: Rectangle) -> str:
    return f"{name}@{'_'.join(map(str, target.offset))}"


def _buffer_for(view: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    if buffer is None or buffer.shape != view.shape or buffer.dtype != view.dtype:
        return torch.empty(view.shape, dtype=view.dtype, pin_memory=view.is_cuda)
    return buffer


def _pieces(part: LocalSlice) -> Iterator[tuple[str, torch.Tensor, Rectangle]]:
    """Name, view and place in the global tensor of each rectangle of a slice, if it is this rank's to save."""
    for kind in () if part.is_copy else ("parameter", *MOMENTS):
        flat = getattr(part, kind).detach()
        for start, box in flat_range(part.start, part.start + flat.numel(), part.shape):
            view = flat.narrow(0, start - part.start, box.num_elements).view(box.size)
            for target, index in placed(box, part.placement):
                yield f"{kind}/{part.name}", view[index], target
