"""Floating point operations of a forward pass, by formula.

Counted are multiplications and additions of matrix products, of the convolution and of the recurrence in its linear
form: what the function needs, not what an implementation spends on blocks or on recomputation. Elementwise work is
left out for all alike. A backward pass needs twice its forward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra_scale.config import ModelConfig

BACKWARD_OVER_FORWARD = 2


@dataclass(frozen=True)
class MixerShape:
    """Sizes of a Hydra mixer; the defaults are those of the public class."""

    d_model: int
    d_state: int = 64
    d_conv: int = 7
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def nheads(self) -> int:
        return self.d_inner // self.headdim


def scan_flops(shape: MixerShape, tokens: int) -> int:
    """Two directions, each writing x B^T into the state and reading it with C: 2 d_inner d_state each; the diagonal."""
    return tokens * (2 * 2 * 2 * shape.d_inner * shape.d_state + 2 * shape.d_inner)


def mixer_flops(shape: MixerShape, tokens: int) -> int:
    """Input projection, convolution, fc_D, scan, output projection."""
    conv_channels = shape.d_inner + 4 * shape.ngroups * shape.d_state
    projected = shape.d_inner + conv_channels + 2 * shape.nheads
    a_token = (
        2 * shape.d_model * projected
        + 2 * shape.d_conv * conv_channels
        + 2 * shape.d_inner * shape.nheads
        + 2 * shape.d_inner * shape.d_model
    )
    return tokens * a_token + scan_flops(shape, tokens)


def attention_flops(d_model: int, lengths: Sequence[int]) -> int:
    """Four projections and, in every document, scores and weighted sums: 2 L^2 d_model each."""
    return sum(8 * length * d_model**2 + 4 * length**2 * d_model for length in lengths)


def mlp_flops(d_model: int, width: int, tokens: int) -> int:
    """Up and down."""
    return 4 * d_model * width * tokens


def head_flops(d_model: int, vocab_size: int, num_scored: int) -> int:
    """The masked language model head at `num_scored` positions: dense, then a score for every token."""
    return 2 * num_scored * d_model * (d_model + vocab_size)


def model_flops(model: ModelConfig, vocab_size: int, lengths: Sequence[int], num_masked: int) -> int:
    """The encoder and its head on documents of these lengths."""
    mixer, tokens = model.mixer, sum(lengths)
    shape = MixerShape(model.d_model, mixer.d_state, mixer.d_conv, mixer.expand, mixer.headdim, mixer.ngroups)
    of_kind = {
        "H": mixer_flops(shape, tokens),
        "A": attention_flops(model.d_model, lengths),
        "M": mlp_flops(model.d_model, round(model.mlp.expansion * model.d_model), tokens),
    }
    return sum(of_kind[kind] for kind in model.layer_kinds) + head_flops(model.d_model, vocab_size, num_masked)


def bert_flops(d_model: int, num_layers: int, vocab_size: int, lengths: Sequence[int]) -> int:
    """BERT with an MLP of 4 d_model, whose head scores every position."""
    tokens = sum(lengths)
    layer = attention_flops(d_model, lengths) + mlp_flops(d_model, 4 * d_model, tokens)
    return num_layers * layer + head_flops(d_model, vocab_size, tokens)
