"""The compiled Triton kernels at the widths users ask for, in each dtype, against the recurrence in float64."""

import pytest
import torch
from compare import assert_close
from test_scan import borders, make_inputs

from hydra_kernels import HydraMixer, quasiseparable_scan

pytestmark = pytest.mark.gpu
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
ROUNDED = ("x_BLHP", "B_2BLGN", "C_2BLGN")
PACKED = [20, 300, 1, 129, 64, 100]


def gradients(
    inputs: dict[str, torch.Tensor], cu_seqlens: torch.Tensor | None, edges: bool, backend: str
) -> dict[str, torch.Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    found = quasiseparable_scan(**leaves, cu_seqlens=cu_seqlens, return_final_states=edges, backend=backend)
    outputs = found if isinstance(found, tuple) else (found,)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(y.shape, generator=generator).bfloat16().to(y.device, y.dtype) for y in outputs]
    torch.autograd.backward(outputs, weights)
    named = {f"output {index}": y for index, y in enumerate(outputs)}
    # a lone token has no neighbour to read: no gradient at all, which is zero
    grads = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return named | {f"gradient of {name}": grad for name, grad in grads.items()}


def compare(
    inputs: dict[str, torch.Tensor],
    dtype: torch.dtype,
    cu_seqlens: torch.Tensor | None = None,
    edges: bool = False,
    truth: str = "reference",
) -> None:
    given = {name: tensor.cuda().to(dtype if name in ROUNDED else torch.float32) for name, tensor in inputs.items()}
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.cuda()
    expected = gradients({name: t.double() for name, t in given.items()}, cu_seqlens, edges, truth)
    found = gradients(given, cu_seqlens, edges, "triton")
    for what, tensor in expected.items():
        assert_close(found[what], tensor, TOLERANCES[dtype], what, floor=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("batch", "seqlen", "nheads", "headdim", "ngroups", "d_state"),
    [(1, 1, 2, 32, 1, 32), (1, 1500, 4, 64, 1, 64), (7, 128, 8, 64, 1, 64), (2, 333, 4, 16, 2, 16),
     (2, 700, 4, 64, 4, 64), (1, 515, 3, 48, 1, 96), (1, 777, 2, 128, 1, 128)],
    ids=str,
)  # fmt: skip
def test_rows(
    batch: int, seqlen: int, nheads: int, headdim: int, ngroups: int, d_state: int, dtype: torch.dtype
) -> None:
    compare(make_inputs(batch, seqlen, nheads, headdim, ngroups, d_state), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("edges", [False, True], ids=["closed", "states in and out"])
def test_packed(edges: bool, dtype: torch.dtype) -> None:
    documents = len(PACKED) if edges else 0
    compare(make_inputs(1, sum(PACKED), 4, 64, 1, 64, documents=documents), dtype, borders(PACKED), edges)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("lengths", [[9001], [3000, 6001], [2048, 2048, 4096]], ids=str)
def test_across_segments(lengths: list[int], dtype: torch.dtype) -> None:
    """States go through several segments; of heads that forget soon little of one is read, of others all."""
    inputs = make_inputs(1, sum(lengths), 4, 64, 1, 64)
    inputs["dt_2BLH"] = inputs["dt_2BLH"] * torch.tensor([1e-3, 1e-2, 0.1, 1.0])
    compare(inputs, dtype, borders(lengths), truth="torch")


def test_a_million_tokens() -> None:
    """Offsets beyond 32 bits: what stands at the end equals what it is alone, also that of a document that began long
    before, of which its heads have forgotten all but a few thousand tokens."""
    tokens, last, window, checked = 2**20, 3000, 8192, 1000
    torch.manual_seed(0)
    mixer = HydraMixer(d_model=1024, device="cuda", backend="triton")
    mixer.dt_bias.data += 3.0
    x_1TD, grad_1TD = (torch.randn(1, tokens, 1024, device="cuda").bfloat16() for _ in range(2))

    def found(first: int, *lengths: int) -> torch.Tensor:
        """Output and gradient of some tokens."""
        piece = slice(first, first + sum(lengths))
        x = x_1TD[:, piece].clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            y = mixer(x, borders(list(lengths)).cuda())
        y.backward(grad_1TD[:, piece])
        assert x.grad is not None
        return torch.stack((y.detach(), x.grad))

    end = tokens - last
    whole = found(0, end, last)
    assert_close(whole[:, :, end:], found(end, last), 1e-2, "the last document")
    alone = found(end - window, window)
    assert_close(whole[:, :, end - checked : end], alone[:, :, -checked:], 1e-2, "the end of the one before")


def test_two_backward_passes_are_bit_equal() -> None:
    inputs = {name: tensor.cuda().bfloat16() for name, tensor in make_inputs(2, 5000, 8, 64, 1, 64).items()}
    first, second = (gradients(inputs, None, False, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inductor_gives_the_same_bits() -> None:
    """Output and every gradient of a mixer, and its output at other lengths."""
    torch.manual_seed(0)
    mixer = HydraMixer(d_model=256, device="cuda")
    compiled = torch.compile(mixer, fullgraph=True)
    for rows, seqlen in ((4, 512), (3, 333)):
        x = torch.randn(rows, seqlen, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16):
            outputs = [function(x) for function in (mixer, compiled)]
        expected, found = (
            [y, *torch.autograd.grad(y.float().square().sum(), [x, *mixer.parameters()])] for y in outputs
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
