"""Activation checkpointing: gradients are the same numbers, and less is kept."""

import pytest
import torch
from runs import TINY

from hydra_scale.bench.training import random_batch
from hydra_scale.config import ParallelConfig
from hydra_scale.config_file import load_config
from hydra_scale.model import build
from hydra_scale.model.build import build_model
from hydra_scale.topology import joined

VOCAB_SIZE = 256


def kept_and_gradients(kind: str, every: int, together: int = 1) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes of activations alive after the forward pass, and the gradients."""
    recompute = {"kind": kind, "every": every, "together": together}
    settings = [f"training.recompute.{name}={value}" for name, value in recompute.items()]
    config = load_config(TINY, [*settings, "model.layer_pattern=HHAM", "model.num_layers=4", "model.dropout=0.2",
                                "model.attention.num_heads=4"])  # fmt: skip
    with joined(ParallelConfig()):
        model = build_model(config, VOCAB_SIZE, torch.device("cpu"))
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.train()(random_batch(VOCAB_SIZE, 2, 150)).loss
        loss.backward()
    return sum(kept.values()), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "every", "together"),
    [("full", 1, 1), ("full", 2, 1), ("full", 1, 3), ("selective", 1, 1), ("selective", 3, 2)],
)
def test_same_gradients(kind: str, every: int, together: int) -> None:
    _, expected = kept_and_gradients("none", 1)
    _, found = kept_and_gradients(kind, every, together)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_less_is_kept() -> None:
    """Of four layers: all, every second one's, and none but the inputs."""
    none, half, full = (kept_and_gradients(kind, every)[0] for kind, every in (("none", 1), ("full", 2), ("full", 1)))
    assert full < 0.35 * none
    assert 0.3 * none < half < 0.8 * none


def test_one_input_for_layers_together() -> None:
    """Four inputs of 300 tokens, 64 channels and 4 bytes are kept, or one."""
    assert kept_and_gradients("full", 1, 1)[0] - kept_and_gradients("full", 1, 4)[0] == 3 * 300 * 64 * 4


def test_positions_scored_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, expected = kept_and_gradients("none", 1)
    monkeypatch.setattr(build, "_TOKENS_SCORED_AT_ONCE", 50)  # the micro batch may have 512 tokens: 11 blocks
    kept, found = kept_and_gradients("none", 1)
    assert whole - kept > 90 * VOCAB_SIZE * 4  # of 90 masked positions no scores
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-6) for name in expected)
