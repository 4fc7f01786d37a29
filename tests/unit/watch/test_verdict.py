"""Who is named, from boards written by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from hydra_scale.watch.board import Board, Record
from hydra_scale.watch.verdict import held_up_by, lost

WAITING = Record(0, "a", 10, 1, 7, 5, "step", waits=True)


def board(**changed: dict[str, object]) -> dict[int, Record]:
    """Four ranks that wait in step 5, but for those given as r1={...}."""
    ranks = (replace(WAITING, rank=rank, host=f"n{rank}") for rank in range(4))
    return {r.rank: replace(r, **changed.get(f"r{r.rank}", {})) for r in ranks}  # type: ignore[arg-type]


def later(records: dict[int, Record], silent: tuple[int, ...] = ()) -> dict[int, Record]:
    return {rank: r if rank in silent else replace(r, beat=r.beat + 3) for rank, r in records.items()}


@pytest.mark.parametrize(
    ("changed", "silent", "culprits", "line"),
    [
        ({}, (), [], "all 4 ranks are alive at step 5, phase step and none is behind"),
        ({}, (0,), [0], "rank 0 (process 10 on n0) is silent, last heard of at step 5, phase step"),
        ({"r3": {"phase": "data", "detail": "reading x.tar"}}, (), [3],
         "rank 3 (process 10 on n3) is alive but stuck at step 5, phase data (reading x.tar)"),
        ({"r1": {"step": 4, "phase": "save"}}, (), [1],
         "rank 1 (process 10 on n1) is alive but stuck at step 4, phase save"),
        ({"r2": {"waits": False}}, (), [2], "rank 2 (process 10 on n2) is alive but stuck at step 5, phase step"),
        ({"r2": {"waits": False}, "r1": {"phase": "data"}}, (3,), [3], "rank 3 (process 10 on n3) is silent"),
        ({"r1": {"phase": "ended", "detail": "DataError: x"}}, (), [1],
         "rank 1 (process 10 on n1) ended in step 5 (DataError: x)"),
    ],
)  # fmt: skip
def test_the_culprit(
    changed: dict[str, dict[str, object]], silent: tuple[int, ...], culprits: list[int], line: str
) -> None:
    before = board(**changed)
    found, text = held_up_by(before, later(before, silent), 4)
    assert found == culprits and text.startswith(line), text


def test_a_rank_that_never_wrote() -> None:
    before = {rank: record for rank, record in board().items() if rank != 2}
    assert lost(before, later(before), 4) == {2: "rank 2 has never been heard of"}


def test_many_are_counted_not_listed() -> None:
    before = board()
    assert held_up_by(before, later(before, (0, 1, 2, 3)), 4)[1].endswith("gone; and 1 more")


def test_records_of_several_ranks_in_one_file(tmp_path: Path) -> None:
    """Also when a detail is longer than a record, and beside a record that is half-written."""
    boards = [Board(tmp_path, rank) for rank in (0, 3)]
    long = replace(WAITING, rank=3, detail="é" * 5000)
    boards[0].write(WAITING)
    boards[1].write(long)
    found = boards[0].read()
    assert found.keys() == {0, 3} and found[0] == WAITING
    assert replace(found[3], detail="") == replace(long, detail="") and set(found[3].detail) == {"?"}
    (file,) = tmp_path.glob("*.beats")
    with file.open("r+b") as stream:
        stream.write(b'{"rank": 0, "rank')
    assert boards[1].read().keys() == {3}
    for each in boards:
        each.close()
