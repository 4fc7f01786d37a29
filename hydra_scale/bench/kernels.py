"""`hydra-scale bench kernels`: the mixer, its scans and attention of the same width, measured side by side.

Weights are fp32 under bf16 autocast, as in training. All cases of one (d_model, seqlen) are timed in turns.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from hydra_kernels import Documents, HydraMixer, quasiseparable_scan
from hydra_kernels.mamba_scan import mamba_scan
from hydra_scale.bench import attention
from hydra_scale.bench.flops import MixerShape, attention_flops, mixer_flops, scan_flops
from hydra_scale.bench.instrument import Instrument, Pace, Timing, interleave
from hydra_scale.bench.peers import PeerMissing, Peers
from hydra_scale.bench.table import Row
from hydra_scale.bench.workload import BOTH, DIRECTIONS, Case, Workload, measure_together

PEERS = ("public-hydra", *attention.SDPA_BACKENDS, "flash-attn", "varlen")
_CHUNK_SIZE = 256
_SEED = 0
SHORTEST, LONGEST = 20, 500
"""Tokens of the short documents."""


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    tokens: int
    """Tokens a call; a longer document is a call of its own."""
    seqlens: Sequence[int]
    widths: Sequence[int]
    directions: Sequence[str]
    backends: Sequence[str]
    """Ours; the first is what the others are compared with."""
    once: Sequence[str]
    """Backends measured at one length only, for they are slow."""
    peers: Sequence[str]
    pace: Pace


def default_plan(device_type: str, *, quick: bool) -> Plan:
    """On a GPU sizes that fill it; on a CPU the smallest that go through the same code."""
    if device_type == "cpu":
        return Plan(256, (32, 64), (64,), DIRECTIONS, ("torch", "mamba"), (), PEERS, Pace(0.1, 3, 10))
    backends, once = ("triton", "mamba", "torch"), ("torch",)
    if quick:
        return Plan(65536, (512, 8192), (1024,), DIRECTIONS, backends, once, PEERS, Pace(0.3, 3, 10))
    lengths = (128, 512, 2048, 8192, 32768, 131072)
    return Plan(65536, lengths, (1024, 2048), DIRECTIONS, backends, once, PEERS, Pace(2.0, 7, 50))


def run(plan: Plan, peers: Peers, device: torch.device, instrument: Instrument) -> Iterator[list[Row]]:
    """Rows, group by group: first what the device can do at all, which also warms its clocks up."""
    floor = floors(device, instrument, plan.pace)
    yield floor
    peak_tflops = next((row.tflops for row in floor if row.implementation == "matmul"), None)
    for d_model in plan.widths:
        groups = [regular_cases(plan, peers, d_model, seqlen, device) for seqlen in plan.seqlens]
        for cases in (*groups, packed_cases(plan, peers, d_model, device)):
            rows = measure_together(cases, plan.directions, instrument, plan.pace)
            for row in rows:
                row.peak_share = row.tflops / peak_tflops if row.tflops and peak_tflops else None
            yield rows
            instrument.release()


def floors(device: torch.device, instrument: Instrument, pace: Pace) -> list[Row]:
    """Bandwidth of a copy, and the rate of a square matrix product in bf16, of random numbers."""
    on_gpu = device.type == "cuda"
    size, width = (2**30, 8192) if on_gpu else (2**24, 512)
    source = torch.randn(size // 2, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    runs: list[Callable[[], object]] = [lambda: target.copy_(source), lambda: a @ b]
    warm = interleave(runs, 3, instrument)
    samples = interleave(runs, pace.rounds(sum(times[-1] for times in warm)), instrument)
    copy, product = (Timing.of(times) for times in samples)
    of_copy = Row("floor", "copy", gb_per_second=2 * size / copy.median / 1e6)
    of_copy.took(copy)
    of_product = Row("floor", "matmul", d_model=width)
    of_product.took(product, 2 * width**3)
    return [of_copy, of_product]


class Inputs:
    """Random tensors that the cases of one (d_model, batch, seqlen) share, made when first asked for."""

    def __init__(self, d_model: int, batch: int, seqlen: int, device: torch.device) -> None:
        self.d_model, self.batch, self.seqlen, self.device = d_model, batch, seqlen, device
        self._generator = torch.Generator(device).manual_seed(_SEED)

    def draw(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Standard normal, to be differentiated by."""
        drawn = torch.randn(shape, generator=self._generator, device=self.device, dtype=dtype)
        return drawn.requires_grad_()

    @cached_property
    def u_BLD(self) -> torch.Tensor:
        return self.draw(self.batch, self.seqlen, self.d_model)

    @cached_property
    def grad_BLD(self) -> torch.Tensor:
        return self.draw(self.batch, self.seqlen, self.d_model).detach()

    @cached_property
    def mixer_state(self) -> dict[str, torch.Tensor]:
        """Initial weights, but with decays and diagonals that differ from head to head."""
        mixer = HydraMixer(self.d_model, device=self.device)
        with torch.no_grad():
            mixer.A_log.uniform_(0.0, 2.5, generator=self._generator)
            mixer.D.uniform_(-1.0, 1.0, generator=self._generator)
        return mixer.state_dict()

    @cached_property
    def scan(self) -> dict[str, torch.Tensor]:
        """Arguments of `quasiseparable_scan` with the public class's sizes; steps of 0.05 to 5 for most tokens."""
        shape, rows = MixerShape(self.d_model), (self.batch, self.seqlen)
        fp32 = torch.float32
        read = (2, *rows, shape.ngroups, shape.d_state)
        return {
            "x_BLHP": self.draw(*rows, shape.nheads, shape.headdim),
            "dt_2BLH": self.draw(2, *rows, shape.nheads, dtype=fp32).detach().sub(0.5).exp().requires_grad_(),
            "A_H": self.draw(shape.nheads, dtype=fp32).detach().exp().neg().requires_grad_(),
            "B_2BLGN": self.draw(*read),
            "C_2BLGN": self.draw(*read),
            "diagonal_BLH": self.draw(*rows, shape.nheads, dtype=fp32),
        }

    def layer(self, module: nn.Module, **options: Documents | None) -> Workload:
        """A module's forward and backward pass on u, under autocast."""

        def compute() -> torch.Tensor:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                return module(self.u_BLD, **options)

        leaves = [self.u_BLD, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
        return Workload(compute, leaves, self.grad_BLD)


def regular_cases(plan: Plan, peers: Peers, d_model: int, seqlen: int, device: torch.device) -> list[Case]:
    """Mixers, scans and attention on rows of one length."""
    batch = max(1, plan.tokens // seqlen)
    inputs, tokens, shape = Inputs(d_model, batch, seqlen, device), batch * seqlen, MixerShape(d_model)
    case = partial(Case, d_model=d_model, seqlen=seqlen, tokens=tokens)
    mixer = partial(case, "mixer", forward_flops=mixer_flops(shape, tokens))
    at_one_length = 2048 if 2048 in plan.seqlens else plan.seqlens[0]
    backends = [name for name in plan.backends if name not in plan.once or seqlen == at_one_length]
    cases = [mixer(name, make=partial(_mixer, inputs, peers, name)) for name in backends]
    for name in backends[:1]:  # without gradients there is nothing to recompute
        make = partial(_mixer, inputs, peers, name, recompute=True)
        cases.append(mixer(f"{name}-recompute", make=make, directions=(BOTH,)))
    if "public-hydra" in plan.peers:
        cases.append(mixer("public-hydra", make=partial(_public_mixer, inputs, peers)))
        make = partial(_public_mixer, inputs, peers, use_mem_eff_path=True)
        cases.append(mixer("public-hydra-mem-eff", make=make))
    scans = partial(case, "scan", forward_flops=scan_flops(shape, tokens))
    cases += [scans(name, make=partial(_scan, inputs, peers, name)) for name in backends]
    attentions = partial(case, "attention", forward_flops=attention_flops(d_model, [seqlen] * batch))
    for name in attention.SDPA_BACKENDS:
        if name in plan.peers:
            cases.append(attentions(name, make=partial(_attention, inputs, partial(attention.sdpa, name))))
    if "flash-attn" in plan.peers:
        make = partial(_attention, inputs, lambda: attention.flash_attn(peers.flash_attn()))
        cases.append(attentions("flash-attn", make=make))
    return cases


def packed_cases(plan: Plan, peers: Peers, d_model: int, device: torch.device) -> list[Case]:
    """Short documents laid end to end, and as many tokens in one document."""
    lengths = short_lengths(plan.tokens, _SEED)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    documents = Documents.of(cu_seqlens, 1, sum(lengths), device)  # checked once a batch, as in training
    longest = max(lengths)
    inputs, shape = Inputs(d_model, 1, plan.tokens, device), MixerShape(d_model)
    case = partial(Case, d_model=d_model, tokens=plan.tokens)
    packed = partial(case, "packed mixer", seqlen=longest, forward_flops=mixer_flops(shape, plan.tokens))
    single = partial(case, "one document mixer", seqlen=plan.tokens, forward_flops=mixer_flops(shape, plan.tokens))
    cases = []
    for name in plan.backends:
        if name not in plan.once:
            cases.append(packed(name, make=partial(_mixer, inputs, peers, name, documents=documents)))
            cases.append(single(name, make=partial(_mixer, inputs, peers, name)))
    if "public-hydra" in plan.peers:
        cases.append(packed("public-hydra", make=_public_packed))
    attentions = partial(case, "packed attention", seqlen=longest, forward_flops=attention_flops(d_model, lengths))
    if "varlen" in plan.peers:
        attend = partial(attention.torch_packed, cu_seqlens, longest)
        cases.append(attentions("varlen", make=partial(_attention, inputs, attend)))
    if "flash-attn" in plan.peers:
        make = partial(_attention, inputs, lambda: attention.flash_attn_packed(peers.flash_attn(), cu_seqlens, longest))
        cases.append(attentions("flash-attn", make=make))
    return cases


def short_lengths(tokens: int, seed: int) -> list[int]:
    """Lengths of documents, each in [SHORTEST, LONGEST] and uniform but for the last two, that sum to `tokens`.

    Raises:
        ValueError: fewer tokens than the shortest document has.
    """
    if tokens < SHORTEST:
        raise ValueError(f"{tokens} tokens; the shortest document has {SHORTEST}")
    draw, lengths = random.Random(seed), []
    while tokens > SHORTEST + LONGEST:
        lengths.append(draw.randint(SHORTEST, LONGEST))
        tokens -= lengths[-1]
    if tokens > LONGEST:
        lengths.append(tokens // 2)
        tokens -= lengths[-1]
    return [*lengths, tokens]


def _mixer(
    inputs: Inputs,
    peers: Peers,
    backend: str,
    *,
    documents: Documents | None = None,
    recompute: bool = False,
) -> Workload:
    if backend == "mamba":
        peers.require_mamba()
    options: dict[str, Any] = {"recompute": True} if recompute else {}
    mixer = HydraMixer(inputs.d_model, chunk_size=_CHUNK_SIZE, backend=backend, device=inputs.device, **options)
    mixer.load_state_dict(inputs.mixer_state)
    return inputs.layer(mixer, cu_seqlens=documents)


def _public_mixer(inputs: Inputs, peers: Peers, *, use_mem_eff_path: bool = False) -> Workload:
    options: dict[str, Any] = {"chunk_size": _CHUNK_SIZE, "use_mem_eff_path": use_mem_eff_path, "device": inputs.device}
    mixer = peers.public_hydra()(inputs.d_model, **options)
    mixer.load_state_dict(inputs.mixer_state)
    return inputs.layer(mixer)


def _public_packed() -> Workload:
    raise PeerMissing("the public class has no borders of documents: its convolution and its shift read across them")


def _scan(inputs: Inputs, peers: Peers, backend: str) -> Workload:
    if backend == "mamba":
        peers.require_mamba()
        function: Callable[..., Any] = mamba_scan
    else:
        function = partial(quasiseparable_scan, backend=backend)
    arguments = inputs.scan
    grad_BLHP = inputs.draw(*arguments["x_BLHP"].shape).detach()
    return Workload(lambda: function(**arguments, chunk_size=_CHUNK_SIZE), [*arguments.values()], grad_BLHP)


def _attention(inputs: Inputs, attend: Callable[[], attention.Attend]) -> Workload:
    torch.manual_seed(_SEED)
    return inputs.layer(attention.AttentionLayer(inputs.d_model, attend(), inputs.device))
