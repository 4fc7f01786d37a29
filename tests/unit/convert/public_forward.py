"""The public Hydra masked language model from its state dict alone, as the mathematics has it: dense matrices in fp64.

Token i reads token j < i through dt_j exp(A (dt_{j+1} + ... + dt_{i-1})) <C_{i-1}, B_j>, tokens j > i likewise in the
other direction, and itself through fc_D(x_i) + D. Nothing of this system is called.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """What a public model may be made of; the last five the masked language model's class cannot be told."""

    d_model: int = 16
    num_layers: int = 2
    vocab_size: int = 24
    type_vocab_size: int = 2
    positions: int | None = None
    prenorm: bool = False
    d_state: int = 4
    d_conv: int = 7
    expand: int = 2
    headdim: int = 8
    eps: float = 1e-12
    ngroups: int = 1
    dt_limit: tuple[float, float] = (0.0, math.inf)
    bias: bool = False
    conv_bias: bool = True
    init_states: bool = False

    @property
    def expressible(self) -> bool:
        """Whether the public masked language model's class can be so."""
        own = (self.ngroups, self.dt_limit, self.bias, self.conv_bias, self.init_states)
        return own == (1, (0.0, math.inf), False, True, False)

    @property
    def config(self) -> dict[str, object]:
        """What the public class's configuration says of it."""
        learned = {} if self.positions is None else {"max_position_embeddings": self.positions}
        return learned | {
            "hidden_size": self.d_model, "num_hidden_layers": self.num_layers, "vocab_size": self.vocab_size,
            "type_vocab_size": self.type_vocab_size, "layer_norm_eps": self.eps, "hidden_act": "gelu",
            "use_position_embeddings": self.positions is not None, "is_prenorm": self.prenorm, "d_state": self.d_state,
            "d_conv": self.d_conv, "expand": self.expand, "headdim": self.headdim, "matrix_mixer_type": "hydra",
        }  # fmt: skip


def random_state(shape: Shape, seed: int = 0) -> State:
    """A state dict of the public class, in fp64; every tensor random, sizes such that each of them counts."""
    draw = torch.Generator().manual_seed(seed)

    def tensor(*size: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return mean + scale * torch.randn(*size, generator=draw, dtype=torch.float64)

    def norm(name: str, width: int) -> State:
        return {f"{name}.weight": tensor(width, scale=0.3, mean=1.0), f"{name}.bias": tensor(width, scale=0.3)}

    width, inner = shape.d_model, shape.expand * shape.d_model
    heads, conv = inner // shape.headdim, inner + 4 * shape.ngroups * shape.d_state
    projected = inner + conv + 2 * heads
    embeddings, predictions = "bert.embeddings.", "cls.predictions."
    state = {
        f"{embeddings}word_embeddings.weight": tensor(shape.vocab_size, width, scale=0.1),
        f"{embeddings}token_type_embeddings.weight": tensor(shape.type_vocab_size, width, scale=0.1),
    }
    if shape.positions is not None:
        state[f"{embeddings}position_embeddings.weight"] = tensor(shape.positions, width, scale=0.1)
        state[f"{embeddings}position_ids"] = torch.arange(shape.positions)[None]
    state |= norm(f"{embeddings}LayerNorm", width)
    for layer in range(shape.num_layers):
        mixer = f"bert.encoder.layer.{layer}.layer.mixer."
        state |= {
            f"{mixer}in_proj.weight": tensor(projected, width, scale=width**-0.5),
            f"{mixer}conv1d.weight": tensor(conv, 1, shape.d_conv, scale=0.5),
            f"{mixer}dt_bias": tensor(heads, mean=-1.0),
            f"{mixer}A_log": tensor(heads, scale=0.5),
            f"{mixer}D": tensor(heads),
            f"{mixer}fc_D.weight": tensor(heads, inner, scale=inner**-0.5),
            f"{mixer}norm.weight": tensor(inner, scale=0.3, mean=1.0),
            f"{mixer}out_proj.weight": tensor(width, inner, scale=inner**-0.5),
        }
        if shape.conv_bias:
            state[f"{mixer}conv1d.bias"] = tensor(conv, scale=0.3)
        if shape.bias:
            state |= {f"{mixer}in_proj.bias": tensor(projected), f"{mixer}out_proj.bias": tensor(width)}
        if shape.init_states:
            state[f"{mixer}init_states"] = tensor(heads, shape.headdim, shape.d_state)
        state |= norm(f"bert.encoder.layer.{layer}.layer.norm", width)
    if shape.prenorm:
        state |= norm("bert.encoder.norm_f", width)
    state |= norm(f"{predictions}transform.LayerNorm", width)
    return state | {
        f"{predictions}transform.dense.weight": tensor(width, width, scale=width**-0.5),
        f"{predictions}transform.dense.bias": tensor(width, scale=0.3),
        f"{predictions}decoder.weight": state[f"{embeddings}word_embeddings.weight"],
        f"{predictions}decoder.bias": tensor(shape.vocab_size, scale=0.3),
    }


def logits(state: State, input_ids: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Scores (seqlen, vocab_size) of one row of ids (seqlen,), in fp64 whatever the state's types."""
    p = {name: tensor.double() for name, tensor in state.items()}
    x = p["bert.embeddings.word_embeddings.weight"][input_ids] + p["bert.embeddings.token_type_embeddings.weight"][0]
    if shape.positions is not None:
        x = x + p["bert.embeddings.position_embeddings.weight"][: len(input_ids)]
    x = _layer_norm(x, p, "bert.embeddings.LayerNorm", shape.eps)
    for layer in range(shape.num_layers):
        prefix = f"bert.encoder.layer.{layer}.layer."
        mixer = {n.removeprefix(f"{prefix}mixer."): t for n, t in p.items() if n.startswith(f"{prefix}mixer.")}
        if shape.prenorm:
            x = x + mixed(mixer, _layer_norm(x, p, f"{prefix}norm", 1e-5), shape.ngroups, shape.dt_limit)
        else:
            x = _layer_norm(x + mixed(mixer, x, shape.ngroups, shape.dt_limit), p, f"{prefix}norm", 1e-5)
    if shape.prenorm:
        x = _layer_norm(x, p, "bert.encoder.norm_f", shape.eps)
    x = x @ p["cls.predictions.transform.dense.weight"].T + p["cls.predictions.transform.dense.bias"]
    x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    x = _layer_norm(x, p, "cls.predictions.transform.LayerNorm", 1e-12)  # whatever the configuration says
    return x @ p["bert.embeddings.word_embeddings.weight"].T + p["cls.predictions.decoder.bias"]


def mixed(p: State, u: torch.Tensor, ngroups: int, dt_limit: tuple[float, float]) -> torch.Tensor:
    """One mixer: vectors (seqlen, d_model) to the same."""
    length, (heads, inner), (conv, _, taps) = len(u), p["fc_D.weight"].shape, p["conv1d.weight"].shape
    headdim, d_state = inner // heads, (conv - inner) // (4 * ngroups)
    z, xbc, raw = (u @ p["in_proj.weight"].T + p.get("in_proj.bias", 0.0)).split((inner, conv, 2 * heads), -1)
    around = nn.functional.pad(xbc, (0, 0, taps // 2, taps // 2))
    xbc = sum(around[k : k + length] * p["conv1d.weight"][:, 0, k] for k in range(taps)) + p.get("conv1d.bias", 0.0)
    x, *readers = (xbc * torch.sigmoid(xbc)).split((inner, *4 * [ngroups * d_state]), -1)
    Bf, Cf, Bb, Cb = (part.unflatten(-1, (ngroups, d_state)) for part in readers)
    dtf, dtb = (torch.log1p(part.exp()).clamp(*dt_limit) for part in (raw + p["dt_bias"].repeat(2)).split(heads, -1))
    diagonal = x @ p["fc_D.weight"].T + p["D"]
    y = torch.zeros_like(x)
    for head in range(heads):
        group, A, own = head // (heads // ngroups), -p["A_log"][head].exp(), slice(head * headdim, (head + 1) * headdim)
        start = p["init_states"][head] if "init_states" in p else torch.zeros(headdim, d_state, dtype=u.dtype)
        for i in range(length):
            out = diagonal[i, head] * x[i, own]
            for j in range(i):
                decay = (A * dtf[j + 1 : i, head].sum()).exp()
                out = out + dtf[j, head] * decay * (Cf[i - 1, group] @ Bf[j, group]) * x[j, own]
            for j in range(i + 1, length):
                decay = (A * dtb[i + 1 : j, head].sum()).exp()
                out = out + dtb[j, head] * decay * (Cb[i + 1, group] @ Bb[j, group]) * x[j, own]
            if i > 0:
                out = out + (A * dtf[:i, head].sum()).exp() * (start @ Cf[i - 1, group])
            if i < length - 1:
                out = out + (A * dtb[i + 1 :, head].sum()).exp() * (start @ Cb[i + 1, group])
            y[i, own] = out
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["norm.weight"] * z * torch.sigmoid(z)
    return y @ p["out_proj.weight"].T + p.get("out_proj.bias", 0.0)


def _layer_norm(x: torch.Tensor, p: State, name: str, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / spread * p[f"{name}.weight"] + p[f"{name}.bias"]
