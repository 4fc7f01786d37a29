"""Activation checkpointing: gradients are the same numbers, and less is kept."""

import pytest
import torch
from runs import TINY

from hydra_scale.bench.training import random_batch
from hydra_scale.config import ParallelConfig
from hydra_scale.config_file import load_config
from hydra_scale.model.build import build_model
from hydra_scale.topology import joined

VOCAB_SIZE = 256


def kept_and_gradients(kind: str, every: int) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes of activations alive after the forward pass, and the gradients."""
    recompute = [f"training.recompute.kind={kind}", f"training.recompute.every={every}"]
    config = load_config(TINY, [*recompute, "model.layer_pattern=HHAM", "model.num_layers=4", "model.dropout=0.2",
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


@pytest.mark.parametrize(("kind", "every"), [("full", 1), ("full", 2), ("selective", 1), ("selective", 3)])
def test_same_gradients(kind: str, every: int) -> None:
    _, expected = kept_and_gradients("none", 1)
    _, found = kept_and_gradients(kind, every)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_less_is_kept() -> None:
    """Of four layers: all, every second one's, and none but the inputs."""
    none, half, full = (kept_and_gradients(kind, every)[0] for kind, every in (("none", 1), ("full", 2), ("full", 1)))
    assert full < 0.35 * none
    assert 0.3 * none < half < 0.8 * none
