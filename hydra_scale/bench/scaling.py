"""`hydra-scale bench scaling`: training steps on several devices of one host beside as many times one device.

Each trial (`hydra_scale.bench.scaling_plan`) runs in processes of its own, started as users start them, so that nothing
of one is left to the next. Results go to a file as they come; what is there is not measured again.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hydra_scale.accelerator import Accelerator, gpus_here
from hydra_scale.bench.scaling_plan import COUNTS, SECTIONS, Trial
from hydra_scale.bench.scaling_result import LACKS_MEMORY, Compared, Result, Results, compared, prediction, result_of
from hydra_scale.bench.table import Row, on_this_machine
from hydra_scale.config_file import load_config
from hydra_scale.errors import ConfigError
from hydra_scale.meeting import versions

_TIMEOUT = 900  # seconds for one layout
_LAST_LINES = 300  # characters of a failure that are shown
_DOUBT = 1.1
"""A layout that nobody asked for by name is tried unless its predicted peak is so many times the memory of a GPU."""


@dataclass(frozen=True)
class Host:
    """What trials run on."""

    device: torch.device
    name: str
    gpus: int
    """0: trials run on the CPU, in any number of processes."""
    gpu_memory: int
    """Bytes of one."""
    code: str
    """Hash of the sources."""

    @classmethod
    def here(cls, accelerator: Accelerator) -> "Host":
        """This one."""
        return cls(accelerator.device, accelerator.name, gpus_here(), accelerator.total_memory(), versions()["code"])

    @property
    def columns(self) -> dict[str, str]:
        """Of a row, that say where it comes from."""
        return {key: text for key, text in on_this_machine(self.device, self.name, "").items() if key != "dtype"}

    def origin(self, trial: Trial) -> dict[str, str]:
        """Where a result of today comes from."""
        precision = load_config(trial.config, trial.settings).training.precision
        return self.columns | {"dtype": precision, "code": self.code}

    def refusal(self, trial: Trial) -> str | None:
        """Why a trial is not started here, if it is not."""
        try:
            expected = prediction(trial).peak_gib
        except ConfigError as error:
            return f"missing: {error}"
        if self.gpus and trial.processes > self.gpus:
            return f"missing: {trial.processes} processes need as many GPUs, this host has {self.gpus}"
        if self.gpus and trial.section != "layout" and expected * 2**30 > _DOUBT * self.gpu_memory:
            return (
                f"missing: not tried, for `hydra-scale plan` predicts a peak of {expected:.0f} GiB and a GPU has"
                f" {self.gpu_memory / 2**30:.0f}"
            )
        return None


def usual_counts(host: Host) -> list[int]:
    """Powers of two up to the GPUs that are here; two processes at least."""
    return [count for count in COUNTS if count <= max(2, host.gpus)]


def usual_sections(host: Host) -> Sequence[str]:
    """On a CPU all but the long sequences, which take hours there."""
    return [name for name in SECTIONS if host.gpus or name != "long"]


def run(
    trials: Sequence[Trial], results: Results, host: Host, again: bool = False, seconds: float | None = None
) -> Iterator[list[Row]]:
    """One row a trial, measured now unless `results` has it of this device and code.

    Args:
        again: measure also what is there.
        seconds: after them no trial is begun any more.
    """
    began, new = time.monotonic(), set[str]()
    for trial in trials:
        origin = host.origin(trial)
        known = results.of(trial, origin)
        if known is None or (known.key not in new and (again or not known.is_final)):
            refusal = host.refusal(trial)
            if refusal is not None:
                known = _refused(trial, refusal, known, results, origin)
            elif seconds is not None and time.monotonic() - began > seconds:
                known = Result("", origin, "missing: no time was left; the same command goes on")
            else:
                known = measured(trial, origin)
                results.add(known)
                new.add(known.key)
        alone = None if trial.alone is None else results.of(trial.alone, origin)
        yield [_row(Compared(trial, known, alone))]


def _refused(trial: Trial, refusal: str, known: Result | None, results: Results, origin: Mapping[str, str]) -> Result:
    """Kept as well, for pages that are written elsewhere, unless the file has something of the trial."""
    try:
        found = result_of(trial, origin, refusal)
    except ConfigError:
        return Result("", origin, refusal)
    if known is None:
        results.add(found)
    return known or found


def shown(trials: Sequence[Trial], results: Results) -> Iterator[list[Row]]:
    """The rows of `run` from the newest results of any origin, measuring nothing."""
    for trial in trials:
        nothing = Compared(trial, Result("", {}, "missing: not measured"))
        yield [_row(compared(trial, results, None) or nothing)]


def measured(trial: Trial, origin: Mapping[str, str]) -> Result:
    """Start the processes of a trial and wait for what they find."""
    with tempfile.TemporaryDirectory() as folder:
        job, found = Path(folder) / "job.json", Path(folder) / "result.json"
        values = {"config": str(trial.config.resolve()), "settings": trial.settings}
        sizes = {name: getattr(trial, name) for name in ("seqlen", "documents", "micro_batches", "steps", "warm_up")}
        job.write_text(json.dumps(values | sizes))
        program = ["-m", "hydra_scale.bench.scaling_rank", str(job), str(found)]
        if trial.processes > 1:
            count = f"--nproc-per-node={trial.processes}"
            program = ["-m", "torch.distributed.run", "--standalone", count, *program]
        try:
            done = subprocess.run(
                [sys.executable, *program], capture_output=True, text=True, timeout=_TIMEOUT, env=_environment(trial)
            )
            failure = _failure(done) if done.returncode else "no result"
        except subprocess.TimeoutExpired:
            failure = f"not done after {_TIMEOUT} s"
        if found.exists():  # it is there before the profiler starts, which may fail without harm
            return result_of(trial, origin, "ok", json.loads(found.read_text()))
        return result_of(trial, origin, f"failed: {failure}")


def _environment(trial: Trial) -> dict[str, str]:
    chosen = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if trial.is_long:
        chosen.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return chosen


def _failure(done: "subprocess.CompletedProcess[str]") -> str:
    if LACKS_MEMORY in done.stderr:
        return f"{LACKS_MEMORY} in a process"
    lines = [line for line in done.stderr.splitlines() if "Error" in line or "Fault" in line]
    reasons = [line for line in lines if "ChildFailedError" not in line] or lines  # that is torchrun's
    return " ".join(reasons[-1:] or done.stderr.split())[-_LAST_LINES:]


def _row(found: Compared) -> Row:
    trial, result = found.trial, found.result
    row = Row(trial.section, trial.name, processes=trial.processes, status=result.status)
    row.seqlen, row.dtype = trial.seqlen, result.origin.get("dtype", "")
    if result.found is None or result.timing is None:
        return row
    row.d_model, row.tokens = result.found["d_model"], result.found["tokens"]
    row.took(result.timing)
    row.tokens_per_second, row.peak_gib = result.tokens_per_second, found.peak_gib
    row.loss, row.grad_norm = result.found["loss"], result.found["grad_norm"]
    row.difference, row.norm_difference = found.loss_difference, found.norm_difference
    row.efficiency = found.efficiency
    if predicted := found.predicted:
        row.predicted_gib, row.predicted_tokens_per_second = predicted.peak_gib, predicted.tokens_per_second
    for name, milliseconds in (result.found["split"] or {}).items():
        setattr(row, f"{name}_ms", milliseconds)
    return row
