"""HydraMixer against the public implementation's golden files; no document or padding influences another document."""

import json
import math
from pathlib import Path

import pytest
import torch
from compare import assert_close
from safetensors import safe_open

from hydra_kernels import HydraMixer

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(GOLDEN.glob("mixer_*.safetensors"))


def load(path: Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        arguments = {k: json.loads(v) for k, v in file.metadata().items() if k not in ("batch", "seqlen")}
        return arguments, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path: Path, backend: str, dtype: torch.dtype, tolerance: float) -> None:
    arguments, golden = load(path)
    mixer = HydraMixer(**arguments, backend=backend, dtype=dtype)
    mixer.load_state_dict(
        {n.removeprefix("param."): t for n, t in golden.items() if n.startswith("param.")}, strict=True
    )
    u = golden["input"].to(dtype).requires_grad_()
    y = mixer(u)
    y.backward(golden["grad_output"].to(dtype))
    assert_close(y, golden["output"], tolerance, "output")
    assert_close(u.grad, golden["grad_input"], tolerance, "input")
    gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in mixer.named_parameters()}
    assert gradients.keys() == {n.removeprefix("grad.") for n in golden if n.startswith("grad.")}
    for name, gradient in gradients.items():
        assert_close(gradient, golden[f"grad.{name}"], tolerance, name)


@pytest.fixture
def mixer() -> HydraMixer:
    torch.manual_seed(0)
    mixer = HydraMixer(16, d_state=4, headdim=8, ngroups=2, learnable_init_states=True, dtype=torch.float64)
    with torch.no_grad():
        mixer.init_states.normal_()
    return mixer


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_packed_documents_influence_each_other_by_exactly_nothing(
    mixer: HydraMixer, changed: int, scale: float
) -> None:
    lengths = [5, 70, 9]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    first, last = int(cu_seqlens[changed]), int(cu_seqlens[changed + 1])
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[first:last] = False

    def run(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        u = u.clone().requires_grad_()
        y = mixer(u, cu_seqlens=cu_seqlens)
        (gradient,) = torch.autograd.grad(y[:, others].square().sum(), u)
        return y.detach(), gradient

    u = torch.randn(1, sum(lengths), 16, dtype=torch.float64)
    other = u.clone()
    other[:, first:last] = scale * torch.randn(1, last - first, 16, dtype=torch.float64)
    (y, gradient), (other_y, other_gradient) = run(u), run(other)
    assert not torch.equal(y[:, ~others], other_y[:, ~others])
    assert torch.equal(y[:, others], other_y[:, others])
    assert torch.equal(gradient[:, others], other_gradient[:, others])
    assert torch.equal(gradient[:, ~others], torch.zeros_like(gradient[:, ~others]))


@pytest.mark.parametrize("side", ["right", "left", "both", "holes"])
def test_padded_rows_are_what_they_are_alone(mixer: HydraMixer, side: str) -> None:
    lengths, seqlen = [12, 1, 30, 0], 30
    mask = torch.zeros(4, seqlen, dtype=torch.int64)
    for row, length in enumerate(lengths):
        start = {"right": 0, "left": seqlen - length, "both": (seqlen - length) // 2, "holes": 0}[side]
        mask[row, start : start + length] = 1
    if side == "holes":
        mask[0], mask[0, ::2] = 0, 1
    u = torch.randn(4, seqlen, 16, dtype=torch.float64)
    results = []
    for padding in (0.0, 1e4):
        padded = u.where(mask.bool()[..., None], padding).requires_grad_()
        y = mixer(padded, attention_mask=mask)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), padded)))
    for zero_padded, wild_padded in zip(*results, strict=True):
        assert torch.equal(zero_padded, wild_padded)
        assert not zero_padded[mask == 0].any()
    for row in range(3):
        present = mask[row].bool()
        assert_close(results[0][0][row, present], mixer(u[row : row + 1, present])[0], 1e-12, f"row {row}")


def test_state_dict_of_the_public_class() -> None:
    """Names and shapes at d_model 768, the published base size: 3,825,224 parameters."""
    with torch.device("meta"):
        mixer = HydraMixer(768)
    shapes = {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items()}
    assert shapes == {
        "in_proj.weight": (3376, 768), "conv1d.weight": (1792, 1, 7), "conv1d.bias": (1792,), "dt_bias": (24,),
        "A_log": (24,), "D": (24,), "fc_D.weight": (24, 1536), "norm.weight": (1536,), "out_proj.weight": (768, 1536),
    }  # fmt: skip
    assert sum(math.prod(shape) for shape in shapes.values()) == 3_825_224
    undecayed = {name for name, parameter in mixer.named_parameters() if getattr(parameter, "_no_weight_decay", False)}
    assert undecayed == {"dt_bias", "A_log", "D"}
    assert HydraMixer(32, learnable_init_states=True, bias=True).init_states.shape == (1, 64, 64)


def test_initial_weights() -> None:
    with torch.device("meta"):
        mixer = HydraMixer(1024, headdim=8, conv_init=0.01, learnable_init_states=True)
    mixer.to_empty(device="cpu").reset_parameters()
    step = torch.nn.functional.softplus(mixer.dt_bias)
    assert 1e-3 * 0.999 <= step.min() < 2e-3 and 0.05 < step.max() <= 0.1 * 1.001
    assert abs(step.log().mean() - math.log(1e-2)) < 0.3  # log-uniform: the mean of the logarithms is the middle
    assert not mixer.A_log.any() and not mixer.init_states.any()
    assert (mixer.D == 1).all() and (mixer.norm.weight == 1).all()
    assert 0.0099 < mixer.conv1d.weight.abs().max() <= 0.01
    assert mixer.in_proj.weight.abs().max() <= 1024**-0.5 < 1.001 * mixer.in_proj.weight.abs().max()


def test_autocast_and_bfloat16_modules_stay_close() -> None:
    torch.manual_seed(0)
    mixer, u = HydraMixer(64, d_state=16, headdim=16), torch.randn(2, 100, 64)
    expected = mixer(u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mixer(u)
    assert found.dtype == torch.bfloat16
    assert_close(found, expected, 2e-2)
    assert_close(mixer.bfloat16()(u.bfloat16()), expected, 3e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"headdim": 24}, "headdim is 24; it must divide"), ({"headdim": 16, "ngroups": 3}, "ngroups is 3"),
        ({"d_conv": 4}, "d_conv is 4"), ({"activation": "relu"}, "activation is 'relu'"),
        ({"headdim": 0}, "headdim is 0; expected at least 1"), ({"d_conv": -1}, "d_conv is -1"),
        ({"dt_limit": (0.1, 0.01)}, "dt_limit is .0.1, 0.01.; expected the smallest"),
        ({"backend": "cuda"}, "backend is 'cuda'; choose one of"),
    ],
)  # fmt: skip
def test_misuse_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HydraMixer(32, **arguments)


def test_borders_and_mask_together_are_refused(mixer: HydraMixer) -> None:
    u = torch.zeros(1, 4, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="both given"):
        mixer(u, cu_seqlens=torch.tensor([0, 4]), attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        mixer(u, attention_mask=torch.ones(1, 5))
