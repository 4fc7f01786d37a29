"""Who holds a job up: a judgement from two looks at the board."""

from collections.abc import Mapping

from hydra_scale.watch.board import Record

_SHOWN = 3


def lost(before: Mapping[int, Record], now: Mapping[int, Record], world_size: int) -> dict[int, str]:
    """Ranks that died, ended or fell silent, by rank, with a line about each.

    The looks lie more than two beats apart, so a process that lives has written between them.
    """
    found: dict[int, str] = {}
    for rank in range(world_size):
        record = now.get(rank)
        if record is None:
            if before:  # long enough ago for everyone to have spoken
                found[rank] = f"rank {rank} has never been heard of"
        elif record.phase == "ended":
            found[rank] = f"{record} ended in step {record.step} ({record.detail})"
        elif rank in before and before[rank].beat == record.beat:
            found[rank] = f"{record} is silent, last heard of at {_place(record)}: killed, stopped, or its host is gone"
    return found


def held_up_by(before: Mapping[int, Record], now: Mapping[int, Record], world_size: int) -> tuple[list[int], str]:
    """The ranks for which the others wait, and a line that says so.

    In this order: those that no longer speak; those that are behind in (step, phase); those that are in no collective
    while others are. Where all are alike there is nobody to name.
    """
    if gone := lost(before, now, world_size):
        return sorted(gone), _list(list(gone.values()))
    records = list(now.values())
    first = min(record.progress for record in records)
    behind = [record for record in records if record.progress == first]
    if len(behind) == len(records):
        behind = [record for record in records if not record.waits]
    if behind and (len(behind) < len(records) or len(records) == 1):
        names = [f"{record} is alive but stuck at {_place(record)}" for record in behind]
        return [record.rank for record in behind], _list(names)
    return [], f"all {len(records)} ranks are alive at {_place(records[0])} and none is behind: compare their stacks"


def _place(record: Record) -> str:
    return f"step {record.step}, phase {record.phase}{record.detail and f' ({record.detail})'}"


def _list(lines: list[str]) -> str:
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more
