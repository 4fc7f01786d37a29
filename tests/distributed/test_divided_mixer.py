"""One mixer divided over ranks by tokens, heads or both: output and every gradient in float64; bytes that travel."""

import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from hydra_kernels import chunks
from hydra_scale.config import MixerConfig, ModelConfig, ParallelConfig
from hydra_scale.model.mixer import HydraLayerMixer
from hydra_scale.model.stretch import Stretch
from hydra_scale.parallel.placement import global_name, placement_of
from hydra_scale.topology import ALONE, Context, TensorRanks, joined

D_MODEL, HEADDIM, D_STATE, GROUPS, TAPS = 16, 8, 5, 2, 5
DOCUMENTS = {
    "across-all": [48],
    "across-some": [5, 22, 14, 7],
    "ends-at-borders": [12, 12, 24],
    "many-short": [1, 2, 1, 3, 4, 1, 9, 2, 1, 1, 6, 1, 8, 1, 3, 4],
}


def mixer_and_input(
    num_tokens: int,
    ngroups: int = GROUPS,
    tensor: TensorRanks = ALONE,
    backend: str = "auto",
    learnt: bool = True,
    taps: int = TAPS,
) -> tuple[HydraLayerMixer, torch.Tensor, torch.Tensor]:
    """A mixer, its input and its output's gradient: float64, float32 for the kernels. learnt: initial states."""
    options = {"d_state": D_STATE, "d_conv": taps, "headdim": HEADDIM, "ngroups": ngroups, "bias": True}
    options |= {"backend": backend, "chunk_size": 16}
    mixer_config = MixerConfig.model_validate(options | {"learnable_init_states": learnt})
    mixer = HydraLayerMixer(ModelConfig(d_model=D_MODEL, num_layers=1, mixer=mixer_config), tensor)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            placement = placement_of(parameter)
            generator = torch.Generator().manual_seed(sum(map(ord, global_name(name, parameter))))
            # nothing at zero or one, where a missing term would not show
            parameter.copy_(placement.part_of(0.4 * torch.randn(placement.shape, generator=generator)))
    generator = torch.Generator().manual_seed(5)
    x, grad = (torch.randn(num_tokens, D_MODEL, generator=generator, dtype=torch.float64) for _ in range(2))
    return (mixer, x.float(), grad.float()) if backend == "triton" else (mixer.double(), x, grad)


def computed(
    lengths: list[int],
    ngroups: int,
    context: Context | None,
    tensor: TensorRanks,
    backend: str = "auto",
    learnt: bool = True,
    taps: int = TAPS,
) -> dict[str, torch.Tensor]:
    """Output rows and gradients; those of the parameters summed over the context ranks, at their global place."""
    mixer, x, grad = mixer_and_input(sum(lengths), ngroups, tensor, backend, learnt, taps)
    first, end = (0, len(x)) if context is None else context.stretch(len(x))
    borders = (0, *torch.tensor(lengths).cumsum(0).tolist())
    x_here = x[first:end].clone().requires_grad_()
    y = mixer(x_here, Stretch(borders, first, end, x.device, context, taps // 2))
    y.backward(grad[first:end])
    found: dict[str, torch.Tensor] = {"output": y.detach(), "input": x_here.grad}
    for name, parameter in mixer.named_parameters():
        if context is not None:
            dist.all_reduce(parameter.grad, group=context.group)
        placement = placement_of(parameter)
        whole = found.setdefault(global_name(name, parameter), torch.full(placement.shape, torch.nan, dtype=y.dtype))
        for here, start, length in placement.pieces():
            whole.narrow(placement.dim, start, length).copy_(parameter.grad.narrow(placement.dim, here, length))
    return found


def on_a_rank(tensor: int, exchange: str) -> dict[str, dict[str, np.ndarray]]:
    """For each case what this rank has computed, NaN where a gradient is another rank's; alone if the only one."""
    config = ParallelConfig(tensor=tensor, context=int(os.environ["WORLD_SIZE"]) // tensor, exchange=exchange)
    with joined(config) as topology:
        found = {
            f"{name}, {ngroups} groups": computed(lengths, ngroups, topology.context, topology.tensor)
            for name, lengths in DOCUMENTS.items()
            for ngroups in (1, 2, 4)
        }
    return {case: {name: tensor.numpy() for name, tensor in tensors.items()} for case, tensors in found.items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, np.ndarray]]:
    (found,) = run_ranks(1, on_a_rank, 1, "gather")
    return found


@pytest.mark.parametrize(
    ("tensor", "context", "exchange"),
    [(1, 2, "gather"), (1, 2, "neighbour"), (1, 3, "gather"), (1, 3, "neighbour"), (1, 4, "gather"),
     (1, 4, "neighbour"), (2, 1, "gather"), (4, 1, "gather"), (2, 2, "gather"), (2, 2, "neighbour"),
     (1, 2, "heads"), (1, 4, "heads"), (2, 2, "heads")],
)  # fmt: skip
def test_output_and_every_gradient(
    alone: dict[str, dict[str, np.ndarray]], tensor: int, context: int, exchange: str
) -> None:
    ranks = run_ranks(tensor * context, on_a_rank, tensor, exchange)
    for case, whole in alone.items():
        assert_same([rank[case] for rank in ranks], whole, tensor, 1e-12, case)


def kernels_on_a_rank(exchange: str) -> dict[str, np.ndarray]:
    """Two tensor ranks, the others of context, on the Triton kernels in their interpreter."""
    with joined(ParallelConfig(tensor=2, context=int(os.environ["WORLD_SIZE"]) // 2, exchange=exchange)) as topology:
        found = computed(DOCUMENTS["across-some"], 2, topology.context, topology.tensor, "triton")
    return {name: tensor.numpy() for name, tensor in found.items()}


@pytest.mark.parametrize("exchange", ["gather", "heads"])
def test_on_the_kernels(alone: dict[str, dict[str, np.ndarray]], exchange: str) -> None:
    assert_same(run_ranks(4, kernels_on_a_rank, exchange), alone["across-some, 2 groups"], 2, 1e-5, exchange)


def fused_on_a_rank(exchange: str, backend: str, cases: list[str], taps: int) -> dict[str, dict[str, np.ndarray]]:
    """Context ranks only, and no learnt states: states are exchanged in the middle of the kernels."""
    chunks.SEGMENT_TOKENS = 16  # in this forked process: two chunks of a rank are two segments
    with joined(ParallelConfig(context=int(os.environ["WORLD_SIZE"]), exchange=exchange)) as topology:
        found = {
            name: computed(DOCUMENTS[name], 2, topology.context, topology.tensor, backend, False, taps)
            for name in cases
        }
    return {case: {name: tensor.numpy() for name, tensor in tensors.items()} for case, tensors in found.items()}


@pytest.mark.parametrize(
    ("num_ranks", "exchange", "cases", "taps"),
    [
        (2, "gather", ["across-some", "many-short"], TAPS),
        (3, "neighbour", ["across-all"], TAPS),
        (2, "neighbour", ["ends-at-borders"], TAPS),
        (2, "gather", ["across-some"], 1),
    ],
    ids=str,
)
def test_exchange_inside_the_kernels(num_ranks: int, exchange: str, cases: list[str], taps: int) -> None:
    (expected,) = run_ranks(1, fused_on_a_rank, "gather", "torch", cases, taps)
    ranks = run_ranks(num_ranks, fused_on_a_rank, exchange, "triton", cases, taps)
    for case, whole in expected.items():
        assert_same([rank[case] for rank in ranks], whole, 1, 1e-5, case)


def assert_same(
    ranks: list[dict[str, np.ndarray]], whole: dict[str, np.ndarray], tensor: int, tolerance: float, case: str
) -> None:
    """Rows of the ranks one after the other, and what each has of every gradient."""
    for name, expected in whole.items():
        parts = [rank[name] for rank in ranks]
        if name in ("output", "input"):  # of the ranks that share a stretch each has it all
            for place in range(tensor):
                assert_close(np.concatenate(parts[place::tensor]), expected, tolerance, case, name)
            continue
        seen = np.zeros(expected.shape, dtype=bool)
        for part in parts:
            held = ~np.isnan(part)
            seen |= held
            assert_close(part[held], expected[held], tolerance, case, name)
        assert seen.all(), (case, name)


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float, *what: str) -> None:
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected), what


def bytes_sent(num_tokens: int, exchange: str, backend: str = "torch") -> list[int]:
    """Bytes this rank sends in a forward and in a backward pass over one document."""
    sent = [0]
    chunks.SEGMENT_TOKENS = 16  # in this forked process, where the interpreter walks through whole segments
    p2p, gather, all_to_all = dist.batch_isend_irecv, dist.all_gather_into_tensor, dist.all_to_all_single

    def size(tensor: torch.Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    def counted_p2p(operations: list[Any]) -> Any:
        sent[0] += sum(size(operation.tensor) for operation in operations if operation.op is dist.isend)
        return p2p(operations)

    def counted_gather(output: torch.Tensor, message: torch.Tensor, group: Any, async_op: bool = False) -> Any:
        sent[0] += size(message) * (dist.get_world_size(group) - 1)
        return gather(output, message, group=group, async_op=async_op)

    def counted_all_to_all(output: torch.Tensor, message: torch.Tensor, *splits: list[int], group: Any) -> Any:
        others = len(message) - splits[1][dist.get_rank(group)]
        sent[0] += size(message) * others // len(message)
        return all_to_all(output, message, *splits, group=group)

    with joined(ParallelConfig(context=int(os.environ["WORLD_SIZE"]), exchange=exchange)) as topology:
        context = topology.context
        assert context is not None
        mixer, x, grad = mixer_and_input(num_tokens, backend=backend, learnt=False)
        mixer, x, grad = mixer.float(), x.float(), grad.float()
        first, end = context.stretch(num_tokens)
        dist.batch_isend_irecv, dist.all_gather_into_tensor = counted_p2p, counted_gather
        dist.all_to_all_single = counted_all_to_all
        x_here = x[first:end].requires_grad_()
        y = mixer(x_here, Stretch((0, num_tokens), first, end, x.device, context, TAPS // 2))
        forward = sent[0]
        y.backward(grad[first:end])
    return [forward, sent[0] - forward]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("exchange", ["gather", "neighbour"])
def test_bytes_are_those_of_the_formula_at_any_length(exchange: str, backend: str) -> None:
    """docs/parallelism.md: S = H P N numbers a direction; a rank inside the row has two neighbours."""
    num_ranks = 3
    heads = 2 * D_MODEL // HEADDIM
    states, border = 4 * heads * HEADDIM * D_STATE, 4 * GROUPS * D_STATE
    halo = 4 * (TAPS // 2) * (4 * D_MODEL + 4 * GROUPS * D_STATE + 2 * heads)
    for num_tokens in (30, 300) if backend == "torch" else (9, 18):
        found = run_ranks(num_ranks, bytes_sent, num_tokens, exchange, backend)
        for rank, passes in enumerate(found):
            neighbours = 2 if 0 < rank < num_ranks - 1 else 1
            everyone = num_ranks - 1 if exchange == "gather" else neighbours
            both = 2 if exchange == "gather" else 1
            forward = everyone * both * (states + border) + neighbours * halo
            if exchange == "gather":
                forward += everyone * both * 4 * heads
            backward = forward
            if backend == "triton":  # gradients of vectors go to neighbours by themselves
                backward += neighbours * border - everyone * both * border
            assert passes == [forward, backward]


def test_bytes_of_tokens_grow_with_them() -> None:
    """docs/parallelism.md, exchange by heads: forward, per token of the rank; 4 bytes an element here."""
    num_ranks, num_tokens = 2, 40
    d_inner, heads = 2 * D_MODEL, 2 * D_MODEL // HEADDIM
    halo = 4 * (TAPS // 2) * (4 * D_MODEL + 4 * GROUPS * D_STATE + 2 * heads)
    a_token = 4 * (2 * d_inner + 3 * heads) * (num_ranks - 1) // num_ranks + (num_ranks - 1) * 4 * 4 * GROUPS * D_STATE
    for forward, _ in run_ranks(num_ranks, bytes_sent, num_tokens, "heads"):
        assert forward == halo + a_token * num_tokens // num_ranks


class BytesOfSums(TorchDispatchMode):
    """Bytes a rank sends in ring collectives of its tensor ranks: a sum is a reduce-scatter and a gather."""

    def __init__(self, num_ranks: int) -> None:
        super().__init__()
        self._ring, self.sent = (num_ranks - 1) / num_ranks, 0.0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        library, name = str(operation).split(".")[:2]
        if library == "c10d":
            tensors = {"allreduce_": args[0], "_allgather_base_": [args[0]], "_reduce_scatter_base_": [args[1]]}[name]
            passes = 2 if name == "allreduce_" else 1
            self.sent += passes * self._ring * sum(t.numel() * t.element_size() for t in tensors)
        return operation(*args, **(kwargs or {}))


def bytes_of_heads(num_tokens: int, ngroups: int, sequence: bool) -> list[float]:
    """Bytes this rank sends over tensor ranks in a forward and in a backward pass of one mixer."""
    num_ranks = int(os.environ["WORLD_SIZE"])
    with joined(ParallelConfig(tensor=num_ranks, sequence=sequence)) as topology:
        mixer, x, grad = mixer_and_input(num_tokens, ngroups, topology.tensor)
        mixer, x, grad = mixer.float(), x.float(), grad.float()
        here = slice(
            num_tokens * topology.tensor.rank // num_ranks, num_tokens * (topology.tensor.rank + 1) // num_ranks
        )
        here = here if sequence else slice(num_tokens)
        x_here = x[here].requires_grad_()
        with BytesOfSums(num_ranks) as forward:
            y = mixer(x_here, Stretch((0, num_tokens), 0, num_tokens, x.device, None, TAPS // 2))
        with BytesOfSums(num_ranks) as backward:
            y.backward(grad[here])
    return [forward.sent, backward.sent]


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("ngroups", [1, 2])
def test_bytes_over_tensor_ranks_are_those_of_the_formula(ngroups: int, sequence: bool) -> None:
    """docs/parallelism.md; input and output projection and convolution have biases here."""
    num_ranks, heads = 2, 2 * D_MODEL // HEADDIM
    shared = 8 * ngroups * D_STATE * 4 * (D_MODEL + TAPS + 2) if ngroups < num_ranks else 0
    shared += 8 * D_MODEL if sequence else 0  # of the output projection's bias every rank has seen some tokens
    for num_tokens in (24, 48):
        tokens = num_tokens * (2 * 4 * D_MODEL + 4 * heads + 8)
        expected = [tokens / num_ranks, (tokens + shared) / num_ranks]
        assert run_ranks(num_ranks, bytes_of_heads, num_tokens, ngroups, sequence) == [expected] * num_ranks
