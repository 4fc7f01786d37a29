"""The definitions. Never optimised; every other path is compared with these.

Shape letters: B batch, L tokens, H heads, P channels of a head, N state width, G groups of heads that share B and C,
S documents (a row is one document unless cu_seqlens says otherwise), 2 directions: forward, backward.
"""

import torch

from .documents import check_cu_seqlens
from .precision import working_dtype


def dense_matrix(
    dt_2LH: torch.Tensor, A_H: torch.Tensor, B_2LGN: torch.Tensor, C_2LGN: torch.Tensor, diagonal_LH: torch.Tensor
) -> torch.Tensor:
    """The quasiseparable matrix M (H, L, L) of one document: y[i] = sum_j M[i, j] x[j] for each head.

    i > j:  M[i, j] = dtf[j] exp(A (dtf[j+1] + ... + dtf[i-1])) <Cf[i-1], Bf[j]>
    i = j:  M[i, i] = diagonal[i]
    i < j:  M[i, j] = dtb[j] exp(A (dtb[i+1] + ... + dtb[j-1])) <Cb[i+1], Bb[j]>

    The read-out vector and the last decay are those of the neighbour, i - 1 or i + 1: this is shift(SS) of the paper
    (arXiv 2407.09941) with the indexing of the published code, whose weights it runs.
    """
    num_heads, seqlen = A_H.shape[0], dt_2LH.shape[1]
    heads_per_group = num_heads // B_2LGN.shape[2]
    B_2LHN = B_2LGN.repeat_interleave(heads_per_group, dim=2)
    C_2LHN = C_2LGN.repeat_interleave(heads_per_group, dim=2)
    M_HLL = dt_2LH.new_zeros(num_heads, seqlen, seqlen)
    for i in range(seqlen):
        M_HLL[:, i, i] = diagonal_LH[i]
        for j in range(i):
            decay_H = torch.exp(A_H * dt_2LH[0, j + 1 : i].sum(0))
            M_HLL[:, i, j] = dt_2LH[0, j] * decay_H * (C_2LHN[0, i - 1] * B_2LHN[0, j]).sum(-1)
        for j in range(i + 1, seqlen):
            decay_H = torch.exp(A_H * dt_2LH[1, i + 1 : j].sum(0))
            M_HLL[:, i, j] = dt_2LH[1, j] * decay_H * (C_2LHN[1, i + 1] * B_2LHN[1, j]).sum(-1)
    return M_HLL


def sequential_scan(
    x_BLHP: torch.Tensor,
    dt_2BLH: torch.Tensor,
    A_H: torch.Tensor,
    B_2BLGN: torch.Tensor,
    C_2BLGN: torch.Tensor,
    *,
    diagonal_BLH: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    initial_readout: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and final states, token by token; arguments and results as in `quasiseparable_scan`.

    In each direction, with S the state entering from outside and c its read-out vector (zeros if not given), for each
    token t in that direction's order:  y[t] += S c;  S = exp(A dt[t]) S + dt[t] x[t] B[t]^T;  c = C[t].
    """
    batch, seqlen, num_heads, headdim = x_BLHP.shape
    heads_per_group = num_heads // B_2BLGN.shape[3]
    dtype = working_dtype(x_BLHP)
    x, dt, A = x_BLHP.to(dtype), dt_2BLH.to(dtype), A_H.to(dtype)
    B = B_2BLGN.to(dtype).repeat_interleave(heads_per_group, dim=3)
    C = C_2BLGN.to(dtype).repeat_interleave(heads_per_group, dim=3)

    lengths = [seqlen] if cu_seqlens is None else check_cu_seqlens(cu_seqlens, batch, seqlen)
    num_documents = batch * len(lengths)  # of equal length side by side, or one after the other in one row
    if initial_states is None:
        initial_states = x.new_zeros(2, num_documents, num_heads, headdim, B.shape[-1])
    if initial_readout is None:
        initial_readout = C.new_zeros(2, num_documents, *C_2BLGN.shape[3:])
    readout = initial_readout.to(dtype).repeat_interleave(heads_per_group, dim=2)

    y_of_token: list[torch.Tensor] = []
    final_states: list[torch.Tensor] = []
    start = 0
    for document, length in enumerate(lengths):
        rows = slice(document, document + batch)
        tokens = range(start, start + length)
        y = dict.fromkeys(tokens, x.new_zeros(batch, num_heads, headdim))
        ends = []
        for direction, order in enumerate((tokens, reversed(tokens))):
            state, c = initial_states[direction, rows].to(dtype), readout[direction, rows]
            for t in order:
                y[t] = y[t] + (state * c[:, :, None, :]).sum(-1)
                step = dt[direction, :, t, :, None, None]
                written = step * x[:, t, :, :, None] * B[direction, :, t, :, None, :]
                state = torch.exp(A[:, None, None] * step) * state + written
                c = C[direction, :, t]
            ends.append(state)
        y_of_token += [y[t] for t in tokens]
        final_states.append(torch.stack(ends))
        start += length
    y_BLHP = torch.stack(y_of_token, dim=1) if y_of_token else torch.zeros_like(x)
    if diagonal_BLH is not None:
        y_BLHP = y_BLHP + diagonal_BLH.to(dtype)[..., None] * x
    final = torch.cat(final_states, dim=1) if final_states else initial_states.to(dtype)
    return y_BLHP.to(x_BLHP.dtype), final


def conv_silu(
    x_BLC: torch.Tensor, weight_C1K: torch.Tensor, bias_C: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """SiLU(bias + sum_k weight[k] x[t + k - K // 2]), tokens outside the document counting as zero."""
    dtype = working_dtype(x_BLC)
    batch, seqlen, channels = x_BLC.shape
    lengths = [seqlen] if cu_seqlens is None else check_cu_seqlens(cu_seqlens, batch, seqlen)
    outputs = []
    for document_BLC in x_BLC.to(dtype).split(lengths, dim=1):
        convolved_BCL = torch.nn.functional.conv1d(
            document_BLC.mT,
            weight_C1K.to(dtype),
            None if bias_C is None else bias_C.to(dtype),
            padding=weight_C1K.shape[-1] // 2,
            groups=channels,
        )
        outputs.append(torch.nn.functional.silu(convolved_BCL).mT)
    return torch.cat(outputs, dim=1).to(x_BLC.dtype) if outputs else x_BLC


def gated_norm(y_BLC: torch.Tensor, z_BLC: torch.Tensor, weight_C: torch.Tensor, eps: float) -> torch.Tensor:
    """y / sqrt(mean(y^2) + eps) * weight * z * sigmoid(z)."""
    dtype = working_dtype(y_BLC)
    y, z = y_BLC.to(dtype), z_BLC.to(dtype)
    normalised = y / torch.sqrt((y * y).mean(dim=-1, keepdim=True) + eps)
    return (normalised * weight_C.to(dtype) * z * torch.sigmoid(z)).to(y_BLC.dtype)
