"""The operations of the Hydra mixer, and the mixer itself. Needs torch only; usable without the rest of the project."""

from .backends import BACKENDS
from .border import state_after
from .conv import depthwise_conv_silu
from .documents import Documents
from .mixer import HydraMixer, ScanOperands, hydra_mix, scan_operands
from .norm import gated_rms_norm, sum_of_squares
from .residual import add_norm
from .scan import quasiseparable_scan

__all__ = [
    "BACKENDS",
    "Documents",
    "HydraMixer",
    "ScanOperands",
    "add_norm",
    "depthwise_conv_silu",
    "gated_rms_norm",
    "hydra_mix",
    "quasiseparable_scan",
    "scan_operands",
    "state_after",
    "sum_of_squares",
]
