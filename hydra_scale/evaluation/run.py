"""Evaluating a run folder from the outside: its configuration, its newest checkpoint, somebody's held-out data."""

from pathlib import Path

from hydra_scale.config import Config, ParallelConfig
from hydra_scale.data.loader import Batch, EvaluationData
from hydra_scale.data.tokenizer import Tokenizer
from hydra_scale.errors import DataError
from hydra_scale.evaluation.masked_lm import evaluate
from hydra_scale.model.masked_lm import LossSums, MaskedLanguageModel
from hydra_scale.monitor.metrics import MaskedLmScore
from hydra_scale.run_folder import RunFolder
from hydra_scale.topology import joined


def evaluate_run(run_dir: Path, data: str, sequences: int | None = None) -> MaskedLmScore:
    """Score the newest whole checkpoint of a run on the eval split of a prepared folder, or of one behind a URL.

    Raises:
        CheckpointError: no whole checkpoint in `run_dir`.
        DataError: `data` has no eval split, or one of too few tokens, or was written with another tokenizer than the
            run's.
    """
    run = RunFolder(run_dir)
    config = _with_evaluation(run.load_config(), data, sequences)
    held_out = EvaluationData(config.data, Tokenizer.load(run.tokenizer))
    held_out.check_targets(config.evaluation.sequences)
    with joined(ParallelConfig()) as topology:  # however the run was laid out, its weights are whole
        weights = run.newest_parameters()
        model = MaskedLanguageModel(config.model, weights["head.bias"].numel())
        model.load_state_dict(weights)
        model.to(topology.accelerator.device).eval()

        def score(batches: list[Batch]) -> list[LossSums]:
            with topology.accelerator.autocast(config.training.precision):
                return [model(batch) for batch in batches]

        return evaluate(score, held_out, config, topology)


def _with_evaluation(config: Config, data: str, sequences: int | None) -> Config:
    if "://" not in data and not Path(data).is_dir():
        raise DataError(f"{data}: not a folder; give --data a folder written by `hydra-scale prepare`")
    changes = {"data": config.data.model_copy(update={"eval": data})}
    if sequences is not None:
        changes["evaluation"] = config.evaluation.model_copy(update={"sequences": sequences})  # type: ignore[assignment]
    return config.model_copy(update=changes)
