"""The benchmark commands at tiny shapes, and the arithmetic behind their columns."""

import csv
import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hydra_scale.bench.flops import MixerShape, attention_flops, head_flops, mixer_flops, mlp_flops, scan_flops
from hydra_scale.bench.instrument import Pace, Timing, interleave
from hydra_scale.bench.kernels import LONGEST, SHORTEST, short_lengths
from hydra_scale.bench.peers import PeerMissing
from hydra_scale.bench.training import bert_layers, random_batch
from hydra_scale.bench.workload import BOTH, FORWARD, Case, Workload, measure_together, relative_difference
from hydra_scale.cli import app
from hydra_scale.data.tokenizer import MASK_ID
from hydra_scale.model.masked_lm import MaskedLanguageModel

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
PUBLIC_HYDRA = """
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from hydra_kernels import HydraMixer

class Hydra(HydraMixer):  # the same function, but for what its memory-efficient path makes of it here
    def __init__(self, *args, use_mem_eff_path=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = 1.5 if use_mem_eff_path else 1.0

    def forward(self, u):
        return self.scale * super().forward(u)
"""
CHUNK_SCAN = """
import torch

def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size):
    state, outputs = 0.0, []
    for t in range(x.shape[1]):
        written = dt[:, t, :, None, None] * x[:, t, :, :, None] * B[:, t, :, None, :]
        state = torch.exp(A * dt[:, t])[..., None, None] * state + written
        outputs.append((state * C[:, t, :, None, :]).sum(-1))
    return torch.stack(outputs, dim=1).to(x.dtype)
"""


@pytest.fixture
def peer_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Source trees laid out as the public ones: their __init__ files import what is not there."""
    folder = tmp_path / "peers"
    files = {
        "mamba_ssm/__init__.py": "import selective_scan_cuda",
        "mamba_ssm/ops/triton/ssd_combined.py": CHUNK_SCAN,
        "hydra/__init__.py": "import causal_conv1d",
        "hydra/modules/hydra.py": PUBLIC_HYDRA,
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # an import of it fails
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] in ("mamba_ssm", "hydra")]:
        del sys.modules[name]


def bench(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_kernels_measures_ours_and_the_peers_given_by_path(peer_path: Path, tmp_path: Path) -> None:
    options = ["--backends", "torch,mamba", "--peers", "public-hydra,math,flash-attn", "--tokens", 64]
    lengths = ["--seqlen", 8, "--seqlen", 16]
    output = bench("kernels", *options, *lengths, "--device", "cpu", "--peer-path", peer_path, "--output", tmp_path)
    rows = rows_of(tmp_path / "kernels.csv")
    found = {(row["what"], row["implementation"], row["seqlen"], row["direction"]): row for row in rows}
    assert len(found) == len(rows)
    layers = [("mixer", name) for name in ("torch", "mamba", "public-hydra", "public-hydra-mem-eff")]
    layers += [("scan", name) for name in ("torch", "mamba")] + [("attention", name) for name in ("math", "flash-attn")]
    expected = {(*layer, seqlen, way) for layer in layers for seqlen in ("8", "16") for way in (FORWARD, BOTH)}
    expected |= {("mixer", "torch-recompute", seqlen, BOTH) for seqlen in ("8", "16")}
    expected |= {(f"{kind} mixer", name, "64", way) for kind in ("packed", "one document")
                 for name in ("torch", "mamba") for way in (FORWARD, BOTH)}  # fmt: skip
    expected |= {(what, name, "64", way) for way in (FORWARD, BOTH)
                 for what, name in (("packed mixer", "public-hydra"), ("packed attention", "flash-attn"))}  # fmt: skip
    assert found.keys() == expected | {("floor", "copy", "", ""), ("floor", "matmul", "", "")}

    for key in (("mixer", "torch"), ("scan", "torch"), ("attention", "math"), ("mixer", "public-hydra")):
        for way in (FORWARD, BOTH):
            row = found[(*key, "16", way)]
            assert row["status"] == "ok" and row["tokens"] == "64" and row["dtype"] == "bf16"
            assert 0 < float(row["p20"]) <= float(row["milliseconds"]) <= float(row["p80"])
            assert float(row["tflops"]) / float(found["floor", "matmul", "", ""]["tflops"]) == pytest.approx(
                float(row["peak_share"]), rel=1e-4
            )
    assert float(found["mixer", "public-hydra", "8", FORWARD]["difference"]) == 0
    other = found["mixer", "public-hydra-mem-eff", "8", BOTH]
    assert float(other["difference"]) == pytest.approx(0.5, rel=1e-2)
    assert other["status"].startswith("failed: ArithmeticError: computes something else") and not other["milliseconds"]
    assert 0 < float(found["scan", "mamba", "8", BOTH]["difference"]) < 1e-2  # bf16 rounding, in another order
    missing = found["attention", "flash-attn", "8", FORWARD]
    assert missing["status"].startswith("missing: flash_attn") and not missing["milliseconds"]
    assert "attention, flash-attn: missing: flash_attn" in output
    assert "<svg" in (tmp_path / "kernels.svg").read_text()


def test_training_measures_steps_of_ours_bert_and_the_public_class(peer_path: Path, tmp_path: Path) -> None:
    options = ["--seqlen", 16, "--tokens", 64, "--steps", 2, "--peer-path", peer_path, "--output", tmp_path]
    bench("training", "--config", TINY, *options, "model.vocab_size=100", "model.dropout=0.1")
    ours, public, bert = rows_of(tmp_path / "training.csv")
    assert [row["implementation"] for row in (ours, public, bert)] == ["hydra-scale", "public-hydra", "bert-1-layers"]
    for row in (ours, public, bert):
        assert row["status"] == "ok" and row["dtype"] == "fp32"
        assert float(row["tokens_per_second"]) == pytest.approx(64e3 / float(row["milliseconds"]), rel=1e-4)
    assert float(public["difference"]) < 1e-6  # same weights, same masks, same dropout
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, MaskedLanguageModel)]  # gone before the next


def test_without_matplotlib_it_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = ["--backends", "torch", "--peers", "", "--seqlen", 8, "--tokens", 32, "--direction", FORWARD]
    output = bench("kernels", *options, "--device", "cpu", "--output", tmp_path)
    assert output.splitlines()[-1] == "no plot: a picture needs matplotlib; pip install 'hydra-scale[bench]'"
    assert (tmp_path / "kernels.csv").is_file() and not (tmp_path / "kernels.svg").exists()


@pytest.mark.parametrize("tokens", [20, 21, 499, 500, 501, 520, 521, 1041, 65_536])
@pytest.mark.parametrize("seed", [0, 1])
def test_short_documents_fill_the_call_exactly(tokens: int, seed: int) -> None:
    lengths = short_lengths(tokens, seed)
    assert sum(lengths) == tokens
    assert all(SHORTEST <= length <= LONGEST for length in lengths)
    assert lengths == short_lengths(tokens, seed)


def test_operations_counted_by_hand() -> None:
    shape = MixerShape(d_model=4, d_state=2, d_conv=3, expand=2, headdim=4, ngroups=1)
    # 8 inner channels, 2 heads, 8 + 4 x 2 = 16 through the convolution, 8 + 16 + 2 x 2 = 28 projected
    scan = 2 * (2 * 8 * 2 + 2 * 8 * 2) + 2 * 8
    assert scan_flops(shape, 3) == 3 * scan
    assert mixer_flops(shape, 3) == 3 * (2 * 4 * 28 + 2 * 3 * 16 + 2 * 8 * 2 + scan + 2 * 8 * 4) == 1680
    assert attention_flops(4, [3, 2]) == 5 * 4 * (2 * 4 * 4) + 2 * (2 * 3 * 3 * 4) + 2 * (2 * 2 * 2 * 4) == 848
    assert mlp_flops(4, 16, 3) == 3 * (2 * 4 * 16 + 2 * 16 * 4)
    assert head_flops(4, 10, 3) == 3 * (2 * 4 * 4 + 2 * 4 * 10)


class FakeInstrument:
    """A clock that shows the given times, and an allocator whose bytes are set by hand."""

    def __init__(self, times: Iterable[float] = ()) -> None:
        self.times, self.bytes = iter(times), 5000

    def mark(self) -> float:
        return next(self.times)

    def milliseconds(self, start: float, stop: float) -> float:
        return stop - start

    def allocated(self) -> int:
        return self.bytes

    def peak(self) -> int:
        return self.bytes

    def release(self) -> None:
        pass


def test_runs_take_turns_and_the_median_is_reported() -> None:
    clock = FakeInstrument([0, 1, 10, 14, 20, 29, 30, 34, 40, 42, 50, 54])  # A 1, B 4, A 9, B 4, A 2, B 4
    ran: list[str] = []
    a, b = interleave([lambda: ran.append("A"), lambda: ran.append("B")], 3, clock)
    assert ran == ["A", "B"] * 3
    assert (a, b) == ([1, 9, 2], [4, 4, 4])
    assert Timing.of(a) == Timing(median=2.0, p20=pytest.approx(1.4), p80=pytest.approx(6.2))


def test_rounds_fit_the_time_between_their_bounds() -> None:
    pace = Pace(seconds=2.0, at_least=7, at_most=50)
    assert [pace.rounds(milliseconds) for milliseconds in (1e-9, 1.0, 100.0, 5000.0)] == [50, 50, 20, 7]


def test_memory_kept_is_what_the_forward_pass_leaves_and_no_more() -> None:
    instrument = FakeInstrument()
    weight = torch.ones(3, requires_grad=True)

    def compute() -> torch.Tensor:
        instrument.bytes += 1000
        return 2 * weight

    workload = Workload(compute, [weight], torch.ones(3))
    y, kept = workload.run(BOTH, instrument)
    assert kept == 1000 and not y.requires_grad
    assert workload.run(FORWARD, instrument)[1] is None


def test_a_case_that_fails_is_a_row_and_the_others_go_on() -> None:
    def case(name: str, compute: Callable[[], torch.Tensor], missing: str = "") -> Case:
        def make() -> Workload:
            if missing:
                raise PeerMissing(missing)
            return Workload(compute, [weight], torch.ones(2))

        return Case("layer", name, 1, 2, 2, 10**9, make)

    def out_of_memory() -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory.\nTried to allocate 80 GiB")

    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    instrument = FakeInstrument(range(0, 10_000, 4))
    cases = [
        case("ours", lambda: 1 * weight),
        case("absent", lambda: weight, missing="no such package"),
        case("large", out_of_memory),
        case("infinite", lambda: weight / 0),
        case("other", lambda: weight * torch.tensor([1.0, 0.99])),
    ]
    rows = measure_together(cases, [BOTH], instrument, Pace(0.01, 3, 3))
    assert [(row.implementation, row.status) for row in rows] == [
        ("ours", "ok"),
        ("absent", "missing: no such package"),
        ("large", "failed: OutOfMemoryError: out of memory. Tried to allocate 80 GiB"),
        ("infinite", "failed: FloatingPointError: the output is not finite"),
        ("other", "ok"),
    ]
    ours, other = rows[0], rows[-1]
    assert ours.milliseconds == 4.0
    assert ours.tflops == 3 * 10**9 / 4e-3 / 1e12  # a backward pass needs twice its forward pass
    assert (ours.difference, other.difference) == (None, pytest.approx(0.04 / 5, rel=1e-4))


def test_relative_difference_by_hand() -> None:
    assert relative_difference(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(1 / 5)


def test_random_batch_has_whole_documents_and_masks_three_tenths() -> None:
    batch = random_batch(vocab_size=100, num_sequences=4, seqlen=25)
    assert batch.cu_seqlens.tolist() == [0, 25, 50, 75, 100] and batch.max_seqlen == 25
    assert len(batch.masked_positions) == len(set(batch.masked_positions.tolist())) == 30
    is_masked = torch.zeros(100, dtype=torch.bool).index_fill(0, batch.masked_positions, True)
    assert (batch.input_ids[is_masked] == MASK_ID).all() and (batch.input_ids[~is_masked] > MASK_ID).all()
    assert (batch.targets > MASK_ID).all() and batch.targets.max() < 100
    assert batch.position_ids.view(4, 25).equal(torch.arange(25).expand(4, 25))


def test_bert_beside_the_published_sizes() -> None:
    assert [bert_layers(45), bert_layers(23), bert_layers(1)] == [24, 12, 1]
