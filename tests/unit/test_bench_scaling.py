"""What a scaling run measures, what it does not measure again, and what its page says."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from typer.testing import CliRunner

from hydra_scale.bench import scaling
from hydra_scale.bench.scaling import Host, run, usual_counts, usual_sections
from hydra_scale.bench.scaling_plan import COUNTS, LONG, SECTIONS, Trial, Wanted, trials
from hydra_scale.bench.scaling_report import write_page
from hydra_scale.bench.scaling_result import Result, Results, compared, prediction, result_of
from hydra_scale.bench.table import Row
from hydra_scale.bench.trace import COLLECTIVES, OTHER, PRODUCTS, SCANS, covered, kind_of, split_of
from hydra_scale.bench.training import numbered_batch
from hydra_scale.cli import app
from hydra_scale.config import ParallelConfig
from hydra_scale.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
LARGE, XL, TINY = (CONFIGS / f"{name}.yaml" for name in ("hydra-large", "hydra-xl", "tiny"))
TWO_GPUS = Host(torch.device("cuda"), "NVIDIA H200", 2, 140 * 2**30, "c0de")


def wanted(**changes: Any) -> Wanted:
    given: dict[str, Any] = {
        "configs": [LARGE], "overrides": ["data.train=unused"], "processes": COUNTS, "sections": SECTIONS,
        "layouts": [], "tokens": 32_768, "seqlen": 2048, "long": LONG, "steps": 10,
    }  # fmt: skip
    return Wanted(**(given | changes))


def degrees(trial: Trial) -> tuple[int, ...]:
    parallel: ParallelConfig = trial.resolved.parallel
    return parallel.pipeline, parallel.tensor, parallel.context


def test_eight_processes_are_used_in_all_ways_that_have_goals() -> None:
    chosen = [trial for trial in trials(wanted(processes=[8])) if trial.processes == 8]
    zero = [trial.resolved.zero.stage for trial in chosen if trial.section == "data"]
    assert zero == [1, 2, 3] and all(degrees(trial) == (1, 1, 1) for trial in chosen if trial.section == "data")
    context = [trial for trial in chosen if trial.section == "context"]
    assert [trial.resolved.parallel.exchange for trial in context] == ["gather", "neighbour", "heads"]
    assert {(degrees(trial), trial.seqlen) for trial in context} == {((1, 1, 8), 8 * 32_768)}
    assert [degrees(trial) for trial in chosen if trial.section == "mixed"] == [(1, 2, 2), (2, 2, 1)]
    long = [(trial.seqlen, trial.resolved.parallel.exchange) for trial in chosen if trial.section == "long"]
    assert long == [(n, kind) for n in (2**20, 2**22) for kind in ("gather", "neighbour", "heads")]


def test_four_processes_mix_two_degrees_and_two_take_each_alone() -> None:
    found = {n: [degrees(t) for t in trials(wanted(sections=["mixed"])) if t.processes == n] for n in (2, 4)}
    assert found[4] == [(1, 2, 2), (1, 2, 1), (2, 1, 1), (2, 2, 1)]
    assert found[2] == [(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1)]


@pytest.mark.parametrize("config", [LARGE, XL])
def test_every_process_has_as_many_tokens_as_the_one_that_it_is_compared_with(config: Path) -> None:
    """And mixed layouts the same global batch, document by document."""
    seen: list[Trial] = []
    for trial in trials(wanted(configs=[config])):
        if trial.alone is None:
            assert trial.processes == 1
        elif trial.section == "mixed":
            assert (trial.tokens, trial.seqlen) == (trial.alone.tokens, trial.alone.seqlen)
            assert trial.tokens == trial.processes * 32_768
        else:
            assert trial.tokens == trial.processes * trial.alone.tokens
        assert trial.alone is None or trial.alone in seen
        seen.append(trial)
    assert len(seen) == len(set(seen))


def test_layouts_of_the_user_stand_in_place_of_sections(tmp_path: Path) -> None:
    given = wanted(layouts=["parallel.context=2", "zero.stage=3"], processes=[2], is_compared=False)
    first, second = trials(given)
    assert (first.section, first.seqlen, first.documents) == ("layout", 65_536, 1)
    assert (second.seqlen, second.documents, second.resolved.zero.stage) == (2048, 16, 3)
    options = ["--layout", "parallel.tensor=3", "--output", str(tmp_path), "data.train=unused"]
    failed = CliRunner().invoke(app, ["bench", "scaling", "--config", str(TINY), *options])
    assert isinstance(failed.exception, ConfigError) and "parallel.tensor is 3" in str(failed.exception)


def test_documents_do_not_depend_on_how_they_are_divided() -> None:
    whole = numbered_batch(100, 0, 6, 20)
    parts = [numbered_batch(100, first, count, 20) for first, count in ((0, 1), (1, 3), (4, 2))]
    for name in ("input_ids", "targets", "token_keys", "position_ids", "documents"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    assert torch.equal(whole.token_keys, torch.arange(120))
    assert torch.equal(whole.cu_seqlens, torch.arange(0, 121, 20))
    shifts = (0, 20, 80)
    masked = [part.masked_positions + shift for part, shift in zip(parts, shifts, strict=True)]
    assert torch.equal(torch.cat(masked), whole.masked_positions)
    assert not torch.equal(whole.input_ids[:20], whole.input_ids[20:40])


def test_a_host_refuses_what_does_not_fit_and_says_why() -> None:
    chosen = {(t.section, t.processes, t.kind, t.seqlen): t for t in trials(wanted())}
    assert TWO_GPUS.refusal(chosen["data", 2, "ZeRO 1", 2048]) is None
    for count in (4, 8):
        reason = str(TWO_GPUS.refusal(chosen["data", count, "ZeRO 1", 2048]))
        assert f"{count} processes need as many GPUs, this host has 2" in reason
    assert TWO_GPUS.refusal(chosen["long", 2, "gather", 2**20]) is None  # trained on two H100 of 80 GB
    assert "predicts a peak of" in str(TWO_GPUS.refusal(chosen["long", 2, "gather", 2**22]))
    stages = trials(wanted(configs=[TINY], sections=["model"], processes=[8]))
    refused = [Host(torch.device("cpu"), "", 0, 2**40, "").refusal(trial) or "" for trial in stages]
    assert ["8 chunks of the 2 layers" in text for text in refused] == [False, True, False, False]


def test_usual_counts_are_those_of_the_host() -> None:
    gpus = {n: Host(torch.device("cuda"), "", n, 2**37, "") for n in (1, 2, 6, 8)}
    assert {n: usual_counts(host) for n, host in gpus.items()} == {1: [2], 2: [2], 6: [2, 4], 8: [2, 4, 8]}
    cpu = Host(torch.device("cpu"), "", 0, 2**34, "")
    assert usual_counts(cpu) == [2] and "long" not in usual_sections(cpu) and usual_sections(gpus[2]) == list(SECTIONS)


class Measuring:
    """In place of starting processes: what was asked for, and results as if it had been measured."""

    def __init__(self, speed: float = 1e5, status: str = "ok") -> None:
        self.asked: list[str] = []
        self.speed, self.status = speed, status

    def __call__(self, trial: Trial, origin: Mapping[str, str]) -> Result:
        self.asked.append(trial.name)
        if self.status != "ok":
            return result_of(trial, origin, self.status)
        return result_of(trial, origin, "ok", found(trial, self.speed * trial.processes))


def found(trial: Trial, speed: float, **changes: Any) -> dict[str, Any]:
    """As a rank reports, at so many tokens a second."""
    split = {"step": 10.0, "products": 4.0, "scans": 3.0, "other": 1.0, "collectives": 1.5, "hidden": 0.5, "idle": 1.0}
    values = {"d_model": 1024, "tokens": trial.tokens, "milliseconds": 3 * [1e3 * trial.tokens / speed],
              "peak_gib": 39.0, "loss": 10.5, "grad_norm": 2.5, "split": split}  # fmt: skip
    return values | changes


def rows_of(chosen: list[Trial], path: Path, host: Host = TWO_GPUS, **options: Any) -> list[Row]:
    return [row for group in run(chosen, Results(path), host, **options) for row in group]


def test_a_run_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, chosen = tmp_path / "scaling.jsonl", trials(wanted(processes=[2], sections=["data"]))
    names = [trial.name for trial in chosen]
    measuring = Measuring()
    monkeypatch.setattr(scaling, "measured", measuring)
    groups = run(chosen, Results(path), TWO_GPUS)
    assert [next(groups)[0].implementation for _ in range(2)] == names[:2]  # and then it was killed
    with path.open("a") as file:
        file.write('{"key": "abc", "sta')
    rows = rows_of(chosen, path)
    assert [row.implementation for row in rows] == measuring.asked == names
    assert [row.efficiency for row in rows[1:]] == pytest.approx([1.0, 1.0, 1.0])
    rows_of(chosen, path)
    assert measuring.asked == names
    rows_of(chosen, path, again=True)
    assert measuring.asked == 2 * names
    rows_of(chosen, path, Host(torch.device("cuda"), "NVIDIA H200", 2, 140 * 2**30, "other code"))
    assert measuring.asked == 3 * names
    late = rows_of(trials(wanted(processes=[2], sections=["data"], steps=7)), path, seconds=-1.0)
    assert {row.status.split(";")[0] for row in late} == {"missing: no time was left"}


@pytest.mark.parametrize(("status", "is_tried_again"), [("failed: out of memory", False), ("failed: no word", True)])
def test_failures_are_tried_again_unless_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, is_tried_again: bool
) -> None:
    path, chosen = tmp_path / "scaling.jsonl", trials(wanted(processes=[2], sections=["data"]))[1:2]
    measuring = Measuring(status=status)
    monkeypatch.setattr(scaling, "measured", measuring)
    for _ in range(2):
        (row,) = rows_of(chosen, path)
        assert row.status == status and row.milliseconds is None
    assert len(measuring.asked) == (2 if is_tried_again else 1)


def test_a_file_of_something_else_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "scaling.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"scaling.jsonl:1: expected a result of bench scaling"):
        Results(tmp_path / "scaling.jsonl")


def test_predictions_are_those_of_the_plan_command() -> None:
    """Of the same layout in the list of `hydra-scale plan`; two H200 held 38.6 GiB (docs/scaling.md)."""
    (trial,) = trials(wanted(layouts=["parallel.context=2"], processes=[2], is_compared=False))
    settings = ["data.train=unused", "data.packing=true", "training.global_batch_size=1", "data.seqlen=65536"]
    options = ["--gpus", "2", "--gpu-memory", "400GB", "--limit", "400", "--json"]
    listed = CliRunner().invoke(app, ["plan", "--config", str(LARGE), *options, *settings], catch_exceptions=False)
    (same,) = [
        each
        for each in json.loads(listed.output)
        if each["settings"]["parallel.context"] == 2 and each["settings"]["zero.stage"] == 1
    ]
    assert same["settings"]["training.recompute.kind"] == "none"
    expected = prediction(trial)
    assert expected.peak_gib * 2**30 == same["memory_bytes"]["peak"]
    assert expected.tokens_per_second == pytest.approx(same["tokens_per_second"])
    assert expected.peak_gib == pytest.approx(38.6, rel=0.1)


def measured_results(path: Path, chosen: list[Trial]) -> Results:
    """One GPU at 100,000 tokens/s; two at 194,000, but ZeRO 3 at 60,000; context ranks with a loss that differs, tensor
    ranks without a trace."""
    results = Results(path)
    for trial in chosen:
        if TWO_GPUS.refusal(trial):
            continue
        speed = 1e5 if trial.processes == 1 else 6e4 if trial.kind == "ZeRO 3" else 1.94e5
        changes: dict[str, Any] = {"loss": 10.71} if trial.name == "context 2" else {}
        changes |= {"split": None} if trial.name == "tensor 2" else {}
        results.add(result_of(trial, TWO_GPUS.origin(trial), "ok", found(trial, speed, **changes)))
    return results


def test_the_page_says_what_met_its_goal_and_what_was_not_measured(tmp_path: Path) -> None:
    chosen = trials(wanted(sections=["data", "mixed", "long"], processes=[2, 8]))
    results = measured_results(tmp_path / "scaling.jsonl", chosen)
    written = write_page(tmp_path / "docs", "hydra-scale ...", chosen, results, TWO_GPUS.origin, TWO_GPUS.refusal)
    assert [path.name for path in written] == [
        "scaling.md", "scaling-efficiency.svg", "scaling-speed.svg", "scaling-predicted.svg"
    ]  # fmt: skip
    assert all(path.read_text().count("<svg") == 1 for path in written[1:])
    page = written[0].read_text()
    lines = page.splitlines()
    assert "| NVIDIA H200 |" in page and "| c0de |" in page and "```\nhydra-scale ...\n```" in page
    goal = next(line for line in lines if "at least 95% of 2 x one process" in line)
    assert "ZeRO 1 0.970, ZeRO 2 0.970, ZeRO 3 0.300" in goal and "**2 of 3**" in goal
    equal = next(line for line in lines if "loss and gradient norm of one process, bf16 1e-02" in line)
    assert "data 2 0.0e+00, context 2 2.0e-02, tensor 2 0.0e+00, pipeline 2 0.0e+00 | **3 of 4**" in equal
    zero = next(line for line in lines if "| data 2, ZeRO 3 |" in line)
    assert "| **0.300** | 39.0 |" in zero
    first = next(trial for trial in chosen if trial.name == "data 2, ZeRO 1")
    each = compared(first, results, None)
    assert each is not None and each.memory_error == pytest.approx(prediction(first).peak_gib / 39.0 - 1)
    assert each.time_error == pytest.approx(1.94e5 / prediction(first).tokens_per_second - 1)
    context = next(line for line in lines if "| context 2 |" in line and "10.71" in line)
    assert "| 10.71 | **2.0e-02** | 2.5 | 0.0e+00 |" in context
    missing = page[page.index("## Not measured") :]
    assert (
        "8 processes need as many GPUs, this host has 2" in missing
        and "- hydra-large, data: data 8, ZeRO 1; data 8, ZeRO 2;" in missing
    )
    assert "context 2, gather of 4,194,304" in missing and "predicts a peak of" in missing
    assert "layouts of 4 processes: not asked for" in missing and "- context, model: not asked for" in missing
    share = next(line for line in lines if "| data | data 2, ZeRO 1 |" in line)
    assert share.endswith("| 10 | 40.0% | 30.0% | 10.0% | 15.0% | 5.0% | 10.0% |")
    assert "these steps failed: hydra-large mixed, tensor 2." in " ".join(lines)
    assert all(len(line) <= 120 for line in lines if not line.startswith(("|", "-", "!")))


def test_a_page_of_nothing_says_so(tmp_path: Path) -> None:
    chosen = trials(wanted(sections=["data"], processes=[2]))
    write_page(tmp_path / "page.md", "c", chosen, Results(tmp_path / "none"), None, lambda trial: None)
    page = (tmp_path / "page.md").read_text()
    assert "Nothing has been measured." in page and "data 2, ZeRO 2; data 2, ZeRO 3: not yet" in page
    assert not list(tmp_path.glob("*.svg"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", PRODUCTS),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", PRODUCTS),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", PRODUCTS),
        ("aten::addmm", PRODUCTS),
        ("sweep_kernel", SCANS),
        ("steps_backward_kernel", SCANS),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", COLLECTIVES),
        ("gloo:all_reduce", COLLECTIVES),
        ("_add_norm_kernel", OTHER),
        ("_conv_backward_kernel", OTHER),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", OTHER),
        ("Memcpy HtoD (Pageable -> Device)", OTHER),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_time_of_a_step_is_divided_into_what_ran() -> None:
    """Two steps of 10 ms: product 0-4, scan 4-6, collective 5-9 of which 5-6 hidden, other 12-13."""

    def event(name: str, start: float, end: float, is_mark: bool = False) -> SimpleNamespace:
        times = SimpleNamespace(start=1e3 * start, end=1e3 * end)
        return SimpleNamespace(name=name, time_range=times, device_type=DeviceType.CUDA, is_user_annotation=is_mark)

    host = SimpleNamespace(name="cudaLaunchKernel", time_range=None, device_type=DeviceType.CPU)
    events = [
        event("gemm", 0, 4), event("sweep_kernel", 4, 6), event("ncclDevKernel_AllGather", 5, 9),
        event("nccl:all_gather", 5, 11, is_mark=True), event("_conv_kernel", 12, 13), host,
    ]  # fmt: skip
    trace: Any = SimpleNamespace(events=lambda: events)
    split = split_of(trace, [10.0, 10.0], torch.device("cuda"))
    assert (split.step, split.products, split.scans, split.other) == (10.0, 2.0, 1.0, 0.5)
    assert (split.collectives, split.hidden, split.idle) == (2.0, 0.5, 5.0)
    assert split.hidden is not None and split.idle is not None
    visible = split.collectives - split.hidden
    assert split.products + split.scans + split.other + visible + split.idle == pytest.approx(split.step)


def test_union_of_intervals() -> None:
    assert covered([(3, 4), (0, 2), (1, 2.5), (3.5, 3.7)]) == 3.5 and covered([]) == 0
