"""`hydra-scale bench tune`: the fastest launches of the scan's kernels on this device, kept in a file that every later
process on such a device reads (`hydra_kernels.tuned`). Training itself never searches.

A small search: from the settings in use, one field after the other is tried at each of its values while the others
stay, and the better value is kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hydra_kernels import Documents
from hydra_kernels.scan_inputs import ScanInputs
from hydra_kernels.triton_scan import scan_backward, scan_forward
from hydra_kernels.tuned import Launch, Settings, file_of, settings, write
from hydra_scale.bench.instrument import Instrument, Timing, interleave
from hydra_scale.bench.peers import attempt
from hydra_scale.bench.table import Row

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAUNCHES = tuple(Launch(*pair) for pair in ((4, 1), (4, 2), (4, 3), (4, 4), (8, 1), (8, 2), (8, 3)))
CHUNKS = (32, 64, 128)
FIELDS: dict[str, tuple[Any, ...]] = {
    "forward_chunk": CHUNKS,
    "output": LAUNCHES,
    "backward_chunk": CHUNKS,
    "sweep": LAUNCHES,
    "transposed": tuple(launch for launch in LAUNCHES if launch.num_stages > 1),
    "within": LAUNCHES,
    "across": LAUNCHES,
}
"""What is tried, in this order: each chunk before the kernels that it decides about. `transposed` in one stage is
compiled wrongly for heads of 32 (Triton 3.6, Hopper): a product of it reads outside shared memory."""
_GAIN = 0.995
"""A value must make the scan faster than this share of its time; less is noise, and settings should not wander."""


@dataclass(frozen=True)
class Shape:
    """What the settings are for, and how much work they are timed on."""

    headdim: int
    d_state: int
    dtype: str
    tokens: int
    channels: int
    """Of all heads together."""


def run(
    shape: Shape,
    device: torch.device,
    instrument: Instrument,
    num_rounds: int = 10,
    fields: dict[str, tuple[Any, ...]] = FIELDS,
) -> Iterator[list[Row]]:
    """Rows as they are measured, forward and backward pass together; at the end the file is written."""
    dtype = DTYPES[shape.dtype]
    scan = _Scan(shape, dtype, device)
    best = settings(shape.headdim, shape.d_state, dtype, device)
    what = f"scan P={shape.headdim} N={shape.d_state} {shape.dtype}"
    row, fastest = _timed(scan, best, what, "as it was", instrument, num_rounds)
    yield [row]
    for field, values in fields.items():
        group = []
        for value in values:
            if value == getattr(best, field):
                continue
            tried = best._replace(**{field: value})
            row, milliseconds = _timed(scan, tried, what, f"{field} {_words(value)}", instrument, num_rounds)
            group.append((milliseconds, row, tried))
        for milliseconds, _, tried in group:
            if milliseconds < _GAIN * fastest:
                best, fastest = tried, milliseconds
        yield [row for _, row, _ in group]
    row, _ = _timed(scan, best, what, "chosen", instrument, num_rounds)
    write(file_of(device), {(shape.headdim, shape.d_state, str(dtype).removeprefix("torch.")): best})
    yield [row]


def _timed(
    scan: Callable[[Settings], None], chosen: Settings, what: str, name: str, instrument: Instrument, num_rounds: int
) -> tuple[Row, float]:
    """A row, and its time; one that cannot be launched says why, and takes for ever."""
    row = Row(what, name, direction="forward+backward")
    _, row.status = attempt(lambda: scan(chosen))  # compiles, or finds too little shared memory
    if row.status != "ok":
        return row, float("inf")
    interleave([lambda: scan(chosen)], 2, instrument)
    (times,) = interleave([lambda: scan(chosen)], num_rounds, instrument)
    row.took(Timing.of(times))
    return row, Timing.of(times).median


def _words(value: int | Launch) -> str:
    return f"{value.num_warps} warps, {value.num_stages} stages" if isinstance(value, Launch) else str(value)


class _Scan:
    """Both passes over random tokens of one document, as a mixer runs them."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        tokens, heads = shape.tokens, max(1, shape.channels // shape.headdim)
        generator = torch.Generator(device).manual_seed(0)

        def draw(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(sizes, generator=generator, device=device).to(dtype)

        rows = Documents.rows(1, tokens, device)
        vectors_T4GN = draw(tokens, 2, 2, 1, shape.d_state)
        readers = vectors_T4GN.permute(1, 2, 0, 3, 4)
        self._inputs = ScanInputs(
            x_THP=draw(tokens, heads, shape.headdim),
            steps_2TH=draw(2, tokens, heads) - 4.0,
            A_H=draw(heads, dtype=torch.float32),
            B_2TGN=readers[:, 0],
            C_2TGN=readers[:, 1],
            diagonal_TH=draw(tokens, heads),
            D_H=draw(heads, dtype=torch.float32),
            bias_H=draw(heads, dtype=torch.float32),
            step_limit=(0.0, float("inf")),
            starts_T=rows.starts_T,
            ends_T=rows.ends_T,
            borders=None,
            initial_2SHPN=None,
            readout_2SGN=None,
            chunk_size=max(CHUNKS),
        )
        self._weight_HI = draw(heads, heads * shape.headdim)
        self._grad_THP = draw(tokens, heads, shape.headdim)
        self._grad_x, self._grad_steps = (torch.empty_like(t) for t in (self._grad_THP, self._inputs.steps_2TH))
        self._grad_vectors = torch.empty_like(vectors_T4GN).flatten(1)

    def __call__(self, chosen: Settings) -> None:
        scan_forward(self._inputs, chosen=chosen)
        scan_backward(
            self._inputs,
            self._grad_THP,
            None,
            self._grad_x,
            self._grad_steps,
            self._grad_vectors,
            diagonal_weight_HI=self._weight_HI,
            chosen=chosen,
        )
