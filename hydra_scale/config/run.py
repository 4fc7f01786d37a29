"""The settings of a whole run."""

from pydantic import model_validator

from hydra_scale.config.data import DataConfig
from hydra_scale.config.keeping import CheckpointConfig, MonitorConfig
from hydra_scale.config.model import ModelConfig
from hydra_scale.config.numerics import NumericsConfig
from hydra_scale.config.parallel import ParallelConfig, ZeroConfig
from hydra_scale.config.section import Section
from hydra_scale.config.training import (
    EvaluationConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainingConfig,
)
from hydra_scale.config.watchdog import WatchdogConfig


class Config(Section):
    """A run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    zero: ZeroConfig = ZeroConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    numerics: NumericsConfig = NumericsConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.schedule.warmup_steps > self.training.steps:
            raise ValueError(
                f"schedule.warmup_steps is {self.schedule.warmup_steps}; at most training.steps = {self.training.steps}"
            )
        decay = self.schedule.decay_steps if self.schedule.kind == "wsd" else None
        if decay is not None and self.schedule.warmup_steps + decay > self.training.steps:  # it would begin with a fall
            raise ValueError(
                f"schedule.decay_steps is {decay}; at most training.steps - schedule.warmup_steps ="
                f" {self.training.steps - self.schedule.warmup_steps}"
            )
        if self.numerics.check_replicas_every is not None and self.zero.stage == 3:
            raise ValueError("numerics.check_replicas_every is set and zero.stage is 3, which keeps no replicas")
        if self.model.position_embedding == "learned" and self.data.seqlen > self.model.max_positions:
            raise ValueError(f"data.seqlen is {self.data.seqlen}; model.max_positions is {self.model.max_positions}")
        return self
