"""Flat ranges as rectangles, against numpy indexing."""

from itertools import pairwise
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hydra_scale.checkpoint.geometry import Rectangle, check_cover, flat_range, placed
from hydra_scale.parallel.placement import Placement

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@given(st.data(), shapes)
def test_rectangles_of_a_flat_range_are_that_range(data: st.DataObject, shape: tuple[int, ...]) -> None:
    size = prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    array = np.arange(size).reshape(shape)
    parts = list(flat_range(start, stop, shape))
    found = []
    for flat, box in parts:
        values = array[box.within(Rectangle((0,) * len(shape), shape))].ravel().tolist()
        assert values == list(range(flat, flat + len(values)))  # contiguous, so a plain view
        found += values
    assert found == list(range(start, stop))
    assert len(parts) <= max(1, 2 * len(shape) - 1)


@given(st.data(), shapes, st.integers(1, 5))
def test_a_tensor_cut_into_slices_is_covered_and_damage_is_seen(
    data: st.DataObject, shape: tuple[int, ...], num_slices: int
) -> None:
    size = prod(shape)
    cuts = sorted(data.draw(st.lists(st.integers(0, size), min_size=num_slices, max_size=num_slices)))
    edges = [0, *cuts, size]
    parts = [box for a, b in pairwise(edges) for _, box in flat_range(a, b, shape)]
    assert check_cover(shape, parts) is None
    assert "elements" in (check_cover(shape, parts[1:]) or "")
    if len(parts) > 1 and parts[0].size == parts[1].size:
        assert "overlap" in (check_cover(shape, [parts[0], *parts[:1], *parts[2:]]) or "")


def test_intersection() -> None:
    a, b = Rectangle((0, 2), (3, 4)), Rectangle((2, 0), (5, 3))
    assert a.intersect(b) == Rectangle((2, 2), (1, 1))
    assert a.intersect(Rectangle((3, 0), (1, 9))) is None
    assert Rectangle((), ()).intersect(Rectangle((), ())) == Rectangle((), ())


@given(data=st.data(), dim=st.integers(0, 1))
def test_parts_of_a_divided_tensor_land_at_their_place(data: st.DataObject, dim: int) -> None:
    """Whatever flat range of whatever part: each element is found where the global tensor has it."""
    shape = (7, 5)
    size = shape[dim]
    starts = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=3, unique=True))
    stretches = tuple((start, data.draw(st.integers(1, size - start))) for start in starts)
    placement = Placement(shape, dim, stretches)
    whole = torch.arange(35).view(shape)
    part = placement.part_of(whole)
    first = data.draw(st.integers(0, part.numel()))
    end = data.draw(st.integers(first, part.numel()))
    seen = 0
    for begin, box in flat_range(first, end, tuple(part.shape)):
        view = part.flatten()[begin : begin + box.num_elements].view(box.size)
        for target, index in placed(box, placement):
            place = tuple(slice(offset, offset + n) for offset, n in zip(target.offset, target.size, strict=True))
            assert torch.equal(view[index], whole[place])
            seen += target.num_elements
    assert seen == end - first


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ([((-1, 0), (2, 3)), ((1, 0), (2, 3))], "lies outside"),
        ([((0, 0), (3, 3)), ((3, 0), (1, 3))], "lies outside"),
        ([((0, 0), (-2, -3)), ((0, 0), (1, 0))], "lies outside"),
        ([((0,), (6,))], "other dimensions"),
    ],
)
def test_pieces_that_are_none_of_the_tensor(parts: list[tuple[tuple[int, ...], tuple[int, ...]]], problem: str) -> None:
    assert problem in (check_cover((2, 3), [Rectangle(offset, size) for offset, size in parts]) or "")
