"""The typed configuration of a run: every setting, its meaning, its default and its range.

Precedence: defaults < YAML file < `a.b=value` overrides. An unknown key is an error that names the nearest one.
This room only defines the settings; `hydra_scale.config_file` reads and writes them.
"""

from hydra_scale.config.data import DataConfig, MaskingConfig, SourceConfig
from hydra_scale.config.keeping import CheckpointConfig, MonitorConfig
from hydra_scale.config.model import AttentionConfig, MixerConfig, MlpConfig, ModelConfig
from hydra_scale.config.numerics import NumericsConfig
from hydra_scale.config.parallel import ParallelConfig, ZeroConfig
from hydra_scale.config.run import Config
from hydra_scale.config.section import PositiveInt, Section
from hydra_scale.config.training import (
    EvaluationConfig,
    OptimizerConfig,
    RecomputeConfig,
    ScheduleConfig,
    TrainingConfig,
)
from hydra_scale.config.watchdog import WatchdogConfig

__all__ = [
    "AttentionConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "MaskingConfig",
    "MixerConfig",
    "MlpConfig",
    "ModelConfig",
    "MonitorConfig",
    "NumericsConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PositiveInt",
    "RecomputeConfig",
    "ScheduleConfig",
    "Section",
    "SourceConfig",
    "TrainingConfig",
    "WatchdogConfig",
    "ZeroConfig",
]
