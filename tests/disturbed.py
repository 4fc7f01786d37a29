"""A run under a plan of faults, started again after each, and what each fault cost."""

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ranks import end_ranks
from runs import fault_of, train

from hydra_scale.accelerator import choose_accelerator
from hydra_scale.run_folder import RunFolder
from hydra_scale.run_marks import RunMarks

KINDS = {
    "SIGKILL of one rank": 1, "SIGKILL of both ranks": 2, "TERM": 5, "USR1": 5, "stop request": 5, "TERM in a save": 8,
    "SIGKILL in the write of a save": 10, "SIGKILL in the publication of a save": 9, "SIGSTOP": 12,
    "hang in the step": 12, "hang in the data": 13, "bit rot in the newest checkpoint, then SIGKILL": 21,
    "disk full in a save": 24, "NaN, once": 27, "a second start": 34, "out of memory": 36,
    "half a line in the metrics, then SIGKILL": 38,
}  # fmt: skip
"""What can go wrong, and its row in the fault matrix."""


class Fault(NamedTuple):
    """Something that goes wrong once, in the first attempt that comes to its step."""

    step: int
    kind: str
    rank: int


class Cost(NamedTuple):
    """What a fault did; a run that goes on loses nothing and takes no time."""

    kind: str
    lost_steps: int
    """Computed before it and computed again after it."""
    detected: float | None
    """Seconds until all ranks had ended."""
    resumed: float | None
    """Seconds until the first new step was done."""


def run_disturbed(run: Path, settings: list[str], plan: list[Fault], num_ranks: int = 2) -> list[Cost]:
    """Train to the end, starting again as often as needed; what each fault cost, in the order in which they came.

    Beside the run folder lies what each rank of each attempt said: stderr-ATTEMPT-RANK.

    Raises:
        AssertionError: the run needs many more starts than there are faults, or a fault never came.
    """
    events = _Events(run.parent / "events.jsonl")
    for attempt in range(2 * len(plan) + 1):
        end_ranks(num_ranks, _attempt, run, settings, plan, attempt, timeout=250)
        events.add(event="ended", step=_last_step(run))
        if RunMarks(run).steps_done():
            came = [event["number"] for event in events.all() if event["event"] == "fault"]
            assert sorted(came) == list(range(len(plan))), [plan[n] for n in set(range(len(plan))) - set(came)]
            return [_cost(plan, events.all(), place) for place in _places(events.all(), "fault")]
        RunMarks(run).withdraw_stop()
    raise AssertionError(f"not done after {2 * len(plan) + 1} starts")


def seconds_trained(run: Path) -> float:
    """Of an undisturbed run, from its first step done to its end."""
    began, ended = _Events(run.parent / "events.jsonl").all()
    return float(ended["at"] - began["at"])


class _Events:
    """Lines that all processes of a test append."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def add(self, **values: Any) -> None:
        with self._file.open("a") as stream:
            stream.write(json.dumps(values | {"at": time.time()}) + "\n")

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._file.read_text().splitlines()]


def _places(events: list[dict[str, Any]], kind: str, first: int = 0) -> list[int]:
    return [place for place in range(first, len(events)) if events[place]["event"] == kind]


def _cost(plan: list[Fault], events: list[dict[str, Any]], place: int) -> Cost:
    fault, kind = events[place], plan[events[place]["number"]].kind
    ends, begins = _places(events, "ended", place), _places(events, "began", place)
    if kind == "NaN, once" or not begins:
        return Cost(kind, 0, None, None)
    end, begin = events[max(e for e in ends if e < begins[0])], events[begins[0]]
    detected = events[ends[0]]["at"] - fault["at"]
    return Cost(kind, end["step"] - begin["after"], detected, begin["at"] - fault["at"])


def _last_step(run: Path) -> int:
    """The last step that metrics.jsonl knows of; its last line may be torn."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def _attempt(run: Path, settings: list[str], plan: list[Fault], attempt: int) -> None:
    """`train` in a rank, with those faults of the plan that have not come yet."""
    rank, folder = int(os.environ["RANK"]), run.parent
    with (folder / f"stderr-{attempt}-{rank}").open("w") as stderr:
        os.dup2(stderr.fileno(), 2)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    events = _Events(folder / "events.jsonl")
    came = {event["number"] for event in events.all() if event["event"] == "fault"} if attempt else set()
    mine = [(number, fault) for number, fault in enumerate(plan) if number not in came and fault.rank == rank]
    _disturb(run, events, mine)
    train(run, settings)


def _disturb(run: Path, events: _Events, faults: list[tuple[int, Fault]]) -> None:
    """Have the faults come: each at its step, or as soon after it as what it disturbs happens."""
    from hydra_scale.training import pretrain

    schedule, step_of, rank = pretrain.learning_rate, pretrain.train_step, os.environ["RANK"]
    began = False
    now = 0

    def at_step(step: int, *args: Any) -> Any:
        nonlocal now
        now = step
        if faults and faults[0][1].step <= step:
            number, fault = faults.pop(0)
            _act(fault.kind, run, lambda: events.add(event="fault", number=number, step=step))
        return schedule(step, *args)

    def after_step(*args: Any) -> Any:
        nonlocal began
        result = step_of(*args)
        if not began and rank == "0":
            events.add(event="began", after=now - 1)
        began = True
        return result

    pretrain.learning_rate, pretrain.train_step = at_step, after_step


def _act(kind: str, run: Path, note: Callable[[], None]) -> None:
    """Do it now, or arrange that it happens the next time."""
    from hydra_scale.checkpoint import save
    from hydra_scale.data import loader
    from hydra_scale.parallel.zero import ZeroOptimizer

    def kill() -> None:
        note()
        os.kill(os.getpid(), signal.SIGKILL)

    def fill_the_disk() -> None:
        note()
        raise OSError(errno.ENOSPC, "No space left on device")

    def terminate() -> None:
        note()
        os.kill(os.getpid(), signal.SIGTERM)

    def hang() -> None:
        note()
        time.sleep(1000)

    if kind == "SIGKILL of one rank":
        kill()
    elif kind == "SIGKILL of both ranks":
        os.kill(int((run.parent / f"pid-{1 - int(os.environ['RANK'])}").read_text()), signal.SIGKILL)
        kill()
    elif kind == "TERM":
        terminate()
    elif kind == "USR1":
        note()
        os.kill(os.getpid(), signal.SIGUSR1)
    elif kind == "stop request":
        note()
        RunMarks(run).request_stop()
    elif kind == "SIGSTOP":
        note()
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "hang in the step":
        hang()
    elif kind == "a second start":
        note()
        RunMarks(run).claim()
    elif kind == "out of memory":
        note()
        torch.empty(1 << 50, dtype=torch.uint8, device=choose_accelerator(int(os.environ["LOCAL_RANK"])).device)
    elif kind == "half a line in the metrics, then SIGKILL":
        with (run / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 1, "lo')
        kill()
    elif kind == "bit rot in the newest checkpoint, then SIGKILL":
        _flip_a_bit(run)
        kill()
    elif kind == "NaN, once":
        _once(ZeroOptimizer, "accumulate", note, change=lambda self, batches, scale: (self, batches, float("nan")))
    else:
        owner, name, action = {
            "TERM in a save": (save, "save_file", terminate),
            "SIGKILL in the write of a save": (save, "save_file", kill),
            "SIGKILL in the publication of a save": (save, "publish", kill),
            "disk full in a save": (save, "save_file", fill_the_disk),
            "hang in the data": (loader._Batches, "__call__", hang),
        }[kind]
        _once(owner, name, action)


def train_with_bad_gradients(run: Path, overrides: list[str], first: int, last: int) -> str:
    """The gradients of the last rank are NaN from the first to the last of these passes; returns what ends the run."""
    from hydra_scale.parallel.zero import ZeroOptimizer

    accumulate, calls = ZeroOptimizer.accumulate, 0

    def disturbed(self: Any, batches: Any, scale: float) -> Any:
        nonlocal calls
        calls += 1
        is_hit = first <= calls <= last and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        return accumulate(self, batches, float("nan") if is_hit else scale)

    ZeroOptimizer.accumulate = disturbed  # type: ignore[method-assign]
    return fault_of(run, overrides)


def _once(owner: Any, name: str, action: Callable[[], None], change: Callable[..., Any] = lambda *args: args) -> None:
    """The next call of a function does `action` first, and gets other arguments."""
    function = getattr(owner, name)

    def disturbed(*args: Any) -> Any:
        setattr(owner, name, function)
        action()
        return function(*change(*args))

    setattr(owner, name, disturbed)


def _flip_a_bit(run: Path) -> None:
    checkpoints = RunFolder(run).checkpoints
    file = checkpoints.at(checkpoints.steps()[-1]) / "rank00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
