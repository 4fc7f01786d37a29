"""The learning rate as a function of the step; nothing is stored."""

import math

from hydra_scale.config import ScheduleConfig


def learning_rate(step: int, num_steps: int, peak: float, config: ScheduleConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 1 to `num_steps`.

    Rises linearly over warmup_steps, then follows `config.kind` down to peak * min_ratio at the last step.
    """
    if step <= config.warmup_steps:
        return peak * step / config.warmup_steps
    return peak * (config.min_ratio + (1.0 - config.min_ratio) * _shape(step, num_steps, config))


def _shape(step: int, num_steps: int, config: ScheduleConfig) -> float:
    """1 after the warm-up, 0 at the last step (constant: 1 throughout)."""
    if config.kind == "constant":
        return 1.0
    if config.kind == "wsd":
        decay = config.decay_steps or max(1, num_steps // 10)
        return min(1.0, (num_steps - step) / decay)
    left = (num_steps - step) / max(1, num_steps - config.warmup_steps)
    return left if config.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * (1.0 - left)))
