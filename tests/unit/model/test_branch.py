"""Where layers leave the residual stream: against what autograd makes of the same sum."""

import pytest
import torch
from runs import TINY

from hydra_scale.config import ParallelConfig
from hydra_scale.config_file import load_config
from hydra_scale.model.branch import branched, unbranched
from hydra_scale.model.build import build_model
from hydra_scale.model.recompute import KEEP_ALL, run_layers
from hydra_scale.model.stretch import Stretch
from hydra_scale.topology import joined


def test_both_gradients_reach_the_stream() -> None:
    x = torch.randn(5, 8, requires_grad=True)
    of_stream, of_layer = torch.randn(5, 8), torch.randn(5, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        stream, entering = branched(x)
    assert torch.equal(stream, x) and torch.equal(entering, x.to(torch.bfloat16))
    (found,) = torch.autograd.grad((stream, entering), x, (of_stream, of_layer))
    (expected,) = torch.autograd.grad((x * 1.0, x.to(torch.bfloat16)), x, (of_stream, of_layer))
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_without_autocast_it_is_the_stream_itself() -> None:
    x = torch.randn(5, 8)
    assert all(part is x for part in branched(x))


@pytest.mark.parametrize("position", ["post", "pre"])
def test_layers_read_the_stream_as_if_each_branched_off_by_itself(position: str) -> None:
    """Bit for bit, results and gradients: what a norm writes twice is what a cast of its one result would be."""
    config = load_config(TINY, [f"model.norm_position={position}", "model.layer_pattern=HM", "model.num_layers=4"])
    with joined(ParallelConfig()):
        encoder = build_model(config, 256, torch.device("cpu")).encoder
        layers, stretch = list(encoder.layers.values()), Stretch((0, 9, 21), 0, 21, torch.device("cpu"))
        x, grad = (torch.randn(21, config.model.d_model, requires_grad=True) for _ in range(2))
        leaves = [x, *(parameter for layer in layers for parameter in layer.parameters())]
        branch = branched if position == "post" else unbranched

        def one_by_one() -> torch.Tensor:
            stream = x
            for layer in layers:
                stream = layer(branch(stream), stretch).x_TD
            return stream

        with torch.autocast("cpu", torch.bfloat16):  # backward too, as megatron-core's layers want it on a CPU
            found, expected = run_layers(list(enumerate(layers)), x, stretch, KEEP_ALL, branch), one_by_one()
            ours, theirs = (torch.autograd.grad(result, leaves, grad) for result in (found, expected))
    assert torch.equal(found, expected)
    assert all(torch.equal(gradient, wanted) for gradient, wanted in zip(ours, theirs, strict=True))
