"""An encoder, or one mixer of it, apart from any file format: what every adapter reads into and writes from.

Both packages run themselves with this system's own code on a `Probe`; conversion compares the written file with that.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hydra_kernels import HydraMixer
from hydra_scale.config import MixerConfig, ModelConfig
from hydra_scale.data.tokenizer import Tokenizer
from hydra_scale.errors import CheckpointError, ConfigError
from hydra_scale.model.masked_lm import MaskedLanguageModel

Output = Literal["logits", "vectors"]
"""What of an encoder is compared: the head's scores of all tokens, or the encoder's final vectors."""

_PROBE_LENGTHS = (150, 9, 1)
_WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Probe:
    """A batch of a long, a short and a one-token row, its padding not zeros."""

    inputs: torch.Tensor
    """Token ids (batch, seqlen) int64 for an encoder, vectors (batch, seqlen, d_model) for a mixer."""
    lengths: tuple[int, ...]

    @property
    def attention_mask(self) -> torch.Tensor:
        """(batch, seqlen) int64, 1 at tokens; every row starts at its left edge."""
        return (torch.arange(self.inputs.shape[1]) < torch.tensor(self.lengths)[:, None]).long()

    def rows(self) -> list[torch.Tensor]:
        """Each row alone, without padding."""
        return [row[:length] for row, length in zip(self.inputs, self.lengths, strict=True)]


@dataclass(frozen=True)
class MixerPackage:
    """One Hydra mixer."""

    d_model: int
    mixer: MixerConfig
    parameters: dict[str, torch.Tensor]
    """By the names of the public class, on the CPU."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision it is run and compared in."""
        return running_dtype(self.parameters)

    def build(self) -> HydraMixer:
        """The mixer with these parameters.

        Raises:
            CheckpointError: the parameters are not those of such a mixer.
        """
        mixer = HydraMixer(self.d_model, **self.mixer.model_dump(exclude={"backend"}), dtype=self.dtype)
        check_same_tensors("the mixer", dict(mixer.named_parameters()), self.parameters)
        mixer.load_state_dict(self.parameters)
        return mixer.eval()

    def probe(self) -> Probe:
        """A batch of vectors, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        shape = (len(_PROBE_LENGTHS), max(_PROBE_LENGTHS), self.d_model)
        return Probe(torch.randn(shape, generator=generator, dtype=self.dtype), _PROBE_LENGTHS)

    @torch.no_grad()
    def run(self, probe: Probe, output: Output) -> list[torch.Tensor]:
        """Output (length, d_model) of each row of the probe, alone; `output` makes no difference to a mixer."""
        mixer = self.build()
        return [mixer(row[None])[0] for row in probe.rows()]


@dataclass(frozen=True)
class EncoderPackage:
    """A trained masked language model."""

    model: ModelConfig
    parameters: dict[str, torch.Tensor]
    """By logical name, whole tensors on the CPU."""
    tokenizer: Tokenizer | None
    origin: dict[str, Any]
    """Where it came from, for the model card: plain JSON, see `hydra_scale.convert.card`."""
    source_name: Callable[[str], str] = str
    """What the source calls a parameter, for errors."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.parameters["embedding.word.weight"].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The precision it is run and compared in: fp64 if any parameter has it, else fp32."""
        return running_dtype(self.parameters)

    def build(self) -> MaskedLanguageModel:
        """This system's model with these parameters, on the CPU; needs `hydra_scale.topology.joined`.

        Raises:
            CheckpointError: the parameters are not those of such a model.
        """
        mixer = self.model.mixer.model_copy(update={"backend": "auto"})
        model = MaskedLanguageModel(self.model.model_copy(update={"mixer": mixer}), self.vocab_size)
        check_same_tensors("the model", dict(model.named_parameters()), self.parameters, self.source_name)
        model.to(self.dtype).load_state_dict(self.parameters)
        return model.eval()

    def probe(self) -> Probe:
        """A batch of random tokens, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        limit = self.model.max_positions if self.model.position_embedding == "learned" else max(_PROBE_LENGTHS)
        lengths = tuple(min(length, limit) for length in _PROBE_LENGTHS)
        shape = (len(lengths), max(lengths))
        return Probe(torch.randint(0, self.vocab_size, shape, generator=generator), lengths)

    @torch.no_grad()
    def run(self, probe: Probe, output: Output) -> list[torch.Tensor]:
        """Logits (length, vocab_size) or vectors (length, d_model) of each row of the probe, alone."""
        model = self.build()
        compute = model.logits if output == "logits" else model.hidden
        return [compute(_Document(row)) for row in probe.rows()]

    def layer_mixer(self, layer: int) -> "LayerMixerPackage":
        """The mixer of a layer, counted from 0.

        Raises:
            ConfigError: there is no such layer, or it is none of Hydra's.
        """
        kinds = self.model.layer_kinds
        hydra_layers = ", ".join(str(index) for index, kind in enumerate(kinds) if kind == "H")
        if not (0 <= layer < len(kinds) and kinds[layer] == "H"):
            raise ConfigError(f"--layer {layer}: not a Hydra layer of this model; they are {hydra_layers or 'none'}")
        prefix = f"encoder.layers.{layer}.mixer."
        parameters = {n.removeprefix(prefix): t for n, t in self.parameters.items() if n.startswith(prefix)}
        return LayerMixerPackage(self.model.d_model, self.model.mixer, parameters, self, layer)


@dataclass(frozen=True)
class LayerMixerPackage(MixerPackage):
    """A mixer taken out of an encoder; what the encoder feeds it and gets from it is what it is compared with."""

    encoder: EncoderPackage
    layer: int

    def probe(self) -> Probe:
        """What enters the layer's mixer when the encoder runs on its own probe."""
        rows = [row for row, _ in self._recorded()]
        inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1.0)
        return Probe(inputs, tuple(map(len, rows)))

    def run(self, probe: Probe, output: Output) -> list[torch.Tensor]:
        """What leaves it then; `probe` is that of this package."""
        return [row for _, row in self._recorded()]

    @torch.no_grad()
    def _recorded(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        model, pairs = self.encoder.build(), []
        mixer = model.get_submodule(f"encoder.layers.{self.layer}.mixer")
        mixer.register_forward_hook(lambda _, inputs, y: pairs.append((inputs[0], y)))
        for row in self.encoder.probe().rows():
            model.hidden(_Document(row))
        return pairs


def check_same_tensors(
    what: str,
    expected: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    source_name: Callable[[str], str] = str,
) -> None:
    """Raises CheckpointError unless `found` has the names and shapes of `expected`, and finite floats of 16 to 64 bits.

    source_name: what the source calls a tensor.
    """

    def listed(names: Collection[str]) -> str:
        return ", ".join(sorted(map(source_name, names))[:5]) + (", ..." if len(names) > 5 else "")

    if absent := expected.keys() - found.keys():
        raise CheckpointError(
            f"{what} lacks {len(absent)} of {len(expected)} tensors: {listed(absent)}; give the whole state dict"
        )
    if unknown := found.keys() - expected.keys():
        raise CheckpointError(
            f"{what} has no place for {len(unknown)} tensors: {listed(unknown)}; it is of another kind, or remove them"
        )
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
            raise CheckpointError(
                f"{what}: {source_name(name)} has shape {shapes}; settings, if given, do not fit the tensors"
            )
        if tensor.dtype not in _WEIGHTS:
            raise CheckpointError(
                f"{what}: {source_name(name)} holds {str(tensor.dtype).removeprefix('torch.')}, expected floats of 16,"
                " 32 or 64 bits; convert weights that are not quantised"
            )
        if not tensor.isfinite().all():
            number = int((~tensor.isfinite()).sum())
            raise CheckpointError(
                f"{what}: {source_name(name)} holds {number} values that are not finite; convert a sound one"
            )


def widest_dtype(parameters: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The narrowest type that holds every parameter exactly."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in parameters.values()))


def running_dtype(parameters: Mapping[str, torch.Tensor]) -> torch.dtype:
    """fp64 if any parameter has it, else fp32."""
    return torch.promote_types(widest_dtype(parameters), torch.float32)


class _Document:
    """One document as the model's batch, every position asked for."""

    def __init__(self, input_ids: torch.Tensor) -> None:
        self.input_ids = self.targets = input_ids
        self.position_ids = self.token_keys = self.masked_positions = torch.arange(input_ids.numel())
        self.cu_seqlens = torch.tensor([0, input_ids.numel()], dtype=torch.int32)
        self.first_token = 0
