"""The stack of layers, each a mixer inside a residual connection and a norm."""

import torch
from torch import nn

from hydra_scale.config import ModelConfig, RecomputeConfig
from hydra_scale.model.attention import Attention
from hydra_scale.model.branch import Stream, branched, unbranched
from hydra_scale.model.mixer import HydraLayerMixer
from hydra_scale.model.mlp import Mlp
from hydra_scale.model.norm import make_norm
from hydra_scale.model.recompute import KEEP_ALL, run_layers
from hydra_scale.model.stretch import Stretch
from hydra_scale.topology import ALONE, WHOLE, Stage, TensorRanks

MIXERS = {"H": HydraLayerMixer, "A": Attention, "M": Mlp}
"""Letter of the layer pattern to what the layer computes; each called as mixer(x_TD, stretch)."""


class Layer(nn.Module):
    """norm(x + mixer(x)) (post) or x + mixer(norm(x)) (pre); the residual stream stays in fp32 under autocast."""

    def __init__(self, config: ModelConfig, kind: str, tensor: TensorRanks = ALONE) -> None:
        super().__init__()
        self.mixer = MIXERS[kind](config, tensor)
        self.norm = make_norm(config, config.norm_eps, tensor)
        self._pre_norm, self._backend = config.norm_position == "pre", config.mixer.backend

    def forward(self, stream: Stream, stretch: Stretch) -> Stream:
        """The stream (T, D) behind this layer, under sequence parallelism the rows of this rank's tokens."""
        x_TD, entering_TD = stream
        if self._pre_norm:
            x_TD = x_TD + self.mixer(self.norm(x_TD), stretch)
            return unbranched(x_TD)
        return self.norm.of_sum(x_TD, self.mixer(entering_TD, stretch), self._backend)


class Encoder(nn.Module):
    """The layers of a stage, of `num_layers` whose kinds repeat `layer_pattern`; a final norm if they are pre-norm."""

    def __init__(
        self,
        config: ModelConfig,
        tensor: TensorRanks = ALONE,
        recompute: RecomputeConfig = KEEP_ALL,
        stage: Stage = WHOLE,
    ) -> None:
        super().__init__()
        self._recompute, self._chunks = recompute, stage.chunks(config.num_layers)
        pre_norm = config.norm_position == "pre"
        self._branch = unbranched if pre_norm else branched
        # By the number in the whole encoder, so that names are those of checkpoints.
        self.layers = nn.ModuleDict(
            {str(index): Layer(config, config.layer_kinds[index], tensor) for chunk in self._chunks for index in chunk}
        )
        normalises = pre_norm and stage.is_last
        self.final_norm = make_norm(config, config.embedding_norm_eps, tensor) if normalises else None

    def forward(self, x_TD: torch.Tensor, stretch: Stretch, chunk: int = 0) -> torch.Tensor:
        """(T, D) -> (T, D) through a chunk of the layers here, documents laid end to end."""
        layers = [(index, self.layers[str(index)]) for index in self._chunks[chunk]]
        x_TD = run_layers(layers, x_TD, stretch, self._recompute, self._branch)
        if self.final_norm is None or chunk < len(self._chunks) - 1:
            return x_TD
        return self.final_norm(x_TD)
