"""What trials of `hydra-scale bench scaling` found, kept in a file, so that a run that was cut off goes on."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra_scale.bench.instrument import Timing
from hydra_scale.bench.scaling_plan import Trial
from hydra_scale.bench.training import BERT_VOCAB_SIZE
from hydra_scale.errors import ConfigError
from hydra_scale.plan.layout import Layout
from hydra_scale.plan.memory import memory
from hydra_scale.plan.speed import Cluster, step_seconds

LACKS_MEMORY = "out of memory"
_DECIDES = ("model", "training", "optimizer", "parallel", "zero")
"""Sections of the configuration that a step depends on; its data are random."""


@dataclass(frozen=True)
class Result:
    """Of a trial. Its file has one as a line of JSON."""

    key: str
    """Of all that decides what is computed, without where."""
    origin: Mapping[str, str]
    """Device, versions, dtype and the hash of the code."""
    status: str
    """ok, or `missing: why` or `failed: why`."""
    found: Mapping[str, Any] | None = None
    """What `hydra_scale.bench.scaling_rank` wrote."""
    at: str = ""
    """Day and time, UTC."""

    @property
    def is_final(self) -> bool:
        """Whether another attempt would end alike: it worked, or memory does not suffice."""
        return self.found is not None or LACKS_MEMORY in self.status

    @property
    def timing(self) -> Timing | None:
        return None if self.found is None else Timing.of(self.found["milliseconds"])

    @property
    def tokens_per_second(self) -> float | None:
        if self.found is None or self.timing is None:
            return None
        return 1e3 * self.found["tokens"] / self.timing.median


def key_of(trial: Trial) -> str:
    """Of its settings and sizes; where the configuration lies and how the layout is called do not matter."""
    sizes = (trial.processes, trial.seqlen, trial.documents, trial.micro_batches, trial.steps, trial.warm_up)
    values = trial.resolved.model_dump(mode="json")
    text = json.dumps([{name: values[name] for name in _DECIDES}, sizes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Results:
    """The results of a file, newest first where there are several of one trial."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ConfigError: the file is there and holds something else.
        """
        self._path = path
        self._found: dict[str, list[Result]] = {}
        for result in _read(path):
            self._found.setdefault(result.key, []).insert(0, result)

    def of(self, trial: Trial, origin: Mapping[str, str] | None = None) -> Result | None:
        """The newest that worked, else the newest; of this origin, or of any."""
        try:
            candidates = self._found.get(key_of(trial), [])
        except ConfigError:
            return None
        here = [result for result in candidates if origin is None or result.origin == origin]
        return next((result for result in here if result.found is not None), here[0] if here else None)

    def add(self, result: Result) -> None:
        """Append it to the file at once."""
        self._found.setdefault(result.key, []).insert(0, result)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")


def result_of(trial: Trial, origin: Mapping[str, str], status: str, found: Mapping[str, Any] | None = None) -> Result:
    """Of now."""
    return Result(key_of(trial), dict(origin), status, found, datetime.now(UTC).isoformat(" ", "minutes"))


def _read(path: Path) -> Iterator[Result]:
    if not path.exists():
        return
    whole, end, cut_off = path.read_bytes().rpartition(b"\n")
    if cut_off:  # the writer was killed
        os.truncate(path, len(whole + end))
    for number, line in enumerate(whole.decode().splitlines(), 1):
        try:
            yield Result(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{path}:{number}: expected a result of bench scaling, found {line[:40]!r} ({error}); remove the file"
                " or choose another --output"
            ) from None


@dataclass(frozen=True)
class Prediction:
    """By `hydra_scale.plan`."""

    peak_gib: float
    tokens_per_second: float


def prediction(trial: Trial) -> Prediction:
    """Of exactly this layout and these sizes, all devices on one host.

    Raises:
        ConfigError: the layout cannot run.
    """
    config = trial.resolved
    layout = Layout(config, trial.processes, config.model.vocab_size or BERT_VOCAB_SIZE)
    return Prediction(memory(layout).peak / 2**30, layout.step_tokens / step_seconds(layout, Cluster()))


@dataclass(frozen=True)
class Compared:
    """A result beside that of one process, and beside its prediction."""

    trial: Trial
    result: Result
    alone: Result | None = None

    @property
    def efficiency(self) -> float | None:
        """Tokens a second over those of as many single processes; on the same device only."""
        ours, one = self.result, self.alone
        if one is None or one.origin.get("device") != ours.origin.get("device"):
            return None
        if ours.tokens_per_second is None or one.tokens_per_second is None:
            return None
        return ours.tokens_per_second / (self.trial.processes * one.tokens_per_second)

    @property
    def loss_difference(self) -> float | None:
        """Relative, of the first step, where both have the same global batch."""
        return self._difference("loss")

    @property
    def norm_difference(self) -> float | None:
        """As `loss_difference`, of the gradient norm."""
        return self._difference("grad_norm")

    def _difference(self, name: str) -> float | None:
        alone, one = self.trial.alone, self.alone
        if self.result.found is None or one is None or one.found is None or alone is None:
            return None
        if self.trial.section != "mixed":
            return None
        return abs(self.result.found[name] / one.found[name] - 1)

    @property
    def predicted(self) -> Prediction | None:
        """None where the layout cannot run, and on a CPU, whose speed nothing predicts."""
        if self.result.origin.get("device", "").startswith("CPU"):
            return None
        try:
            return prediction(self.trial)
        except ConfigError:
            return None

    @property
    def peak_gib(self) -> float | None:
        """Measured, the largest of all ranks; None on a CPU."""
        return None if self.result.found is None else self.result.found["peak_gib"]

    @property
    def memory_error(self) -> float | None:
        """Predicted over measured peak, less 1."""
        return None if self.peak_gib is None or self.predicted is None else self.predicted.peak_gib / self.peak_gib - 1

    @property
    def time_error(self) -> float | None:
        """Predicted over measured time of a step, less 1."""
        measured, predicted = self.result.tokens_per_second, self.predicted
        return None if measured is None or predicted is None else measured / predicted.tokens_per_second - 1


def compared(trial: Trial, results: Results, origin: Mapping[str, str] | None) -> Compared | None:
    """From what is there; None without a result of the trial itself."""
    result = results.of(trial, origin)
    if result is None:
        return None
    return Compared(trial, result, None if trial.alone is None else results.of(trial.alone, origin))
