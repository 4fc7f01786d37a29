"""An encoder apart from any file format: what every adapter reads into and writes from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hydra_scale.checkpoint.load import CheckpointReader
from hydra_scale.config import ModelConfig
from hydra_scale.config_file import dump_config
from hydra_scale.data.tokenizer import Tokenizer
from hydra_scale.model.masked_lm import MaskedLanguageModel
from hydra_scale.run_folder import RunFolder


@dataclass(frozen=True)
class EncoderPackage:
    """A trained masked language model."""

    model: ModelConfig
    parameters: dict[str, torch.Tensor]
    """By logical name, whole tensors on the CPU."""
    tokenizer: Tokenizer | None
    origin: dict[str, Any]
    """Where it came from, for the model card."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.parameters["head.bias"].numel()

    def build(self) -> MaskedLanguageModel:
        """This system's model with these parameters; needs `hydra_scale.topology.joined`."""
        model = MaskedLanguageModel(self.model, self.vocab_size)
        model.to(self.parameters["head.bias"].dtype).load_state_dict(self.parameters)
        return model.eval()


def read_run(path: Path) -> EncoderPackage:
    """The newest whole checkpoint of a run folder.

    Raises:
        CheckpointError, DataError: not a run folder, no whole checkpoint, or its tokenizer was altered.
    """
    run = RunFolder(path)
    config = run.load_config()
    with CheckpointReader(run.newest_checkpoint()) as reader:
        origin = {
            "run": path.name,
            "step": reader.manifest.step,
            "tokens": reader.manifest.state["tokens"],
            "config": dump_config(config),
        }
        return EncoderPackage(config.model, reader.parameters(), Tokenizer.load(run.tokenizer), origin)
