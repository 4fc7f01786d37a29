"""The arguments of the scan on Triton kernels."""

from typing import NamedTuple

import torch


class ScanInputs(NamedTuple):
    """What both passes read. Last dimensions are contiguous, all others may be strided."""

    x_THP: torch.Tensor
    steps_2TH: torch.Tensor
    A_H: torch.Tensor
    """Negative; the logarithm of -A where `bias_H` is given."""
    B_2TGN: torch.Tensor
    C_2TGN: torch.Tensor
    diagonal_TH: torch.Tensor | None
    D_H: torch.Tensor | None
    bias_H: torch.Tensor | None
    """Given: steps are raw, dt = clamp(softplus(steps + bias), step_limit). Absent: steps are dt."""
    step_limit: tuple[float, float]
    starts_T: torch.Tensor
    ends_T: torch.Tensor
    borders: torch.Tensor | None
    """cu_seqlens (S + 1,): chunks end at documents, whose states may enter and leave."""
    initial_2SHPN: torch.Tensor | None
    readout_2SGN: torch.Tensor | None
    chunk_size: int
    beside_2GN: torch.Tensor | None = None
    """Of C's memory the rows before its first token, forward, and behind its last, backward, for what an exchange
    brings: documents that go on elsewhere are read there. Absent: they are read through `readout_2SGN`, slower."""

    def with_readout(self, readout_2GN: torch.Tensor) -> "ScanInputs":
        """The same once the vectors of the tokens beside these have come."""
        if self.beside_2GN is None:
            return self._replace(readout_2SGN=readout_2GN[:, None].contiguous())
        self.beside_2GN.copy_(readout_2GN)
        return self
