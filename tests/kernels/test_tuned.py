"""Settings of the kernels: where they come from, files that are none, and the search that writes one."""

import json
from pathlib import Path

import pytest
import torch
from compare import assert_all_close, with_gradients
from test_scan import make_inputs
from typer.testing import CliRunner

from hydra_kernels import quasiseparable_scan, tuned
from hydra_kernels.tuned import Launch, Settings, by_rule, file_of, settings, write
from hydra_scale.bench import tune
from hydra_scale.bench.instrument import CpuInstrument
from hydra_scale.cli import app

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuned.FOLDER, str(tmp_path))
    tuned.read.cache_clear()


def test_a_file_comes_before_the_rule_for_its_shapes_only() -> None:
    rule = by_rule(16, 16, torch.float32)
    assert settings(16, 16, torch.float32, CPU) == rule
    other = rule._replace(forward_chunk=16, across=Launch(2, 2))
    write(file_of(CPU), {(16, 16, "float32"): other})
    write(file_of(CPU), {(32, 16, "float32"): rule})  # adds
    assert settings(16, 16, torch.float32, CPU) == other
    assert settings(16, 32, torch.float32, CPU) == by_rule(16, 32, torch.float32)
    assert settings(16, 16, torch.bfloat16, CPU) == by_rule(16, 16, torch.bfloat16)


def test_half_precisions_share_what_is_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU without a file")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    device = torch.device("cuda")
    shipped = tuned.SHIPPED[9, 0][64, 128, "bfloat16"]
    assert shipped != by_rule(64, 128, torch.float16)
    assert settings(64, 128, torch.float16, device) == settings(64, 128, torch.bfloat16, device) == shipped


def test_what_a_process_has_read_stays() -> None:
    rule = by_rule(16, 16, torch.float32)
    write(file_of(CPU), {(16, 16, "float32"): rule._replace(forward_chunk=16)})
    before = settings(16, 16, torch.float32, CPU)
    file_of(CPU).unlink()  # as another process would
    assert before != rule and settings(16, 16, torch.float32, CPU) == before


def test_without_a_home_there_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuned.FOLDER)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError("no such user")))
    assert settings(16, 16, torch.float32, CPU) == by_rule(16, 16, torch.float32)


def test_a_file_that_cannot_be_read_is_named() -> None:
    file_of(CPU).mkdir()
    with pytest.raises(ValueError, match=rf"{file_of(CPU).name}: cannot be read"):
        settings(16, 16, torch.float32, CPU)


@pytest.mark.parametrize(
    "text",
    ["", "{}]", "[1]", '[{"headdim": 16}]', "null"],
    ids=["empty", "no JSON", "no row", "half a row", "no list"],
)
def test_a_file_that_is_none_is_named(text: str) -> None:
    file_of(CPU).write_text(text)
    with pytest.raises(ValueError, match=rf"{file_of(CPU).name}: not a file of kernel settings .*; delete it"):
        settings(16, 16, torch.float32, CPU)


@pytest.mark.parametrize(
    ("field", "value"), [("forward_chunk", 48), ("sweep", [4]), ("within", [0, 1]), ("across", [4.5, 1])]
)
def test_values_that_no_kernel_takes_are_named(field: str, value: object) -> None:
    write(file_of(CPU), {(16, 16, "float32"): by_rule(16, 16, torch.float32)})
    (row,) = json.loads(file_of(CPU).read_text())
    file_of(CPU).write_text(json.dumps([row | {field: value}]))
    tuned.read.cache_clear()
    with pytest.raises(ValueError, match="not a file of kernel settings"):
        settings(16, 16, torch.float32, CPU)


def test_other_settings_give_the_same_numbers() -> None:
    """Chunks of 16 in one pass and 32 in the other, from a file, against the recurrence in float64."""
    chosen = Settings(16, 32, *(Launch(2, 1),) * 5)
    write(file_of(CPU), {(5, 3, "float32"): chosen})
    inputs = make_inputs(1, 50, 2, 5, 1, 3)
    found, expected = (
        with_gradients(
            lambda backend=backend, **values: quasiseparable_scan(**values, backend=backend),
            {name: tensor.to(dtype) for name, tensor in inputs.items()},
        )
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    assert_all_close(found, expected, 1e-5, floor=1e-6)


class Stopwatch(CpuInstrument):
    """A clock by which some settings take less time than others."""

    def __init__(self, seconds: dict[Settings, float]) -> None:
        self.now, self.seconds = 0.0, seconds

    def mark(self) -> float:
        return self.now


def test_the_search_keeps_what_is_faster_and_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, fails = Stopwatch({}), Launch(8, 1)

    def scan(chosen: Settings) -> None:
        if chosen.within == fails:
            raise RuntimeError("out of resource: shared memory")
        clock.now += 1.0 - 0.2 * (chosen.backward_chunk == 64) - 0.1 * (chosen.across == Launch(4, 1))
        clock.now -= 0.001 * (chosen.sweep == Launch(4, 2))  # noise

    monkeypatch.setattr(tune, "_Scan", lambda *_: scan)
    shape = tune.Shape(16, 16, "fp32", 64, 32)
    rows = [row for group in tune.run(shape, CPU, clock, num_rounds=2) for row in group]
    assert settings(16, 16, torch.float32, CPU) == by_rule(16, 16, torch.float32)._replace(
        backward_chunk=64, across=Launch(4, 1)
    )
    failed = [row.implementation for row in rows if row.status != "ok"]
    assert failed == ["within 8 warps, 1 stages"]
    assert rows[-1].implementation == "chosen" and rows[-1].milliseconds == pytest.approx(700)


def test_the_search_runs_both_passes() -> None:
    fields = {"backward_chunk": (16, 32), "sweep": (Launch(4, 1),)}
    rows = [
        row
        for group in tune.run(tune.Shape(16, 16, "fp32", 40, 16), CPU, CpuInstrument(), num_rounds=1, fields=fields)
        for row in group
    ]
    assert [row.status for row in rows] == ["ok"] * len(rows) and len(rows) >= 3
    assert file_of(CPU).is_file()


def test_the_command_refuses_a_dtype_that_no_kernel_takes() -> None:
    result = CliRunner().invoke(app, ["bench", "tune", "--dtype", "fp64"])
    assert result.exit_code != 0 and "expected bf16, fp16, fp32" in str(result.exception)
