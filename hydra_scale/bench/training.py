"""`hydra-scale bench training`: whole optimizer steps of a configuration, beside BERT and the public Hydra class.

The step is the one of pretraining: forward, backward, clipping, AdamW under ZeRO. Only the loader is left out: tokens
are random, and every document has L of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hydra_scale.bench.flops import BACKWARD_OVER_FORWARD, bert_flops, model_flops
from hydra_scale.bench.instrument import Instrument, Timing, interleave
from hydra_scale.bench.peers import Peers, attempt
from hydra_scale.bench.table import Row
from hydra_scale.config import Config, MixerConfig
from hydra_scale.data.loader import Batch
from hydra_scale.data.tokenizer import MASK_ID
from hydra_scale.model.mixer import HydraLayerMixer
from hydra_scale.model.stretch import Stretch
from hydra_scale.monitor.metrics import StepResult
from hydra_scale.topology import Topology
from hydra_scale.training.assembly import assembled
from hydra_scale.training.step import train_step

PEERS = ("public-hydra", "bert")
SEQLENS = (128, 512, 2048, 8192, 16384)
_NUM_WARM_UP = 3
BERT_VOCAB_SIZE = 30_528
_MASK_RATE = 0.3
_SEED = 0

Step = Callable[[], float]
"""One optimizer step; returns its loss."""


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    config: Config
    tokens: int
    """Tokens a step; a longer document is a step of its own."""
    seqlens: Sequence[int]
    peers: Sequence[str]
    num_steps: int
    """Steps that are timed."""

    @property
    def vocab_size(self) -> int:
        return self.config.model.vocab_size or BERT_VOCAB_SIZE


def run(plan: Plan, peers: Peers, topology: Topology, instrument: Instrument) -> Iterator[list[Row]]:
    """Rows, one length after the other; each model is gone before the next is made."""
    d_model, num_layers = plan.config.model.d_model, bert_layers(plan.config.model.num_layers)
    for seqlen in plan.seqlens:
        batch = random_batch(plan.vocab_size, max(1, plan.tokens // seqlen), seqlen)
        config = for_batch(plan.config, batch)
        lengths, num_masked = [seqlen] * batch.num_sequences, batch.targets.numel()
        measure = partial(_measure, batch=batch, d_model=d_model, num_steps=plan.num_steps, instrument=instrument)
        ours = partial(our_step, config, plan.vocab_size, topology, batch)
        flops = model_flops(config.model, plan.vocab_size, lengths, num_masked)
        first = measure("hydra-scale", ours, flops)
        rows = [first.row]
        if "public-hydra" in plan.peers:
            peer = measure("public-hydra", partial(ours, peers), flops)
            if first.loss and peer.loss:
                peer.row.difference = abs(peer.loss / first.loss - 1)
            rows.append(peer.row)
        if "bert" in plan.peers:
            bert = partial(bert_step, config, plan.vocab_size, topology, batch, num_layers, peers)
            flops = bert_flops(d_model, num_layers, plan.vocab_size, lengths)
            rows.append(measure(f"bert-{num_layers}-layers", bert, flops).row)
        yield rows


@dataclass(frozen=True)
class Measured:
    """A row, and the loss of the very first step."""

    row: Row
    loss: float | None


def _measure(
    name: str,
    make: Callable[[], AbstractContextManager[Step]],
    forward_flops: int,
    *,
    batch: Batch,
    d_model: int,
    num_steps: int,
    instrument: Instrument,
) -> Measured:
    instrument.release()

    def measure() -> tuple[float, Timing, int | None]:
        with make() as step:
            loss = step()
            interleave([step], _NUM_WARM_UP - 1, instrument)
            (times,) = interleave([step], num_steps, instrument)
            return loss, Timing.of(times), instrument.peak()

    outcome, status = attempt(measure)
    tokens = batch.input_ids.numel()
    row = Row("training", name, d_model, batch.max_seqlen, tokens, "step", status=status)
    if outcome is None:
        return Measured(row, None)
    loss, timing, peak = outcome
    row.took(timing, (1 + BACKWARD_OVER_FORWARD) * forward_flops)
    row.tokens_per_second = 1e3 * tokens / timing.median
    row.peak_gib = None if peak is None else peak / 2**30
    return Measured(row, loss)


def random_batch(vocab_size: int, num_sequences: int, seqlen: int, seed: int = _SEED) -> Batch:
    """Documents of exactly `seqlen` random ordinary tokens, of which 30% stand masked."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = num_sequences * seqlen
    tokens = torch.randint(MASK_ID + 1, vocab_size, (num_tokens,), generator=generator)
    masked = torch.randperm(num_tokens, generator=generator)[: round(_MASK_RATE * num_tokens)].sort().values
    return Batch(
        input_ids=tokens.index_fill(0, masked, MASK_ID),
        cu_seqlens=torch.arange(0, num_tokens + 1, seqlen, dtype=torch.int32),
        max_seqlen=seqlen,
        position_ids=torch.arange(seqlen).repeat(num_sequences),
        masked_positions=masked,
        targets=tokens[masked],
        token_keys=torch.arange(num_tokens),
        num_sequences=num_sequences,
        documents=torch.arange(num_sequences),
    )


def numbered_batch(vocab_size: int, first: int, num_sequences: int, seqlen: int) -> Batch:
    """Documents `first` and the following ones of `random_batch`, one for each seed: the same however they are divided
    into batches."""
    parts = [random_batch(vocab_size, 1, seqlen, seed=first + n) for n in range(num_sequences)]
    shifts = range(0, num_sequences * seqlen, seqlen)
    keys = [seqlen * (first + n) + part.token_keys for n, part in enumerate(parts)]
    return Batch(
        input_ids=torch.cat([part.input_ids for part in parts]),
        cu_seqlens=torch.arange(0, num_sequences * seqlen + 1, seqlen, dtype=torch.int32),
        max_seqlen=seqlen,
        position_ids=torch.cat([part.position_ids for part in parts]),
        masked_positions=torch.cat([part.masked_positions + n for part, n in zip(parts, shifts, strict=True)]),
        targets=torch.cat([part.targets for part in parts]),
        token_keys=torch.cat(keys),
        num_sequences=num_sequences,
        documents=torch.arange(first, first + num_sequences),
    )


def for_batch(config: Config, batch: Batch, num_batches: int = 1) -> Config:
    """The configuration whose step is so many such batches, each on ranks of its own."""
    return for_documents(config, batch.max_seqlen, batch.num_sequences, num_batches)


def for_documents(config: Config, seqlen: int, documents: int, num_batches: int = 1) -> Config:
    """The configuration whose step is `num_batches` micro batches of so many documents of `seqlen` tokens."""
    values = config.model_dump()
    values["data"] |= {"seqlen": seqlen, "packing": True, "mask_rate": _MASK_RATE}  # as many tokens in every step
    values["model"]["max_positions"] = max(config.model.max_positions, seqlen)
    values["training"] |= {"global_batch_size": documents * num_batches, "micro_batch_size": documents}
    return Config.model_validate(values)


@contextmanager
def optimizer_steps(
    config: Config,
    vocab_size: int,
    topology: Topology,
    batches: list[Batch],
    change: Callable[[nn.Module], None] | None = None,
) -> Iterator[Callable[[], StepResult]]:
    """Pretraining's step on the same micro batches, again and again; `change` may exchange parts of the fresh model."""
    with assembled(config, vocab_size, topology, change) as (_, optimizer):
        yield lambda: train_step(optimizer, batches, config.optimizer.lr, topology)


@contextmanager
def our_step(
    config: Config,
    vocab_size: int,
    topology: Topology,
    batch: Batch,
    peers: Peers | None = None,
) -> Iterator[Step]:
    """Pretraining's step; with `peers` every mixer is of the public Hydra class, with the same initial weights.

    Its kernels search for settings as they run, so its layers are no CUDA graphs.
    """
    change = None
    if peers is not None:
        training = config.training.model_copy(update={"cuda_graphs": False})
        config = config.model_copy(update={"training": training})
        change = partial(_with_public_mixers, config=config, public=peers.public_hydra())
    with optimizer_steps(config, vocab_size, topology, [batch], change) as step:
        yield lambda: step().loss


def _with_public_mixers(model: Any, config: Config, public: Callable[..., nn.Module]) -> None:
    for layer in model.encoder.layers.values():
        if isinstance(layer.mixer, HydraLayerMixer):
            layer.mixer = PublicMixer(public, config.model.d_model, config.model.mixer, layer.mixer)


class PublicMixer(nn.Module):
    """The public Hydra class as a layer of our encoder, for documents of one length."""

    def __init__(self, public: Callable[..., nn.Module], d_model: int, config: MixerConfig, ours: nn.Module) -> None:
        super().__init__()
        options = config.model_dump(exclude={"backend"})
        self.public = public(d_model, **options, device=next(ours.parameters()).device)
        names = dict(self.public.named_parameters())
        self.public.load_state_dict({name: value for name, value in ours.state_dict().items() if name in names})

    def forward(self, x_TD: torch.Tensor, stretch: Stretch) -> torch.Tensor:
        """(T, D) -> (T, D); all documents have the same number of tokens."""
        return self.public(x_TD.unflatten(0, (len(stretch.documents.lengths), -1))).flatten(0, 1)


def bert_layers(num_layers: int) -> int:
    """Layers of the BERT beside a Hydra of `num_layers`: 24 beside 45, 12 beside 23, the published pairs."""
    return max(1, round(num_layers * 24 / 45))


@contextmanager
def bert_step(
    config: Config, vocab_size: int, topology: Topology, batch: Batch, num_layers: int, peers: Peers
) -> Iterator[Step]:
    """A step of Hugging Face's BertForMaskedLM as its users train it: SDPA, autocast, torch's fused AdamW.

    Width and heads of 64 go with the configuration; its head scores every position, as that class does.
    """
    transformers = peers.transformers()
    d_model, device = config.model.d_model, topology.accelerator.device
    shape = transformers.BertConfig(
        vocab_size=vocab_size,
        hidden_size=d_model,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, d_model // 64),
        intermediate_size=4 * d_model,
        max_position_embeddings=batch.max_seqlen,
    )
    model = transformers.AutoModelForMaskedLM.from_config(shape, attn_implementation="sdpa").to(device).train()
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    labels = torch.full_like(batch.input_ids, -100).index_copy(0, batch.masked_positions, batch.targets)
    input_ids, labels = (t.view(batch.num_sequences, -1) for t in (batch.input_ids, labels))

    def step() -> float:
        with topology.accelerator.autocast(config.training.precision):
            loss = model(input_ids=input_ids.to(device), labels=labels.to(device)).loss
        loss.backward()
        if settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    yield step
