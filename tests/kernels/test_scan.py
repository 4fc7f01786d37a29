"""The block scan against the token by token recurrence, and that against the dense matrix; every gradient."""

from itertools import pairwise

import pytest
import torch
from compare import assert_all_close, assert_close, with_gradients
from torch.utils.flop_counter import FlopCounterMode

from hydra_kernels import quasiseparable_scan
from hydra_kernels.reference import dense_matrix

TIGHT = 1e-12


def make_inputs(
    batch: int, seqlen: int, nheads: int = 4, headdim: int = 5, ngroups: int = 2, d_state: int = 3, documents: int = 0
) -> dict[str, torch.Tensor]:
    """Random float64 inputs; with `documents`, also states and readouts that enter each."""
    generator = torch.Generator().manual_seed(batch * 1000 + seqlen)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {
        "x_BLHP": draw(batch, seqlen, nheads, headdim),
        "dt_2BLH": torch.nn.functional.softplus(draw(2, batch, seqlen, nheads) - 1),
        "A_H": -torch.exp(draw(nheads)),
        "B_2BLGN": draw(2, batch, seqlen, ngroups, d_state),
        "C_2BLGN": draw(2, batch, seqlen, ngroups, d_state),
        "diagonal_BLH": draw(batch, seqlen, nheads),
    }
    if documents:
        inputs["initial_states"] = draw(2, documents, nheads, headdim, d_state)
        inputs["initial_readout"] = draw(2, documents, ngroups, d_state)
    return inputs


def borders(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("seqlen", [1, 2, 3, 13])
def test_recurrence_is_the_dense_matrix(seqlen: int) -> None:
    inputs = make_inputs(1, seqlen)
    y = quasiseparable_scan(**inputs, backend="reference")
    M_HLL = dense_matrix(
        inputs["dt_2BLH"][:, 0],
        inputs["A_H"],
        inputs["B_2BLGN"][:, 0],
        inputs["C_2BLGN"][:, 0],
        inputs["diagonal_BLH"][0],
    )
    assert_close(y[0], torch.einsum("hij,jhp->ihp", M_HLL, inputs["x_BLHP"][0]), TIGHT)


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
@pytest.mark.parametrize(
    ("batch", "seqlen", "nheads", "headdim", "ngroups", "d_state"),
    [(1, 1, 2, 3, 1, 2), (3, 1, 2, 3, 2, 1), (2, 2, 2, 1, 1, 4), (1, 63, 4, 5, 4, 3), (2, 64, 4, 5, 2, 3),
     (1, 65, 2, 4, 1, 8), (2, 150, 6, 3, 3, 2)],
    ids=lambda value: str(value),
)  # fmt: skip
def test_rows(batch: int, seqlen: int, nheads: int, headdim: int, ngroups: int, d_state: int, chunk_size: int) -> None:
    inputs = make_inputs(batch, seqlen, nheads, headdim, ngroups, d_state, documents=batch)
    found, expected = (
        with_gradients(
            lambda backend=backend, **values: quasiseparable_scan(
                **values, return_final_states=True, chunk_size=chunk_size, backend=backend
            ),
            inputs,
        )
        for backend in ("torch", "reference")
    )
    assert_all_close(found, expected, TIGHT)


@pytest.mark.parametrize("lengths", [[1], [1] * 9, [70, 1, 2, 64, 13], [3, 130], [64, 64], [5, 5, 5]], ids=str)
def test_packed_documents_are_each_alone(lengths: list[int]) -> None:
    inputs = make_inputs(1, sum(lengths), documents=len(lengths))
    cu_seqlens = borders(lengths)
    packed = with_gradients(
        lambda **values: quasiseparable_scan(**values, cu_seqlens=cu_seqlens, return_final_states=True), inputs
    )

    def one_by_one(**values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs, states = [], []
        for index, (first, last) in enumerate(pairwise(cu_seqlens)):
            document = {
                "x_BLHP": values["x_BLHP"][:, first:last],
                "A_H": values["A_H"],
                "diagonal_BLH": values["diagonal_BLH"][:, first:last],
                **{name: values[name][:, :, first:last] for name in ("dt_2BLH", "B_2BLGN", "C_2BLGN")},
                **{name: values[name][:, index : index + 1] for name in ("initial_states", "initial_readout")},
            }
            y, final = quasiseparable_scan(**document, return_final_states=True, backend="reference")
            outputs.append(y)
            states.append(final)
        return torch.cat(outputs, 1), torch.cat(states, 1)

    assert_all_close(packed, with_gradients(one_by_one, inputs), TIGHT)


@pytest.mark.parametrize("cut", [1, 30, 64, 99])
def test_two_slices_chained_are_the_whole(cut: int) -> None:
    """What context parallelism does: the state and the border's C travel, nothing else; in the middle of documents."""
    cu_seqlens = borders([20, 70, 10])
    inputs = make_inputs(1, 100)
    whole = with_gradients(lambda **values: quasiseparable_scan(**values, cu_seqlens=cu_seqlens), inputs)

    def cut_in_two(**values: torch.Tensor) -> torch.Tensor:
        def side(first: int, last: int) -> dict[str, torch.Tensor]:
            inner = cu_seqlens[(cu_seqlens > first) & (cu_seqlens < last)]
            part = {name: values[name][:, :, first:last] for name in ("dt_2BLH", "B_2BLGN", "C_2BLGN")}
            part |= {name: values[name][:, first:last] for name in ("x_BLHP", "diagonal_BLH")}
            return part | {"A_H": values["A_H"], "cu_seqlens": torch.tensor([first, *inner, last]) - first}

        left, right = side(0, cut), side(cut, 100)
        divides = cut in cu_seqlens
        _, left_final = quasiseparable_scan(**left, return_final_states=True)
        _, right_final = quasiseparable_scan(**right, return_final_states=True)
        outputs = []
        for part, entering, readout, document in (
            (left, right_final[1, 0], values["C_2BLGN"][1, 0, cut], -1),
            (right, left_final[0, -1], values["C_2BLGN"][0, 0, cut - 1], 0),
        ):
            num_documents, direction = part["cu_seqlens"].numel() - 1, 1 if document == -1 else 0
            states = entering.new_zeros(2, num_documents, *entering.shape)
            readouts = readout.new_zeros(2, num_documents, *readout.shape)
            if not divides:
                index = (torch.tensor(direction), torch.tensor(document % num_documents))
                states, readouts = states.index_put(index, entering), readouts.index_put(index, readout)
            outputs.append(quasiseparable_scan(**part, initial_states=states, initial_readout=readouts))
        return torch.cat(outputs, 1)

    assert_all_close(with_gradients(cut_in_two, inputs), whole, TIGHT)


def test_fp32_gradients_of_heads_that_forget_at_once() -> None:
    """Only neighbours, whose decay is 1, see each other as much as ever; what they say must not drown the others."""
    inputs = make_inputs(1, 96)
    inputs["dt_2BLH"] *= 10.0
    inputs["A_H"] = -torch.tensor([10.0, 13.0, 17.0, 20.0], dtype=torch.float64)
    found, expected = (
        with_gradients(
            lambda backend=backend, **values: quasiseparable_scan(**values, backend=backend),
            {name: tensor.to(dtype) for name, tensor in inputs.items()},
        )
        for backend, dtype in (("torch", torch.float32), ("reference", torch.float64))
    )
    assert_close(found.pop("gradient of A_H"), expected.pop("gradient of A_H"), 1e-4, "A")
    assert_all_close(found, expected, 1e-5)


@pytest.mark.parametrize("step", [0.0, 1e-8, 50.0, 1000.0])
def test_extreme_steps(step: float) -> None:
    inputs = make_inputs(1, 70)
    inputs["dt_2BLH"] = torch.full_like(inputs["dt_2BLH"], step)
    found, expected = (
        with_gradients(lambda backend=backend, **values: quasiseparable_scan(**values, backend=backend), inputs)
        for backend in ("torch", "reference")
    )
    assert_all_close(
        found, expected, TIGHT, floor=1e3
    )  # what is forgotten at once leaves sums of about 1e3 that cancel


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_precisions(dtype: torch.dtype, tolerance: float) -> None:
    inputs = make_inputs(2, 150)
    expected = quasiseparable_scan(**inputs, backend="reference")
    low = {name: t.to(dtype if name[0] in "xBC" else torch.float32) for name, t in inputs.items()}
    found, states = quasiseparable_scan(**low, return_final_states=True)
    assert (found.dtype, states.dtype) == (dtype, torch.float32)
    assert_close(found, expected, tolerance)


def test_nothing_at_all() -> None:
    inputs = make_inputs(1, 0)
    assert quasiseparable_scan(**inputs).shape == (1, 0, 4, 5)
    assert quasiseparable_scan(**inputs, cu_seqlens=torch.tensor([0])).shape == (1, 0, 4, 5)


def test_cost_is_linear_in_the_length() -> None:
    def flops(seqlen: int) -> int:
        inputs = make_inputs(1, seqlen)
        with FlopCounterMode(display=False) as counter:
            quasiseparable_scan(**inputs)
        return counter.get_total_flops()

    assert flops(2048) == 2 * flops(1024) == 16 * flops(128) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "backend is 'cuda'; choose one of"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"cu_seqlens": torch.tensor([0, 5, 9])}, "cu_seqlens ends at 9 but the input has 10 tokens"),
        ({"cu_seqlens": torch.tensor([1, 10])}, "cu_seqlens starts at 1"),
        ({"cu_seqlens": torch.tensor([0, 4, 4, 10])}, "document 1 the length 0"),
        ({"cu_seqlens": torch.tensor([0, 6, 4, 10])}, "document 1 the length -2"),
        ({"cu_seqlens": torch.tensor([0.0, 10.0])}, "expected int32 or int64"),
        ({"cu_seqlens": [0, 10]}, "is a list; expected a tensor"),
        ({"A_H": torch.zeros(3)}, "A has shape"),
        ({"B_2BLGN": torch.zeros(2, 1, 10, 2, 0)}, "a d_state of 0; expected at least 1"),
        ({"initial_states": torch.zeros(1)}, "initial_states has shape"),
    ],
)  # fmt: skip
def test_misuse_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        quasiseparable_scan(**(make_inputs(1, 10) | change))
