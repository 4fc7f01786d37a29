"""Where a layer leaves the residual stream: against what autograd makes of the same sum."""

import torch

from hydra_scale.model.branch import branched


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
