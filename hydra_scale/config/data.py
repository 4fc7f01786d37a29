"""Settings of the data: what is read, cut and masked."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from hydra_scale.config.section import PositiveInt, Section


class MaskingConfig(Section):
    """How the chosen tokens are corrupted."""

    kind: Literal["bert", "mask"] = "bert"
    """bert: 80% mask token, 10% random token, 10% unchanged; mask: always the mask token."""
    whole_word: bool = False
    """Choose whole words: all pieces of a word or none."""
    spans: Literal["none", "geometric", "fixed"] = "none"
    """Choose stretches of tokens, all of span_length or with lengths drawn around it; also where there are no words."""
    span_length: Annotated[float, Field(ge=1.0, le=1 << 20)] = 3.0
    """Tokens of a span: mean of the geometric lengths before they are cut at span_max; fixed: a whole number."""
    span_max: Annotated[int, Field(ge=1, le=1 << 20)] = 10
    """Longest span of the geometric kind; spans that overlap or touch make a longer one."""

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> "MaskingConfig":
        if self.spans != "none" and self.whole_word:
            raise ValueError("whole_word is true and spans is not none; expected one of them")
        if self.spans == "fixed" and self.span_length % 1:
            raise ValueError(f"span_length is {self.span_length}; fixed spans take a whole number of tokens")
        if self.spans == "geometric" and self.span_length > self.span_max:
            raise ValueError(f"span_length is {self.span_length}, above span_max {self.span_max}")
        return self


def _ascending(interval: tuple[int, int]) -> tuple[int, int]:
    if interval[0] > interval[1]:
        raise ValueError(f"found {list(interval)}; expected the first batch, then the last")
    return interval


MaskRate = Annotated[float, Field(gt=0.0, lt=1.0)]


class SourceConfig(Section):
    """One of several sources of training sequences."""

    path: str
    """Folder written by `hydra-scale prepare`; its train split is used."""
    weight: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    """Its share of the sequences is its weight over the sum of all."""


# Tagged by what is given, so that an error is about the form that was meant.
Folders = Annotated[
    Annotated[str, Tag("folder")] | Annotated[tuple[SourceConfig, ...], Field(min_length=1), Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "folder"),
]
BatchInterval = Annotated[tuple[PositiveInt, PositiveInt], AfterValidator(_ascending)]
MaskRatePoint = tuple[Annotated[int, Field(ge=0)], MaskRate]
MaskRates = Annotated[
    Annotated[MaskRate, Tag("constant")] | Annotated[tuple[MaskRatePoint, ...], Field(min_length=1), Tag("schedule")],
    Discriminator(lambda value: "schedule" if isinstance(value, list | tuple) else "constant"),
]


class DataConfig(Section):
    """What is read and how it is cut into sequences."""

    train: Folders
    """Folder written by `hydra-scale prepare`, or its URL (s3://, gs://, https://), whose train split is used; or
    several, as a list of path and weight."""
    eval: str | None = None
    """Folder whose eval split is used; absent: that of the training folder, or of the first of several."""
    cache: str | None = None
    """Folder into which data given by URL is copied; absent: hydra-scale/data in the user's cache folder."""
    cache_gb: Annotated[float, Field(gt=0)] | None = None
    """10^9 bytes that the cache may hold; absent: what the disk holds."""
    shuffle_shards: PositiveInt | None = None
    """Shards that an epoch visits at a time, in groups drawn for it; absent: all. Of data given by URL, only the shards
    at hand and the next group are fetched, where otherwise all are before the first step."""
    quarantine: bool = False
    """Leave out training shards that are missing, cut or altered when the run begins, the same in all its starts, as
    RUN/quarantine.json says; all shards are hashed before the first step. false: a broken shard ends the run."""
    accept_change: bool = False
    """A run whose newest checkpoint was trained on other data of the same tokenizer goes on with those given now, from
    their first sequence. false: it is refused."""
    seqlen: PositiveInt = 512
    """Tokens of a sequence."""
    packing: bool = True
    """true: documents are laid end to end and cut every seqlen tokens, none of them seeing another;
    false: one document a sequence, as in the published recipe (padding is never computed)."""
    long_documents: Literal["split", "truncate"] | None = None
    """Documents longer than seqlen: split into pieces, none of which sees another, or only the beginning is used;
    absent: split with packing, truncate without."""
    mask_rate: MaskRates = 0.3
    """Fraction of the ordinary tokens to predict in training; or a schedule, as a list of [step, rate]: linear between
    them, constant before the first and after the last."""
    eval_mask_rate: MaskRate = 0.15
    """Fraction of the ordinary tokens to predict in evaluation."""
    masking: MaskingConfig = MaskingConfig()
    skip_batches: tuple[BatchInterval, ...] = ()
    """First and last number of batches that are not trained on, counted from 1: in a run that skips nothing, step n
    trains on batch n. A run that has trained on them already goes back to its newest checkpoint from before; what has
    been skipped once stays skipped."""

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The training folders."""
        return (SourceConfig(path=self.train),) if isinstance(self.train, str) else self.train

    @property
    def truncates(self) -> bool:
        """Whether the end of a long document is left out."""
        return self.long_documents == "truncate" or (self.long_documents is None and not self.packing)

    def mask_rate_at(self, step: int) -> float:
        """Of a training step, counted from 0."""
        if isinstance(self.mask_rate, float):
            return self.mask_rate
        (step_before, before), *points = self.mask_rate
        for at, rate in points:
            if step < at:
                return before + (rate - before) * max(0, step - step_before) / (at - step_before)
            step_before, before = at, rate
        return before

    @model_validator(mode="after")
    def _all_shards_for_quarantine(self) -> "DataConfig":
        if self.quarantine and self.shuffle_shards and any("://" in source.path for source in self.sources):
            raise ValueError("quarantine hashes all shards before the first step, shuffle_shards fetches some of a URL")
        return self

    @model_validator(mode="after")
    def _rates_in_order(self) -> "DataConfig":
        if not isinstance(self.mask_rate, float):
            steps = [step for step, _ in self.mask_rate]
            if steps != sorted(set(steps)):
                raise ValueError(f"mask_rate has the steps {steps}; expected ascending ones")
        return self
