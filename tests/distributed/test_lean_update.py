"""Under ZeRO 1 and 2 a rank's part of the weights exists once: what AdamW updates are the weights themselves."""

import pytest
from ranks import run_ranks
from runs import TINY

from hydra_scale.bench.training import random_batch
from hydra_scale.config_file import load_config
from hydra_scale.topology import joined
from hydra_scale.training.assembly import assembled
from hydra_scale.training.step import train_step


def places(layout: list[str]) -> tuple[int, int, list[str]]:
    """After a step: bytes of the optimizer's own fp32 weights that are not the model's, slices looked at, and those
    that lie elsewhere than their weights."""
    config = load_config(TINY, ["training.micro_batch_size=2", "data.seqlen=24", *layout])
    with joined(config.parallel) as topology, assembled(config, 256, topology) as (model, optimizer):
        train_step(optimizer, [random_batch(256, 2, 24)], 1e-3, topology)
        zero = optimizer._zero
        flats = {flat.untyped_storage().data_ptr() for flat in zero.bit16_groups_flat}
        masters = [*zero.single_partition_of_fp32_groups]
        masters += [p._hp_mapping.hp_fragment for g in zero.bit16_groups for p in g if p._hp_mapping is not None]
        copies = sum(m.nbytes for m in masters if m.untyped_storage().data_ptr() not in flats)
        weights = dict(model.named_parameters())
        slices = list(optimizer.local_slices())
        elsewhere = [
            part.name
            for part in slices
            if part.parameter.data_ptr() != weights[part.name].data.flatten()[part.start :].data_ptr()
        ]
        return copies, len(slices), elsewhere


@pytest.mark.parametrize("layout", ["zero.stage=1", "zero.stage=2"])
def test_weights_are_updated_in_place(layout: str) -> None:
    for copies, num_slices, elsewhere in run_ranks(2, places, layout.split()):
        assert (copies, elsewhere) == (0, []) and num_slices > 3
