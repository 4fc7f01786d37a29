"""The quasiseparable scan: a forward and a backward state space recurrence, shifted by one token, plus a diagonal."""

import torch

from .backends import resolve_backend
from .block_scan import block_scan
from .blocks import BlockLayout, block_layout
from .documents import Documents
from .mamba_scan import mamba_scan
from .precision import without_autocast, working_dtype
from .reference import sequential_scan
from .triton_language import available

if available:
    from .triton_operators import triton_scan

_MAX_BLOCK_LEN = 64


def quasiseparable_scan(
    x_BLHP: torch.Tensor,
    dt_2BLH: torch.Tensor,
    A_H: torch.Tensor,
    B_2BLGN: torch.Tensor,
    C_2BLGN: torch.Tensor,
    *,
    diagonal_BLH: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | Documents | None = None,
    initial_states: torch.Tensor | None = None,
    initial_readout: torch.Tensor | None = None,
    return_final_states: bool = False,
    chunk_size: int = 256,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = M x for each document and head, M the quasiseparable matrix of `reference.dense_matrix`.

    x: (batch, seqlen, nheads, headdim), fp64, fp32, bf16 or fp16. A leading 2 is (forward, backward).
    dt: (2, batch, seqlen, nheads), steps >= 0, after softplus and clamp.    A: (nheads,), negative.
    B, C: (2, batch, seqlen, ngroups, d_state); head h uses group h // (nheads / ngroups).
    diagonal: (batch, seqlen, nheads), the diagonal of M; absent: 0.
    cu_seqlens: (num_documents + 1,) int32 or int64, borders of the documents laid end to end in a batch of 1; absent:
        every row is a document. No document influences another, not even by rounding. `Documents.of` checks and copies
        them once for many calls.
    initial_states: (2, S, nheads, headdim, d_state) for the S documents: the state that enters a document from its left
        (forward) and from its right (backward); absent: zeros.
    initial_readout: (2, S, ngroups, d_state): C of the token just outside, with which the first (forward) or last
        (backward) token reads the entering state; absent: zeros, that token reads nothing, as in the published model.
    chunk_size: upper bound of the tokens handled as one matrix; changes the result by rounding only.
    backend: "triton" (fused kernels; fp32, bf16 and fp16 on CUDA), "torch" (blocks of PyTorch operations), "reference"
        (token by token), "mamba" (mamba-ssm's scan called twice, to compare with; unpacked rows without states),
        "auto" ("triton" where it can run, else "torch").

    Returns y of x's shape and dtype; with `return_final_states` also the states (2, S, nheads, headdim, d_state) after
    the last token (forward) and after the first (backward). A document cut in two and chained by initial_states and
    initial_readout gives what it gives whole. Steps, decays and states are fp32 (fp64 for fp64 x), also under autocast.
    Raises ValueError for shapes or borders that do not fit together, chunk_size < 1 or an unknown backend.
    """
    backend = resolve_backend(backend, x_BLHP)
    _check_shapes(x_BLHP, dt_2BLH, A_H, B_2BLGN, C_2BLGN, diagonal_BLH)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; expected at least 1")
    batch, seqlen = x_BLHP.shape[:2]
    device = x_BLHP.device
    documents = None if cu_seqlens is None else Documents.of(cu_seqlens, batch, seqlen, device)
    lengths = [seqlen] * batch if documents is None else documents.lengths
    _check_edges(initial_states, initial_readout, len(lengths), x_BLHP, B_2BLGN)
    has_edges = return_final_states or initial_states is not None or initial_readout is not None
    final_states: torch.Tensor | None
    with without_autocast(x_BLHP):
        if backend == "triton" and x_BLHP.numel():
            y_BLHP, final_states = triton_scan(
                x_BLHP,
                dt_2BLH,
                A_H,
                B_2BLGN,
                C_2BLGN,
                diagonal_BLH=diagonal_BLH,
                documents=documents or Documents.rows(batch, seqlen, device),
                initial_states=initial_states,
                initial_readout=initial_readout,
                return_final_states=return_final_states,
                chunk_size=chunk_size,
            )
        elif backend == "mamba":
            if has_edges or documents is not None:
                raise ValueError("backend 'mamba' takes unpacked rows without states; choose 'auto' for the others")
            y_BLHP = mamba_scan(
                x_BLHP, dt_2BLH, A_H, B_2BLGN, C_2BLGN, diagonal_BLH=diagonal_BLH, chunk_size=chunk_size
            )
            final_states = None
        elif backend == "reference":
            y_BLHP, final_states = sequential_scan(
                x_BLHP,
                dt_2BLH,
                A_H,
                B_2BLGN,
                C_2BLGN,
                diagonal_BLH=diagonal_BLH,
                cu_seqlens=None if documents is None else documents.borders,
                initial_states=initial_states,
                initial_readout=initial_readout,
            )
        else:
            y_BLHP, final_states = _scan_in_blocks(
                x_BLHP,
                dt_2BLH,
                A_H,
                B_2BLGN,
                C_2BLGN,
                diagonal_BLH,
                lengths,
                initial_states,
                initial_readout,
                chunk_size,
            )
    if not return_final_states:
        return y_BLHP
    assert final_states is not None
    return y_BLHP, final_states


def _scan_in_blocks(
    x_BLHP: torch.Tensor,
    dt_2BLH: torch.Tensor,
    A_H: torch.Tensor,
    B_2BLGN: torch.Tensor,
    C_2BLGN: torch.Tensor,
    diagonal_BLH: torch.Tensor | None,
    lengths: list[int],
    initial_states: torch.Tensor | None,
    initial_readout: torch.Tensor | None,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows end to end, aligned to blocks, scanned, and put back."""
    dtype = working_dtype(x_BLHP)
    if initial_states is None:
        d_state = B_2BLGN.shape[-1]
        initial_states = x_BLHP.new_zeros(2, len(lengths), *x_BLHP.shape[2:], d_state, dtype=dtype)
    if x_BLHP.shape[0] * x_BLHP.shape[1] == 0:
        return torch.zeros_like(x_BLHP), initial_states.to(dtype)

    longest = max(lengths)
    block_len = min(chunk_size, _MAX_BLOCK_LEN, 1 << (longest - 1).bit_length())
    layout = block_layout(lengths, block_len, x_BLHP.device)
    dt, B, C = (t.to(dtype).flatten(1, 2) for t in (dt_2BLH, B_2BLGN, C_2BLGN))
    y_KQHP, final_2SHPN = block_scan(
        layout.align(x_BLHP.to(dtype).flatten(0, 1)),
        layout.align(dt, dim=1),
        A_H.to(dtype),
        layout.align(B, dim=1),
        layout.align(_neighbours_readout(C, initial_readout, layout), dim=1),
        None if diagonal_BLH is None else layout.align(diagonal_BLH.to(dtype).flatten(0, 1)),
        initial_states.to(dtype).index_select(1, layout.documents_S),
        layout.blocks_per_step,
    )
    y_BLHP = layout.restore(y_KQHP).to(x_BLHP.dtype).view(x_BLHP.shape)
    return y_BLHP, final_2SHPN.index_select(1, layout.documents_S.argsort())


def _neighbours_readout(
    C_2TGN: torch.Tensor, initial_readout: torch.Tensor | None, layout: BlockLayout
) -> torch.Tensor:
    """At each token C of the token before it (forward) or after it (backward); at the borders `initial_readout`."""
    if initial_readout is None:
        initial_readout = C_2TGN.new_zeros(2, len(layout.first_S), *C_2TGN.shape[2:])
    entering = initial_readout.to(C_2TGN.dtype)
    pad = torch.nn.functional.pad
    forward = pad(C_2TGN[0, :-1], (0, 0, 0, 0, 1, 0)).index_copy(0, layout.first_S, entering[0])
    backward = pad(C_2TGN[1, 1:], (0, 0, 0, 0, 0, 1)).index_copy(0, layout.last_S, entering[1])
    return torch.stack((forward, backward))


def _check_shapes(
    x_BLHP: torch.Tensor,
    dt_2BLH: torch.Tensor,
    A_H: torch.Tensor,
    B_2BLGN: torch.Tensor,
    C_2BLGN: torch.Tensor,
    diagonal_BLH: torch.Tensor | None,
) -> None:
    if x_BLHP.ndim != 4 or B_2BLGN.ndim != 5:
        raise ValueError(
            f"x has shape {tuple(x_BLHP.shape)} and B {tuple(B_2BLGN.shape)}; expected x (batch, seqlen, nheads, "
            "headdim) and B (2, batch, seqlen, ngroups, d_state)"
        )
    batch, seqlen, nheads, _ = x_BLHP.shape
    ngroups, d_state = B_2BLGN.shape[3:]
    if d_state == 0:
        raise ValueError(f"B has shape {tuple(B_2BLGN.shape)}, a d_state of 0; expected at least 1")
    _check_shape("dt", dt_2BLH, (2, batch, seqlen, nheads))
    _check_shape("A", A_H, (nheads,))
    _check_shape("B", B_2BLGN, (2, batch, seqlen, ngroups, d_state))
    _check_shape("C", C_2BLGN, (2, batch, seqlen, ngroups, d_state))
    if diagonal_BLH is not None:
        _check_shape("diagonal", diagonal_BLH, (batch, seqlen, nheads))
    if ngroups == 0 or nheads % ngroups:
        raise ValueError(f"B and C have {ngroups} groups; expected a number that divides the {nheads} heads of x")


def _check_edges(
    initial_states: torch.Tensor | None,
    initial_readout: torch.Tensor | None,
    num_documents: int,
    x_BLHP: torch.Tensor,
    B_2BLGN: torch.Tensor,
) -> None:
    if initial_states is not None:
        _check_shape("initial_states", initial_states, (2, num_documents, *x_BLHP.shape[2:], B_2BLGN.shape[-1]))
    if initial_readout is not None:
        _check_shape("initial_readout", initial_readout, (2, num_documents, *B_2BLGN.shape[3:]))


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {expected} to go with x and B")
