"""Dropout whose mask is a function of (key, token, channel): the same in any layout, and after any restart.

No generator state exists, so there is none to store.
"""

import torch

from .backends import resolve_backend
from .triton_language import available

if available:
    from .triton_dropout import triton_keyed_dropout

_32_BITS = 0xFFFFFFFF


def keyed_dropout(
    x_TD: torch.Tensor, token_keys_T: torch.Tensor, rate: float, key: int, *, backend: str = "auto"
) -> torch.Tensor:
    """Zero each element with probability `rate`, scale the rest by 1 / (1 - rate).

    Args:
        x_TD: any floating dtype.
        token_keys_T: int64, a number that is the token's own in the whole run.
        rate: in [0, 1); 0 returns the input.
        key: seed of the run, any integer.
        backend: as in `quasiseparable_scan`; each drops the same elements.

    Raises:
        ValueError: another rate, or keys that are not int64, one for each token.
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"rate is {rate}; expected at least 0 and less than 1")
    if token_keys_T.shape != x_TD.shape[:1] or token_keys_T.dtype != torch.int64:
        raise ValueError(
            f"token_keys is {token_keys_T.dtype} of shape {tuple(token_keys_T.shape)}; expected int64 of shape"
            f" ({len(x_TD)},), one key for each token"
        )
    if rate == 0.0:
        return x_TD
    of_run = (key * 0x9E3779B1 + 2**63) % 2**64 - 2**63  # int64, whatever the key
    threshold, scale = int(rate * 2**32), 1.0 / (1.0 - rate)
    if resolve_backend(backend, x_TD) == "triton" and x_TD.numel():
        return triton_keyed_dropout(x_TD, token_keys_T, of_run, threshold, scale)
    of_token_T = _hash32(token_keys_T ^ of_run)
    channels_D = torch.arange(x_TD.shape[-1], device=x_TD.device, dtype=torch.int64)
    keep_TD = _hash32(of_token_T[:, None] + channels_D * 0x85EBCA6B) >= threshold
    return x_TD * keep_TD * scale


def _hash32(value: torch.Tensor) -> torch.Tensor:
    """32-bit finaliser with full avalanche (multipliers of C. Wellons' hash prospector), on int64 lanes.

    Tokens beyond 2^32 fold their upper half in first; products wrap modulo 2^64, which leaves the low 32 bits right.
    """
    value = (value ^ (value >> 32)) & _32_BITS
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _32_BITS
    value = ((value ^ (value >> 15)) * 0x846CA68B) & _32_BITS
    return value ^ (value >> 16)
