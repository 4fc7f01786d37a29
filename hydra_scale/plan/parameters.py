"""Parameters that a rank holds, by formula: what `build_model` would allocate there."""

from hydra_scale.config import ModelConfig
from hydra_scale.topology import Stage


def rank_parameters(model: ModelConfig, vocab_size: int, tensor: int, stage: Stage) -> int:
    """Of one of `tensor` ranks that share each matrix, at this pipeline stage."""
    layers = "".join(model.layer_kinds[chunk.start : chunk.stop] for chunk in stage.chunks(model.num_layers))
    count = sum(layers.count(kind) * layer_parameters(model, kind, tensor) for kind in set(layers))
    words = vocab_size // tensor * model.d_model
    if stage.is_first:
        positions = model.max_positions if model.position_embedding == "learned" else 0
        count += words + (model.type_vocab_size + positions) * model.d_model + 2 * model.d_model
    elif stage.is_last:
        count += words  # the copy that the head multiplies with
    if stage.is_last:
        count += model.d_model**2 + 3 * model.d_model + vocab_size // tensor
        count += _norm(model) if model.norm_position == "pre" else 0
    return count


def layer_parameters(model: ModelConfig, kind: str, tensor: int) -> int:
    """A layer of the pattern: its mixer, and the norm around it."""
    width = model.d_model
    if kind == "A":
        return (3 * width * width + 3 * width + width * width) // tensor + width + _norm(model)
    if kind == "M":
        inner = round(model.mlp.expansion * width)
        return (2 * width * inner + inner) // tensor + width + _norm(model)
    return _mixer(model, tensor) + _norm(model)


def _mixer(model: ModelConfig, tensor: int) -> int:
    mixer, width = model.mixer, model.d_model
    inner = mixer.expand * width // tensor
    heads = mixer.expand * width // mixer.headdim // tensor
    readers = _readers(model, tensor)
    rows = _rows_of_projection(model, tensor)
    count = rows * width + inner * width  # projections in and out
    count += (inner + readers) * (mixer.d_conv + mixer.conv_bias)
    count += 3 * heads + heads * tensor * inner + inner  # dt_bias, A_log, D; fc_D; norm
    count += (rows + width) * mixer.bias
    return count + heads * mixer.headdim * mixer.d_state * mixer.learnable_init_states


def linear_parameters(model: ModelConfig, kind: str, tensor: int) -> int:
    """Of those, the weights of the linear layers around what the layer computes."""
    width = model.d_model
    if kind == "A":
        return 4 * width * width // tensor
    if kind == "M":
        return 2 * width * round(model.mlp.expansion * width) // tensor
    return width * (_rows_of_projection(model, tensor) + model.mixer.expand * width // tensor)


def _rows_of_projection(model: ModelConfig, tensor: int) -> int:
    """z, x, B and C, and both steps."""
    inner = model.mixer.expand * model.d_model
    return (2 * inner + 2 * inner // model.mixer.headdim) // tensor + _readers(model, tensor)


def _readers(model: ModelConfig, tensor: int) -> int:
    """Rows of B and C, forward and backward: where groups do not divide, every rank holds all of them."""
    readers = 4 * model.mixer.ngroups * model.mixer.d_state
    return readers // tensor if model.mixer.ngroups % tensor == 0 else readers


def _norm(model: ModelConfig) -> int:
    return model.d_model * (2 if model.norm == "layernorm" else 1)
