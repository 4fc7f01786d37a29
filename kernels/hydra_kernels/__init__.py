"""The operations of the Hydra mixer, and the mixer itself. Needs torch only; usable without the rest of the project."""

from .adamw import adamw_
from .adamw_arguments import AdamWNumbers, AdamWState
from .backends import BACKENDS, resolve_backend
from .border import state_after
from .conv import depthwise_conv_silu
from .cross_entropy import cross_entropy
from .documents import Documents
from .dropout import keyed_dropout
from .exchange import Entered, Exchange, Leaving, entered_from
from .mix_arguments import MixShape, MixWeights
from .mixer import HydraMixer, ScanOperands, hydra_mix, hydra_mix_of_stretch, scan_operands
from .norm import gated_rms_norm, sum_of_squares
from .residual import add_norm
from .scan import quasiseparable_scan

__all__ = [
    "BACKENDS",
    "AdamWNumbers",
    "AdamWState",
    "Documents",
    "Entered",
    "Exchange",
    "HydraMixer",
    "Leaving",
    "MixShape",
    "MixWeights",
    "ScanOperands",
    "adamw_",
    "add_norm",
    "cross_entropy",
    "depthwise_conv_silu",
    "entered_from",
    "gated_rms_norm",
    "hydra_mix",
    "hydra_mix_of_stretch",
    "keyed_dropout",
    "quasiseparable_scan",
    "resolve_backend",
    "scan_operands",
    "state_after",
    "sum_of_squares",
]
