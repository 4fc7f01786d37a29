"""The encoder on padded rows, in operations that a graph can hold: what `torch_export` exports.

The operations of hydra_kernels lay documents end to end, which makes shapes depend on values; a graph cannot hold that.
So this is a second writing of the same mathematics: padding stands at the ends of a row, adds nothing to a state (its
step is 0), is not convolved over (it is 0) and reads nothing. Conversion compares it with the source. Parameters have
their logical names.

Shape letters as in `hydra_kernels.mixer`; K blocks of Q tokens, R heads of a group.
"""

import torch
from torch import nn

from hydra_kernels import HydraMixer, gated_rms_norm
from hydra_scale.config import ModelConfig
from hydra_scale.model.norm import LayerNorm, make_norm

_BLOCK_LEN = 64
"""Tokens handled as one matrix. States pass between K blocks by one product with a (K, K) matrix, which is quadratic:
by count of products 1.3 times the rest of the scan at 16,384 tokens of the base model."""


class PaddedMixer(HydraMixer):
    """`HydraMixer` in operations that a graph can hold; the same parameters."""

    def forward(self, u_BLD: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """(batch, seqlen, d_model) to the same, zeros where the mask (batch, seqlen) is 0."""
        d_inner, nheads, headdim, d_state, ngroups, dt_limit, norm_eps, _ = self.shape
        width = ngroups * d_state
        present_BL1 = attention_mask.to(u_BLD.dtype)[..., None]
        z_BLI, conv_BLC, raw_BLH = self.in_proj(u_BLD).split(self.shape.widths, dim=-1)
        conv_BCL = nn.functional.conv1d(
            (conv_BLC * present_BL1).mT,
            self.conv1d.weight,
            self.conv1d.bias,
            padding=self.conv1d.weight.shape[-1] // 2,
            groups=d_inner + 4 * width,
        )
        conv_BLC = nn.functional.silu(conv_BCL.mT) * present_BL1
        x_BLI, *readers = conv_BLC.split([d_inner, width, width, width, width], dim=-1)
        Bf, Cf, Bb, Cb = (part.unflatten(-1, (ngroups, d_state)) for part in readers)
        steps = [
            nn.functional.softplus(raw + self.dt_bias).clamp(*dt_limit) * present_BL1
            for raw in raw_BLH.split(nheads, dim=-1)
        ]
        x_BLHP = x_BLI.unflatten(-1, (nheads, headdim))
        # Both directions at once, the backward one as mirrored rows behind the others.
        both = (torch.cat((ahead, back.flip(1))) for ahead, back in ((x_BLHP, x_BLHP), steps, (Bf, Bb), (Cf, Cb)))
        y_2BLHP = _shifted_scan(*both, A_H=-self.A_log.exp(), initial_HPN=self.init_states)
        forward_BLHP, backward_BLHP = y_2BLHP.unflatten(0, (2, -1)).unbind()
        diagonal_BLH = self.fc_D(x_BLI) + self.D
        y_BLHP = forward_BLHP + backward_BLHP.flip(1) + diagonal_BLH[..., None] * x_BLHP
        y_BLI = gated_rms_norm(y_BLHP.flatten(2), z_BLI, self.norm.weight, eps=norm_eps)
        return self.out_proj(y_BLI) * present_BL1


def _shifted_scan(
    x_BLHP: torch.Tensor,
    dt_BLH: torch.Tensor,
    B_BLGN: torch.Tensor,
    C_BLGN: torch.Tensor,
    *,
    A_H: torch.Tensor,
    initial_HPN: torch.Tensor | None,
) -> torch.Tensor:
    """y[t + 1] = C[t] h[t], y[0] = 0, with h[t] = exp(dt[t] A) h[t - 1] + dt[t] B[t] x[t] and h[-1] the initial state.

    In blocks: a product within each block, the states between them by one product with a (K, K) matrix of decays.
    """
    seqlen, num_groups = x_BLHP.shape[1], B_BLGN.shape[2]
    x, dt, B, C = (_in_blocks(t) for t in (x_BLHP, dt_BLH, B_BLGN, C_BLGN))
    x, dt = x.unflatten(3, (num_groups, -1)), dt.unflatten(3, (num_groups, -1))  # heads as (group, head of the group)
    log_decay = (dt * A_H.unflatten(0, (num_groups, -1))).movedim(2, -1)  # (B, K, G, R, Q)
    upto = log_decay.cumsum(-1)
    within = _lower_exp(upto[..., :, None] - upto[..., None, :])  # (B, K, G, R, Q, Q)
    scores = torch.einsum("bkigN,bkjgN->bkgij", C, B)
    weighted = dt[..., None] * x
    y = torch.einsum("bkgij,bkgrij,bkjgrp->bkigrp", scores, within, weighted)

    to_end = (upto[..., -1:] - upto).exp()
    written = torch.einsum("bkgrj,bkjgN,bkjgrp->bkgrpN", to_end, B, weighted)
    through = upto[..., -1]  # (B, K, G, R), the decay of a whole block
    entering = torch.einsum("bgrkm,bmgrpN->bkgrpN", _decay_between_blocks(through), written)
    if initial_HPN is not None:
        from_start = (through.cumsum(1) - through).exp()
        entering = entering + from_start[..., None, None] * initial_HPN.unflatten(0, (num_groups, -1))
    y = y + torch.einsum("bkigN,bkgri,bkgrpN->bkigrp", C, upto.exp(), entering)
    y_BLHP = y.flatten(3, 4).flatten(1, 2)[:, :seqlen]
    return nn.functional.pad(y_BLHP, (0, 0, 0, 0, 1, 0))[:, :-1]


def _in_blocks(t_BLX: torch.Tensor) -> torch.Tensor:
    """(B, L, ...) to (B, K, Q, ...), zeros behind the end.

    At least two blocks: a number that can be 1 would be taken for a constant, and the length with it.
    """
    num_blocks = (t_BLX.shape[1] + _BLOCK_LEN - 1) // _BLOCK_LEN + 1
    behind = num_blocks * _BLOCK_LEN - t_BLX.shape[1]
    padded = nn.functional.pad(t_BLX, (0, 0) * (t_BLX.ndim - 2) + (0, behind))
    return padded.view(t_BLX.shape[0], num_blocks, _BLOCK_LEN, *t_BLX.shape[2:])


def _lower_exp(exponent: torch.Tensor) -> torch.Tensor:
    """exp on and below the diagonal of the last two axes, 0 above it, where the exponent may be large."""
    index = torch.arange(exponent.shape[-1], device=exponent.device)
    return exponent.masked_fill(index[:, None] < index, -torch.inf).exp()


def _decay_between_blocks(through_BKGR: torch.Tensor) -> torch.Tensor:
    """(B, G, R, K, K): decay of what block m wrote on its way to the start of block k; 0 unless m < k.

    The exponents are summed for each m on its own: differences of one running sum would lose digits on long rows.
    """
    through_BGRK = through_BKGR.movedim(1, -1)
    index = torch.arange(through_BGRK.shape[-1], device=through_BGRK.device)
    passed = through_BGRK[..., :, None].masked_fill(index[:, None] <= index, 0.0)  # block l, seen from block m
    exponent = passed.cumsum(-2) - passed
    return exponent.masked_fill(index[:, None] <= index, -torch.inf).exp()


class _PaddedAttention(nn.Module):
    """Attention among the tokens of each row."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.attention.num_heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x_BLD: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x_BLD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask.bool()[:, None, None, :])
        return self.out_proj(y.transpose(1, 2).flatten(2))


class _PaddedMlp(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = round(config.mlp.expansion * config.d_model)
        self.up, self.down = nn.Linear(config.d_model, width), nn.Linear(width, config.d_model)

    def forward(self, x_BLD: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(x_BLD)))


class _PaddedLayer(nn.Module):
    """As `hydra_scale.model.encoder.Layer`."""

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        mixer = config.mixer.model_dump(exclude={"backend"})
        self.mixer = {
            "H": lambda: PaddedMixer(config.d_model, **mixer),
            "A": lambda: _PaddedAttention(config),
            "M": lambda: _PaddedMlp(config),
        }[kind]()
        self.norm = make_norm(config, config.norm_eps)
        self._pre_norm = config.norm_position == "pre"

    def forward(self, x_BLD: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        if self._pre_norm:
            return x_BLD + self.mixer(self.norm(x_BLD), attention_mask)
        return self.norm(x_BLD + self.mixer(x_BLD, attention_mask))


class _Embedding(nn.Module):
    """Word, segment 0 and learned position, normalised."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, config.d_model)
        self.segment = nn.Embedding(config.type_vocab_size, config.d_model)
        learned = config.position_embedding == "learned"
        self.position = nn.Embedding(config.max_positions, config.d_model) if learned else None
        self.norm = LayerNorm(config.d_model, eps=config.embedding_norm_eps)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x_BLD = self.word(input_ids) + self.segment.weight[0]
        if self.position is not None:
            x_BLD = x_BLD + self.position((attention_mask.cumsum(-1) - 1).clamp(min=0))
        return self.norm(x_BLD)


class _Layers(nn.Module):
    """The stack, as `hydra_scale.model.encoder.Encoder`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_PaddedLayer(config, kind) for kind in config.layer_kinds)
        pre_norm = config.norm_position == "pre"
        self.final_norm = make_norm(config, config.embedding_norm_eps) if pre_norm else None

    def forward(self, x_BLD: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x_BLD = layer(x_BLD, attention_mask)
        return x_BLD if self.final_norm is None else self.final_norm(x_BLD)


class PaddedEncoder(nn.Module):
    """Tokens to vectors; the embedding and the encoder of the masked language model, without its head."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.embedding = _Embedding(config, vocab_size)
        self.encoder = _Layers(config)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """input_ids, attention_mask (batch, seqlen) int64 to vectors (batch, seqlen, d_model), zeros at padding.

        The tokens of a row stand together: padding before or behind them, none between.
        """
        x_BLD = self.encoder(self.embedding(input_ids, attention_mask), attention_mask)
        return x_BLD.masked_fill(attention_mask[..., None] == 0, 0.0)
