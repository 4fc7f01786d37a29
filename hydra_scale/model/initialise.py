"""Initial weights: each tensor drawn from a generator keyed by (seed, its name), the same in every layout.

The distributions are those of the published model: N(0, initializer_range) for linear and embedding weights,
PyTorch's default for the convolution, dt_bias the inverse softplus of a log-uniform step size, A_log = 0, D = 1.
"""

import hashlib
import math

import torch
from torch import nn

from hydra_scale.config import ModelConfig
from hydra_scale.parallel.placement import global_name, placement_of


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Draw every parameter of a `MaskedLanguageModel` in place."""
    for local_name, parameter in model.named_parameters():
        name, placement = global_name(local_name, parameter), placement_of(parameter)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        whole = torch.empty(placement.shape, dtype=parameter.dtype)
        _draw(name, whole, config, generator)
        parameter.copy_(placement.part_of(whole))


def _draw(name: str, parameter: torch.Tensor, config: ModelConfig, generator: torch.Generator) -> None:
    module, _, leaf = name.rpartition(".")
    kind = module.rpartition(".")[2]
    if kind == "conv1d":
        bound = 1.0 / math.sqrt(config.mixer.d_conv)
        parameter.uniform_(-bound, bound, generator=generator)
    elif leaf == "dt_bias":
        parameter.copy_(_inverse_softplus_of_step(parameter.shape, config, generator))
    elif leaf == "D" or (kind.endswith("norm") and leaf == "weight"):
        parameter.fill_(1.0)
    elif leaf in ("A_log", "bias", "init_states"):
        parameter.zero_()
    else:
        parameter.normal_(0.0, config.initializer_range, generator=generator)


def _inverse_softplus_of_step(shape: torch.Size, config: ModelConfig, generator: torch.Generator) -> torch.Tensor:
    low, high = math.log(config.mixer.dt_min), math.log(config.mixer.dt_max)
    step = torch.empty(shape).uniform_(low, high, generator=generator).exp().clamp(min=config.mixer.dt_init_floor)
    return step + torch.log(-torch.expm1(-step))
