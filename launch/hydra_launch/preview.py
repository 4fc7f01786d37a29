"""What a submission will be, in words: layout, predicted memory, where to look; and whether the memory suffices."""

import getpass
import shlex
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra_launch.script import JobPlan, log_name
from hydra_launch.site import Site
from hydra_scale.config import Config
from hydra_scale.errors import ConfigError
from hydra_scale.plan.layout import Layout
from hydra_scale.plan.memory import memory
from hydra_scale.plan.report import parse_bytes
from hydra_scale.plan.search import FREE


def check_memory(config: Config, plan: JobPlan, site: Site) -> None:
    """Refuse a run that a GPU of the site cannot hold.

    Raises:
        ConfigError: the prediction is above the memory that `hydra-scale plan` would use of it.
    """
    peak = _peak(config, plan)
    if peak is None or site.gpu_memory is None:
        return
    usable = (1 - FREE) * parse_bytes(site.gpu_memory)
    if peak > usable:
        raise ConfigError(
            f"{plan.nodes} nodes x {plan.gpus_per_node} GPUs: a GPU is predicted to need {peak / 1e9:.1f} GB, of"
            f" gpu_memory {site.gpu_memory} of the site {usable / 1e9:.1f} GB can be used; `hydra-scale plan --gpus"
            f" {plan.world_size} --gpu-memory {site.gpu_memory}` lists layouts that fit"
        )


def describe_layout(config: Config, plan: JobPlan) -> Iterator[str]:
    """Lines about where the run is divided and what a GPU needs."""
    parallel, layout = config.parallel, Layout(config, plan.world_size, config.model.vocab_size or 0)
    yield (
        f"layout       {plan.world_size} trainers = data {layout.shares} x context {parallel.context} x pipeline"
        f" {parallel.pipeline} x tensor {parallel.tensor}; ZeRO {config.zero.stage}; {layout.num_micro_batches} micro"
        f" batches of {config.training.micro_batch_size} sequences a step"
    )
    paths = [source.path for source in config.data.sources]
    absent = [path for path in paths if "://" not in path and not (plan.working_directory / path).exists()]
    if absent:
        yield f"data         {', '.join(absent)}: not on this machine; the nodes must see it"
    if plan.gpus_per_node:
        peak = _peak(config, plan)
        unknown = "not predicted: the tokenizer will say model.vocab_size"
        yield f"memory       {unknown if peak is None else f'{peak / 1e9:.1f} GB of a GPU, predicted'}"


def describe_places(plan: JobPlan, jobs: Sequence[str] = ()) -> Iterator[str]:
    """Lines about the log, and TensorBoard with its tunnel. `jobs`: ids, as far as there are any yet."""
    name = log_name(plan)
    if jobs:
        name = name.replace("%A", jobs[0]).replace("%j", jobs[0]).replace("%a", "*")
    yield f"log          {plan.run_dir / 'launch' / name}"
    tensorboard = shlex.quote(str(Path(sys.executable).with_name("tensorboard")))  # of no use by name alone elsewhere
    yield f"TensorBoard  {tensorboard} --port 6006 --logdir {shlex.quote(str(plan.run_dir))}"
    yield f"             ssh -N -L 6006:localhost:6006 {getpass.getuser()}@{socket.gethostname()}"


def _peak(config: Config, plan: JobPlan) -> int | None:
    """Bytes; absent where they cannot be known without reading data, or there are no GPUs."""
    if not plan.gpus_per_node or config.model.vocab_size is None:
        return None
    return memory(Layout(config, plan.world_size, config.model.vocab_size)).peak
