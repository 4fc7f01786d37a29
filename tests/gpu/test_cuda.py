"""On CUDA devices, through the command line as users start it: exact operations, NCCL, bf16, bit-exact continuation."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from precision import dtypes_of_a_step, expected_dtypes
from runs import TINY, ledger, rows, weights
from safetensors import safe_open

from hydra_kernels import HydraMixer

pytestmark = pytest.mark.gpu
GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("mixer_*.safetensors"))
STEPS = ["training.steps=12", "checkpoint.every=4", "evaluation.every=6", "training.micro_batch_size=2"]


def train(run_dir: Path, corpus: Path, num_ranks: int, *overrides: str, gpu: bool = True) -> Path:
    """torchrun hydra-scale pretrain on `num_ranks` devices."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command = ["-m", "hydra_scale.cli", "pretrain", "--config", str(TINY), "--run-dir", str(run_dir)]
    environment = os.environ | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    subprocess.run(
        [sys.executable, *launcher, *command, f"data.train={corpus}", *STEPS, *overrides], check=True, env=environment
    )
    return run_dir


@pytest.fixture(scope="module")
def one_gpu(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("one") / "run", corpus, 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_mixer(path: Path, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with safe_open(path, "pt", device="cuda") as file:
        arguments = {k: json.loads(v) for k, v in file.metadata().items() if k not in ("batch", "seqlen")}
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    mixer = HydraMixer(**arguments, dtype=dtype, device="cuda")
    mixer.load_state_dict({n.removeprefix("param."): t for n, t in golden.items() if n.startswith("param.")})
    y = mixer(golden["input"].to(dtype))
    y.backward(golden["grad_output"].to(dtype))
    assert (y - golden["output"]).norm() <= tolerance * golden["output"].norm()
    for name, parameter in mixer.named_parameters():
        expected = golden[f"grad.{name}"]
        assert (parameter.grad - expected).norm() <= tolerance * expected.norm(), name


def test_gpu_and_cpu_agree(corpus: Path, one_gpu: Path, tmp_path: Path) -> None:
    cpu = train(tmp_path / "run", corpus, 1, gpu=False)
    for key in ("loss", "grad_norm", "eval/loss"):
        assert rows(one_gpu, key) == pytest.approx(rows(cpu, key), rel=2e-5), key


@pytest.mark.parametrize(
    "layout",
    [
        "zero.stage=1", "zero.stage=2", "zero.stage=3", "zero.offload=true",
        "parallel.tensor=2", "parallel.tensor=2 parallel.sequence=true", "parallel.tensor=2 zero.stage=3",
        "parallel.context=2", "parallel.context=2 parallel.exchange=neighbour",
        "parallel.context=2 parallel.exchange=heads",
        "parallel.pipeline=2",
        "parallel.context=2 zero.stage=3 training.recompute.kind=full training.recompute.together=2",
    ],
)  # fmt: skip
def test_two_gpus_are_one(corpus: Path, one_gpu: Path, tmp_path: Path, layout: str) -> None:
    assert torch.cuda.device_count() >= 2, "needs two GPUs"
    two = train(tmp_path / "run", corpus, 2, *layout.split())
    for key in ("loss", "grad_norm", "eval/loss"):
        assert rows(two, key) == pytest.approx(rows(one_gpu, key), rel=1e-5), key
    assert ledger(two) == ledger(one_gpu)


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.context=2"])
def test_two_gpus_in_bf16(corpus: Path, one_gpu: Path, tmp_path: Path, layout: str) -> None:
    assert torch.cuda.device_count() >= 2, "needs two GPUs"
    two = train(tmp_path / "run", corpus, 2, *layout.split(), "training.precision=bf16")
    assert rows(two, "loss") == pytest.approx(rows(one_gpu, "loss"), rel=1e-2)
    assert rows(two, "grad_norm") == pytest.approx(rows(one_gpu, "grad_norm"), rel=5e-2)


def test_bf16_follows_fp32(corpus: Path, one_gpu: Path, tmp_path: Path) -> None:
    half = train(tmp_path / "run", corpus, 1, "training.precision=bf16")
    assert rows(half, "loss") == pytest.approx(rows(one_gpu, "loss"), rel=1e-2)
    assert rows(half, "grad_norm") == pytest.approx(rows(one_gpu, "grad_norm"), rel=5e-2)
    assert rows(half, "loss") != rows(one_gpu, "loss")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_products_and_sums_are_in_the_precision_asked_for(precision: str) -> None:
    seen, expected = dtypes_of_a_step(1, precision), expected_dtypes(precision)
    assert {name: seen[name] for name in expected} == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_continued_from_a_checkpoint_bit_for_bit(corpus: Path, tmp_path: Path, precision: str) -> None:
    settings = [f"training.precision={precision}", "model.dropout=0.1"]
    whole = train(tmp_path / "whole", corpus, 1, *settings)
    cut = train(tmp_path / "cut", corpus, 1, *settings)
    (cut / "done").unlink()
    shutil.rmtree(cut / "checkpoints" / "step-00000012")
    train(cut, corpus, 1, *settings)
    for key in ("loss", "grad_norm", "eval/loss"):
        assert rows(cut, key) == rows(whole, key), key
    found, expected = weights(cut), weights(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
