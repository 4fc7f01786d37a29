"""Fifty faults over five hundred steps, drawn at random: in the end the run that nobody disturbed, bit for bit."""

import random
import time
from pathlib import Path

import pytest
from disturbed import KINDS, Fault, run_disturbed, seconds_trained
from figures import Figures
from runs import assert_same_run, rows

STEPS, NUM_FAULTS, SEED = 500, 50, 20
EVERY = 5
SETTINGS = [
    f"training.steps={STEPS}", "training.global_batch_size=4", "training.micro_batch_size=2", "data.seqlen=32",
    "model.d_model=32", "model.num_layers=1", "model.mixer.chunk_size=32", "model.dropout=0.1",
    f"checkpoint.every={EVERY}", "checkpoint.keep=4", "evaluation.every=50", "evaluation.sequences=4",
    "monitor.tensorboard=false", "watchdog.step=4",
]  # fmt: skip
IN_A_SAVE = {kind for kind in KINDS if kind.endswith("a save") and kind != "TERM in a save"}
ANNOUNCED = {"TERM", "USR1", "stop request"}
ONLY_RANK_0 = {"SIGKILL in the publication of a save", "half a line in the metrics, then SIGKILL"}


def drawn(seed: int) -> list[Fault]:
    """Every kind about equally often, one fault a step; bits rot once there is more than one checkpoint, and no save is
    disturbed that an announced stop makes, of which it would be said that it lost nothing."""
    draw = random.Random(seed)
    kinds = [*KINDS] * (NUM_FAULTS // len(KINDS)) + draw.sample([*KINDS], NUM_FAULTS % len(KINDS))
    while True:
        draw.shuffle(kinds)
        steps = sorted(draw.sample(range(1, STEPS), NUM_FAULTS))
        plan = [Fault(s, k, 0 if k in ONLY_RANK_0 else draw.randrange(2)) for s, k in zip(steps, kinds, strict=True)]
        announced = [fault.step for fault in plan if fault.kind in ANNOUNCED]
        disturbed = [fault.step for fault in plan if fault.kind in IN_A_SAVE]
        if all(fault.step > 4 * EVERY for fault in plan if fault.kind.startswith("bit rot")) and not any(
            step < stop <= step + EVERY for step in disturbed for stop in announced
        ):
            return plan


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_fifty_faults_change_nothing(corpus: Path, tmp_path: Path, figures: Figures) -> None:
    settings = [f"data.train={corpus}", *SETTINGS]
    for name in ("undisturbed", "disturbed"):
        (tmp_path / name).mkdir()
    undisturbed, run = tmp_path / "undisturbed" / "run", tmp_path / "disturbed" / "run"
    assert run_disturbed(undisturbed, settings, []) == []
    begin = time.monotonic()
    costs = run_disturbed(run, settings, drawn(SEED))
    elapsed = time.monotonic() - begin
    assert_same_run(run, undisturbed)
    assert len(costs) == NUM_FAULTS and len(rows(run, "loss")) == STEPS
    for kind, row in KINDS.items():
        these = [cost for cost in costs if cost.kind == kind]
        limit = {5: 0, 8: 0, 27: 0, 21: 4 * EVERY}.get(row, 2 * EVERY)  # a save is published an interval later at most
        assert all(cost.lost_steps <= limit for cost in these), these
        figures(
            row,
            kind,
            times=len(these),
            lost_steps=max(cost.lost_steps for cost in these),
            detected=[cost.detected for cost in these if cost.detected is not None],
            resumed=[cost.resumed for cost in these if cost.resumed is not None],
        )
    trained, lost = seconds_trained(undisturbed), sum(cost.lost_steps for cost in costs)
    figures.say(
        f"The random run: {NUM_FAULTS} faults over {STEPS} steps on two ranks, seed {SEED}. Weights, losses,"
        f" evaluations and ledger are the undisturbed run's bit for bit; {lost} steps were computed twice. Undisturbed"
        f" it took {trained:.0f} s from the first step to the end, disturbed {elapsed:.0f} s with all its starts:"
        f" goodput {trained / elapsed:.0%}, at {trained / STEPS * 1000:.0f} ms a step and a fault every"
        f" {STEPS // NUM_FAULTS} steps."
    )
