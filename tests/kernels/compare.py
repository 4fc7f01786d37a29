"""Comparison of tensors and of all gradients."""

from collections.abc import Callable

import torch


def assert_close(
    found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "", floor: float = 1e-30
) -> None:
    """RMS difference relative to the RMS of `expected`, or to `floor` over all elements where that is larger."""
    assert found.shape == expected.shape, what
    found, expected = found.detach().double(), expected.detach().double()
    difference = float((found - expected).norm() / expected.norm().clamp_min(floor))  # NaN fails the comparison
    assert difference <= tolerance, f"{what}: {difference:.2e} > {tolerance:.0e}"


def with_gradients(
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]], inputs: dict[str, torch.Tensor], seed: int = 0
) -> dict[str, torch.Tensor]:
    """Outputs of `function(**inputs)` and the gradients of every input for random output gradients."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, weights)
    found = {f"output {index}": y.detach() for index, y in enumerate(outputs)}
    gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return found | {f"gradient of {name}": gradient for name, gradient in gradients.items()}


def assert_all_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float, floor: float = 1e-30
) -> None:
    assert found.keys() == expected.keys()
    for what, tensor in expected.items():
        assert_close(found[what], tensor, tolerance, what, floor)
