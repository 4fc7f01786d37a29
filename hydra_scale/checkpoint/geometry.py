"""Rectangles of global tensors, the only geometry of the checkpoint format.

A rank owns a flat range [start, stop) of a tensor (a ZeRO slice). Such a range of an n-dimensional tensor is at most
2n - 1 axis-aligned rectangles, each contiguous in memory: a head row, full rows and a tail row, recursively.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a type alone: what reads manifests and folders only, such as `launch status`, needs no PyTorch
    from hydra_scale.parallel.placement import Placement


@dataclass(frozen=True)
class Rectangle:
    """Elements [offset, offset + size) along each dimension; a 0-dimensional tensor is one rectangle ()."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return prod(self.size)

    def intersect(self, other: "Rectangle") -> "Rectangle | None":
        """What both cover, or None if that is nothing."""
        offset = tuple(map(max, self.offset, other.offset))
        ends = (min(a + n, b + m) for a, n, b, m in zip(self.offset, self.size, other.offset, other.size, strict=True))
        size = tuple(end - begin for begin, end in zip(offset, ends, strict=True))
        return None if any(n <= 0 for n in size) else Rectangle(offset, size)

    def within(self, outer: "Rectangle") -> tuple[slice, ...]:
        """Index of this rectangle in an array that holds `outer`."""
        return tuple(slice(a - b, a - b + n) for a, b, n in zip(self.offset, outer.offset, self.size, strict=True))


def flat_range(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[tuple[int, Rectangle]]:
    """Rectangles that make up the flat range [start, stop) of a C-contiguous tensor, each with its flat start."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield start, Rectangle((start,) * len(shape), (stop - start,) * len(shape))
        return
    row = prod(shape[1:])
    first_row, last_row = start // row, (stop - 1) // row
    if first_row == last_row and (start % row or stop % row):
        yield from _in_row(first_row, start, stop, shape)
        return
    whole_first, whole_stop = -(-start // row), stop // row
    if start % row:
        yield from _in_row(first_row, start, whole_first * row, shape)
    if whole_stop > whole_first:
        inner = shape[1:]
        yield whole_first * row, Rectangle((whole_first, *(0 for _ in inner)), (whole_stop - whole_first, *inner))
    if stop % row:
        yield from _in_row(last_row, whole_stop * row, stop, shape)


def _in_row(index: int, start: int, stop: int, shape: tuple[int, ...]) -> Iterator[tuple[int, Rectangle]]:
    base = index * prod(shape[1:])
    for flat, part in flat_range(start - base, stop - base, shape[1:]):
        yield base + flat, Rectangle((index, *part.offset), (1, *part.size))


def placed(box: Rectangle, placement: "Placement") -> Iterator[tuple[Rectangle, tuple[slice, ...]]]:
    """The rectangles of the global tensor that a rectangle of a rank's part of it is, each with its index in `box`."""
    if not placement.stretches:
        yield box, ()
        return
    dim = placement.dim
    for here, start, length in placement.pieces():
        begin = max(box.offset[dim], here)
        size = min(box.offset[dim] + box.size[dim], here + length) - begin
        if size <= 0:
            continue
        inner = Rectangle(_with(box.offset, dim, begin), _with(box.size, dim, size))
        yield Rectangle(_with(inner.offset, dim, begin - here + start), inner.size), inner.within(box)


def _with(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    return (*values[:index], value, *values[index + 1 :])


def check_cover(shape: tuple[int, ...], parts: list[Rectangle]) -> str | None:
    """Why `parts` do not cover a tensor of `shape` exactly once, or None if they do.

    Sorted by offset along the first dimension, only rectangles whose rows overlap are compared.
    """
    for part in parts:
        if len(part.offset) != len(shape) or len(part.size) != len(shape):
            return f"a piece at {part.offset} of size {part.size} is of other dimensions than the tensor, {shape}"
        if any(a < 0 or n < 0 or a + n > whole for a, n, whole in zip(part.offset, part.size, shape, strict=True)):
            return f"a piece at {part.offset} of size {part.size} lies outside the tensor, {shape}"
    covered = sum(part.num_elements for part in parts)
    if covered != prod(shape):
        return f"its pieces hold {covered} elements, the tensor has {prod(shape)}"
    if not shape:
        return None
    open_parts: list[Rectangle] = []
    for part in sorted(parts, key=lambda rectangle: rectangle.offset):
        open_parts = [other for other in open_parts if other.offset[0] + other.size[0] > part.offset[0]]
        if any(part.intersect(other) for other in open_parts):
            return f"two of its pieces overlap at {part.offset}"
        open_parts.append(part)
    return None
