"""Plans against arithmetic, against what autograd keeps, and against what was measured on a GPU."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from alone import job_of_one
from rich.console import Console

from hydra_scale.config import Config
from hydra_scale.config_file import load_config
from hydra_scale.errors import ConfigError
from hydra_scale.model.masked_lm import MaskedLanguageModel
from hydra_scale.plan.communication import communication, context_bytes
from hydra_scale.plan.layout import Layout
from hydra_scale.plan.memory import memory
from hydra_scale.plan.parameters import rank_parameters
from hydra_scale.plan.report import as_json, parse_bytes, print_table
from hydra_scale.plan.search import Plan, plan
from hydra_scale.plan.speed import Cluster, step_seconds
from hydra_scale.topology import WHOLE, check_layout

LARGE = Path(__file__).parents[3] / "configs" / "hydra-large.yaml"
GB = 1e9
SHARED_INPUTS = "training.recompute.kind=full training.recompute.together=7"
LAYER = 2 * 1024 + 2 * (4 * 1024 + 4 * 64 + 2 * 32) + 2 * 2 * 2048 + 4 * 1024 + 2 * 2 * 2048 * 64 / 2048
"""Bytes a token, d_model 1024 in bf16: the layer's input, the projection, what scan and norm gave, the fp32 sum, and
every 2,048 tokens the states of both scans."""
LAYER_OF_MANY = LAYER - 2 * 2 * 2048 * 64 * (1 / 2048 - 1 / 16384)
"""Where a rank has half a million tokens: those states every 16,384."""
BACKWARD = 2 * (4416 + 2 * 2304 + 2048) + 8 * 256 + 4 * 1024
"""A token in the backward pass of a layer: gradients of the projection, of the convolution and its result again, the
gradient that came; gradients of B and C twice in fp32; one of the residual stream."""


def large(*overrides: str) -> Config:
    return load_config(LARGE, ["data.seqlen=2048", *overrides])


def layout(num_gpus: int, *overrides: str) -> Layout:
    config = large(*overrides)
    check_layout(config, num_gpus)
    return Layout(config, num_gpus, 30_528)


def test_layers_that_recompute_together_keep_what_selective_keeps_alone() -> None:
    """Of seven layers in one group: seven inputs and the results of seven layers at its fullest, as without a group."""
    seven, more = ["model.num_layers=7"], "training.recompute.together=7"
    alone, together, inputs = (
        memory(layout(1, *seven, f"training.recompute.kind={kind}", *rest)).activations
        for kind, rest in (("selective", []), ("selective", [more]), ("full", [more]))
    )
    products = 7 * 2048 * 2 * ((4416 + 32) + 1024)  # bf16: projection, diagonal, output projection
    assert products < together - inputs + 1 and together == pytest.approx(alone, rel=0.05)


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "model.norm=rmsnorm model.norm_position=pre model.mixer.ngroups=4 model.mixer.bias=true",
        "model.mixer.learnable_init_states=true model.mixer.conv_bias=false model.mixer.expand=1",
        "model.layer_pattern=HAM model.attention.num_heads=4 model.position_embedding=learned model.max_positions=2048",
    ],
)
def test_parameters_are_those_of_the_model(overrides: str) -> None:
    config = large("model.d_model=128", "model.num_layers=5", *overrides.split())
    with job_of_one(), torch.device("meta"):
        model = MaskedLanguageModel(config.model, 640)
    found = sum(parameter.numel() for parameter in model.parameters())
    assert rank_parameters(config.model, 640, 1, WHOLE) == found


def test_speed_of_the_measured_run() -> None:
    """334M on one H200, a step of 8 sequences, 151,500 tokens/s (docs/performance.md)."""
    measured = layout(1, "training.global_batch_size=8", "training.micro_batch_size=8")
    assert measured.step_tokens / step_seconds(measured, Cluster()) == pytest.approx(151_500, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        ("training.micro_batch_size=8 data.packing=true", 24.46e9),
        ("training.micro_batch_size=1 data.packing=true data.seqlen=65536", 79.13e9),
        (
            "training.micro_batch_size=1 data.packing=true data.seqlen=131072"
            " training.recompute.kind=full training.recompute.every=9",
            138.5e9,
        ),
        (f"training.micro_batch_size=1 data.seqlen=524288 {SHARED_INPUTS}", 68.08e9),
    ],
)
def test_memory_of_measured_runs(settings: str, measured: float) -> None:
    """docs/parallelism.md: peaks of the 334M model on one GPU, bf16, the first three with this version."""
    overrides = settings.split()
    size = overrides[0].replace("micro", "global")
    assert memory(layout(1, size, *overrides)).peak == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        ("training.micro_batch_size=8 training.global_batch_size=16", 22.98e9),
        ("parallel.tensor=2 parallel.sequence=true training.micro_batch_size=16"
         " training.global_batch_size=16", 29.08e9),
        ("parallel.context=2 data.seqlen=65536 training.micro_batch_size=1 training.global_batch_size=1", 41.18e9),
        ("parallel.context=2 data.seqlen=1048576 training.micro_batch_size=1 training.global_batch_size=1"
         f" {SHARED_INPUTS}", 66.09e9),
        ("parallel.context=2 parallel.exchange=heads data.seqlen=65536 training.micro_batch_size=1"
         " training.global_batch_size=1", 58.58e9),
    ],
)  # fmt: skip
def test_memory_of_measured_runs_on_two_gpus(settings: str, measured: float) -> None:
    """docs/parallelism.md and docs/scaling.md: peaks of the 334M model on two H100, the last on two H200, bf16."""
    assert memory(layout(2, *settings.split())).peak == pytest.approx(measured, rel=0.1)


def test_memory_by_arithmetic() -> None:
    """334,175,264 parameters in fp32 over 8 data ranks; full recomputation keeps 45 inputs, a layer and the head."""
    common = ("training.micro_batch_size=8", "training.global_batch_size=64")
    count = 334_175_264
    first, second, third = (memory(layout(8, *common, f"zero.stage={stage}")) for stage in (1, 2, 3))
    assert (first.weights, first.gradients, first.optimizer) == (4 * count, 4 * count, count)
    assert (second.weights, second.gradients, second.optimizer) == (4 * count, count // 2, count)
    assert (third.weights, third.gradients, third.optimizer) == (count // 2, count // 2, 12 * count // 8)
    assert third.buffers - second.buffers == 4 * count  # gathered weights
    assert memory(layout(8, *common, "zero.offload=true")).optimizer == 0

    tokens, width = 8 * 2048, 1024
    full = memory(layout(8, *common, "training.recompute.kind=full"))
    inputs, embedding = 45 * 4 * tokens * width, 2.25 * 4 * tokens * width
    backward = max(tokens * BACKWARD + full.states, 4 * round(0.3 * tokens) * 30_528)  # of a layer, or of the scores
    assert full.activations + full.states == pytest.approx(inputs + embedding + tokens * LAYER + backward, rel=1e-6)
    copies = memory(layout(8, *common, "data.packing=true")).weights - first.weights
    assert copies == 2 * 45 * 1024 * (4096 + 4 * 64 + 2 * 32 + 2048)
    halved = memory(layout(8, *common, "training.recompute.kind=full", "training.recompute.every=2"))
    assert halved.activations - full.activations == pytest.approx(22 * tokens * (LAYER - 4 * width), rel=1e-6)


def test_micro_batches_on_their_way_in_a_pipeline() -> None:
    """1F1B: the first of four stages holds four micro batches of a quarter of the layers; of two, only two."""

    def kept(*overrides: str) -> int:
        found = memory(layout(4, "parallel.pipeline=4", "training.micro_batch_size=1", *overrides))
        return found.activations

    four, two = kept("training.global_batch_size=4"), kept("training.global_batch_size=2")
    assert kept("training.global_batch_size=64") == four
    embedding, backward = 2.25 * 4 * 2048 * 1024, 2048 * BACKWARD
    assert four == pytest.approx(4 * (11 * 2048 * LAYER + embedding) + backward, rel=1e-6)
    assert two == pytest.approx(2 * (11 * 2048 * LAYER + embedding) + backward, rel=1e-6)


def test_a_million_tokens_on_two_gpus() -> None:
    """Trained on two H100 of 80 GB with these settings (docs/parallelism.md): inputs of six groups, and of seven layers
    of one; the states at the borders of 64 tokens and their gradients, both directions."""
    options = (
        "data.seqlen=1048576",
        "training.micro_batch_size=1",
        "training.global_batch_size=1",
        "parallel.context=2",
    )
    found = memory(layout(2, *options, *SHARED_INPUTS.split()))
    tokens, width = 524_288, 1024
    inputs, embedding = (6 + 6) * 4 * tokens * width, 2.25 * 4 * tokens * width
    assert found.activations == pytest.approx(inputs + embedding + tokens * (LAYER_OF_MANY + BACKWARD), rel=1e-6)
    assert found.states == 4 * 2 * tokens // 64 * 2048 * 64
    assert found.peak < 80e9
    assert memory(layout(2, *options, "training.recompute.kind=full")).peak > 80e9


def test_bytes_of_context_parallelism_do_not_grow_with_the_sequence() -> None:
    """docs/parallelism.md at d_model 1024: S = 131,072, 32 heads, one group of 64; 3 rows from a neighbour, in bf16."""
    rows = 3 * 2 * (2 * 2048 + 4 * 64 + 2 * 32)
    for seqlen in (2048, 1_048_576):
        options = (f"data.seqlen={seqlen}", "training.micro_batch_size=1", "training.global_batch_size=8")
        for exchange, ranks, expected in (
            ("gather", 2, 8 * 131_072 + 8 * 32 + 8 * 64 + rows),
            ("gather", 4, 3 * (8 * 131_072 + 8 * 32 + 8 * 64) + 2 * rows),
            ("neighbour", 4, 2 * (4 * 131_072 + 4 * 64) + 2 * rows),
        ):
            found = layout(ranks, f"parallel.context={ranks}", f"parallel.exchange={exchange}", *options)
            assert context_bytes(found, "H") == expected
            assert communication(found).context == 45 * 2 * 8 * expected


def test_bytes_of_gradients_and_weights() -> None:
    """4 bytes a parameter and collective, of which a rank of 8 sends 7 / 8; 64 sequences are 8 micro batches of one."""
    options = ("training.micro_batch_size=1", "training.global_batch_size=64")
    for stage, collectives in ((1, 1 + 1), (2, 8 + 1), (3, 8 + 16)):
        found = communication(layout(8, *options, f"zero.stage={stage}"))
        assert found.data == pytest.approx(collectives * 4 * 334_175_264 * 7 / 8)
        assert (found.context, found.tensor, found.pipeline) == (0, 0, 0)


def test_waiting_in_a_pipeline() -> None:
    """(p - 1) / (v m) of a stage's time, so 4 micro batches take 7, and 5.5 interleaved, instead of 4."""
    options = ("training.micro_batch_size=8", "parallel.pipeline=4", "model.num_layers=48")
    seconds = {
        (size, interleave): step_seconds(
            layout(4, *options, f"training.global_batch_size={size}", f"parallel.interleave={interleave}"), Cluster()
        )
        for size in (32, 3200)
        for interleave in (1, 2)
    }
    one = seconds[3200, 1] / 403
    assert seconds[32, 1] == pytest.approx(7 * one, rel=0.01)
    assert seconds[32, 2] == pytest.approx(5.5 * one, rel=0.03)


@pytest.fixture(scope="module")
def of_eight() -> list[Plan]:
    return plan(large("training.global_batch_size=256"), 8, 80 * GB, Cluster())


def test_what_is_listed_can_run_and_fits_best_first(of_eight: list[Plan]) -> None:
    for each in of_eight:
        check_layout(each.layout.config, 8)
        assert each.memory.peak <= 0.9 * 80 * GB
    assert all(faster.tokens_per_second >= slower.tokens_per_second for faster, slower in pairwise(of_eight))
    best = of_eight[0].settings
    assert (best["parallel.tensor"], best["parallel.pipeline"], best["training.recompute.kind"]) == (1, 1, "none")
    degrees = {(each.settings["parallel.tensor"], each.settings["parallel.pipeline"]) for each in of_eight}
    assert {(1, 1), (2, 2), (8, 1), (1, 8)} <= degrees


def test_less_memory_leaves_less_to_choose(of_eight: list[Plan]) -> None:
    small = plan(large("training.global_batch_size=256"), 8, 8 * GB, Cluster())
    assert 0 < len(small) <= len(of_eight)
    assert small[0].tokens_per_second < of_eight[0].tokens_per_second
    with pytest.raises(ConfigError, match=r"--gpu-memory is 0.5 GB, .* no layout of 8 GPUs fits; the smallest needs"):
        plan(large("training.global_batch_size=256"), 8, 0.5 * GB, Cluster())


def test_a_million_tokens_and_thousands_of_gpus() -> None:
    best = plan(large("data.seqlen=1048576", "training.global_batch_size=32"), 512, 80 * GB, Cluster())[0]
    assert best.settings["parallel.context"] > 1
    assert best.layout.step_tokens == 32 * 1_048_576
    assert plan(large("training.global_batch_size=4096"), 4096, 80 * GB, Cluster())


def test_refused() -> None:
    with pytest.raises(ConfigError, match="--gpus 49: no layout divides model.num_layers 45"):
        plan(large("training.global_batch_size=5", "data.seqlen=4"), 49, 80 * GB, Cluster())
    with pytest.raises(ConfigError, match="model.vocab_size is absent: pretrain takes it from the tokenizer"):
        plan(large("model.vocab_size=null"), 8, 80 * GB, Cluster())


def test_report(of_eight: list[Plan]) -> None:
    rows = json.loads(as_json(of_eight[:2]))
    assert rows[0]["settings"] == of_eight[0].settings
    assert rows[0]["memory_bytes"]["weights"] == 4 * 334_175_264
    assert set(rows[0]["communication_bytes_per_step"]) == {"data", "context", "tensor", "pipeline"}
    console = Console(width=200, record=True)
    print_table(of_eight[:2], console)
    last_line = console.export_text().splitlines()[-1]
    chosen = large("training.global_batch_size=256", *last_line.removeprefix("best: ").split())
    assert chosen == of_eight[0].layout.config


@pytest.mark.parametrize(("text", "found"), [("80GB", 80e9), ("79.5 GiB", 79.5 * 2**30), ("1000", 1000), ("1tb", 1e12)])
def test_sizes(text: str, found: float) -> None:
    assert parse_bytes(text) == found


def test_sizes_that_are_none() -> None:
    with pytest.raises(ConfigError, match="--gpu-memory: found 'much', expected a number and a unit"):
        parse_bytes("much")
