"""A configuration on so many processes, and the sizes that all formulas of a plan share."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from hydra_scale.config import Config
from hydra_scale.errors import ConfigError
from hydra_scale.topology import Stage


@dataclass(frozen=True)
class Layout:
    """What `hydra_scale.topology.check_layout` has taken; tokens are counted as if sequences were full."""

    config: Config
    num_gpus: int
    vocab_size: int

    @property
    def tensor(self) -> int:
        return self.config.parallel.tensor

    @property
    def context(self) -> int:
        return self.config.parallel.context

    @property
    def pipeline(self) -> int:
        return self.config.parallel.pipeline

    @cached_property
    def shares(self) -> int:
        """Ranks that take different sequences."""
        return self.num_gpus // (self.tensor * self.context * self.pipeline)

    @property
    def data_ranks(self) -> int:
        """Ranks that hold the same weights, among which ZeRO divides."""
        return self.shares * self.context

    @property
    def num_micro_batches(self) -> int:
        """That a rank computes in a step."""
        return self.config.training.global_batch_size // (self.config.training.micro_batch_size * self.shares)

    @property
    def micro_batch_tokens(self) -> int:
        """Of all context ranks together."""
        return self.config.training.micro_batch_size * self.config.data.seqlen

    @property
    def step_tokens(self) -> int:
        """Of all ranks."""
        return self.config.training.global_batch_size * self.config.data.seqlen

    @property
    def tokens(self) -> int:
        """Of a micro batch, of which this rank mixes each for its heads."""
        return -(-self.micro_batch_tokens // self.context)

    @property
    def residual_tokens(self) -> int:
        """Of a micro batch, that this rank holds of the residual stream."""
        return -(-self.tokens // (self.tensor if self.config.parallel.sequence else 1))

    @property
    def masked_tokens(self) -> int:
        """Of a micro batch, that this rank scores, where the schedule masks most."""
        rates = self.config.data.mask_rate
        highest = rates if isinstance(rates, float) else max(rate for _, rate in rates)
        return round(highest * self.tokens)

    @property
    def element_bytes(self) -> int:
        """Of what matrix products read and write."""
        return 2 if self.config.training.precision == "bf16" else 4

    @property
    def ends(self) -> list[Stage]:
        """The pipeline stages that hold most: the first, and the last with the head."""
        ranks = sorted({0, self.pipeline - 1})
        return [Stage(rank, self.pipeline, self.config.parallel.interleave) for rank in ranks]

    def layers_of(self, stage: Stage) -> Counter[tuple[str, bool]]:
        """How many layers of a kind are at a stage, those that recompute their activations apart."""
        kinds, recompute = self.config.model.layer_kinds, self.config.training.recompute
        here = (index for chunk in stage.chunks(len(kinds)) for index in chunk)
        return Counter((kinds[n], recompute.kind != "none" and n % recompute.every == 0) for n in here)


def known_vocab_size(config: Config) -> int:
    """Rows of the embedding, which a plan cannot learn from data.

    Raises:
        ConfigError: the configuration leaves them to the tokenizer.
    """
    if config.model.vocab_size is None:
        raise ConfigError(
            "model.vocab_size is absent: pretrain takes it from the tokenizer, plan reads no data; give"
            " model.vocab_size=N (tokens of the tokenizer, rounded up to a multiple of 64)"
        )
    return config.model.vocab_size
