"""From a configuration to a model with its initial weights, and to the optimizer's parameter groups."""

import logging
from typing import Any

import torch
from torch import nn

from hydra_kernels import resolve_backend
from hydra_scale.config import Config, OptimizerConfig
from hydra_scale.errors import ConfigError
from hydra_scale.model.captured import why_not_captured
from hydra_scale.model.initialise import initialise
from hydra_scale.model.masked_lm import MaskedLanguageModel
from hydra_scale.topology import ALONE, WHOLE, Context, Stage, TensorRanks

log = logging.getLogger(__name__)
_TOKENS_SCORED_AT_ONCE = 32768
"""More, and the scores of the masked ones among them would outgrow the layers' memory."""
_VOCAB_MULTIPLE = 64  # a whole number of tiles for the output product


def vocab_size_for(config: Config, tokenizer_size: int) -> int:
    """Rows of the embedding: as configured, or the tokenizer's size rounded up.

    Raises:
        ConfigError: fewer rows are configured than the tokenizer has tokens.
    """
    configured = config.model.vocab_size
    if configured is None:
        return -(-tokenizer_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    if configured < tokenizer_size:
        raise ConfigError(
            f"model.vocab_size is {configured}: the tokenizer of data.train has {tokenizer_size} tokens;"
            " set it to at least that, or leave it out"
        )
    return configured


def score_blocks(num_tokens: int) -> int:
    """Into so many blocks the head divides the masked ones of `num_tokens` tokens of a rank."""
    return -(-num_tokens // _TOKENS_SCORED_AT_ONCE)


def build_model(
    config: Config,
    vocab_size: int,
    device: torch.device,
    context: Context | None = None,
    tensor: TensorRanks = ALONE,
    stage: Stage = WHOLE,
) -> MaskedLanguageModel:
    """This rank's part of the model of a run with its initial weights, in fp32, on its device.

    Raises:
        ConfigError: the vocabulary cannot be divided over the tensor parallel ranks, or the kernels that are asked for
            do not run on the device.
    """
    if vocab_size % tensor.size:
        raise ConfigError(
            f"model.vocab_size is {vocab_size}: not divisible by parallel.tensor {tensor.size};"
            f" nearest: {-(-vocab_size // tensor.size) * tensor.size}"
        )
    try:
        resolve_backend(config.model.mixer.backend, torch.empty(0, device=device))
    except ValueError as error:
        raise ConfigError(f"model.mixer.{error}") from None
    tokens = config.training.micro_batch_size * config.data.seqlen // (1 if context is None else context.size)
    model = MaskedLanguageModel(
        config.model,
        vocab_size,
        config.training.seed,
        context,
        tensor,
        config.training.recompute,
        score_blocks=score_blocks(tokens),
        stage=stage,
    )
    initialise(model, config.model, config.training.seed)
    model = model.to(device)
    if device.type == "cuda":
        reason = why_not_captured(config, device)
        log.info("layers run %s", "as CUDA graphs" if reason is None else f"kernel by kernel: {reason}")
        if reason is None:
            model.capture()
    return model


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """AdamW groups: with weight decay, and without.

    Under `decay: matrices` only projections and embeddings decay; norms, biases, the convolution and the state space
    parameters (A_log, dt_bias, D, init_states) do not.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        decays = config.decay == "all" or (parameter.ndim == 2 and not name.endswith("init_states"))
        (decayed if decays else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
