"""A model and its optimizer for as long as they are needed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hydra_scale.config import Config
from hydra_scale.model.build import build_model, parameter_groups
from hydra_scale.model.masked_lm import MaskedLanguageModel
from hydra_scale.parallel.zero import ZeroOptimizer
from hydra_scale.topology import Topology


@contextmanager
def assembled(
    config: Config,
    vocab_size: int,
    topology: Topology,
    change: Callable[[MaskedLanguageModel], None] | None = None,
) -> Iterator[tuple[MaskedLanguageModel, ZeroOptimizer]]:
    """The model as this rank holds it, and ZeRO around it; `change` may set its weights or exchange parts first.

    At the end CUDA graphs and DeepSpeed's hooks go: NCCL does not close a group while a graph holds one of its
    collectives, and the hooks would keep model and moments in memory for good.
    """
    device = topology.accelerator.device
    model = build_model(config, vocab_size, device, topology.context, topology.tensor, topology.stage)
    try:
        if change is not None:
            change(model)
        optimizer = ZeroOptimizer(model, config, topology, parameter_groups(model, config.optimizer))
        try:
            yield model, optimizer
        finally:
            optimizer.close()
    finally:
        model.release()
