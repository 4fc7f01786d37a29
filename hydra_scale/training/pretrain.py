"""Pretraining from a configuration to a trained run folder: the loop on one screen."""

import logging
from datetime import timedelta
from functools import partial
from pathlib import Path

from hydra_scale.accelerator import naming_lack_of_memory
from hydra_scale.checkpoint.initial import start_from
from hydra_scale.config import Config
from hydra_scale.data.loader import EvaluationData, TrainingData
from hydra_scale.data.skipping import batch_of
from hydra_scale.evaluation.masked_lm import evaluate
from hydra_scale.meeting import facts_of
from hydra_scale.model.build import vocab_size_for
from hydra_scale.model.masked_lm import MaskedLanguageModel
from hydra_scale.monitor.console import logged_to
from hydra_scale.monitor.metrics import LedgerEntry
from hydra_scale.monitor.monitor import Monitor
from hydra_scale.parallel.pipeline import names_of_all_stages
from hydra_scale.parallel.zero import ZeroOptimizer
from hydra_scale.run_folder import RunFolder
from hydra_scale.topology import ProcessEnvironment, Topology, check_layout, joined
from hydra_scale.training.agreement import agree
from hydra_scale.training.assembly import assembled
from hydra_scale.training.changed_data import check_data
from hydra_scale.training.checkpointing import Checkpointing, on_main_rank
from hydra_scale.training.guard import NumericsGuard
from hydra_scale.training.quarantine import quarantine
from hydra_scale.training.schedule import learning_rate
from hydra_scale.training.step import train_step
from hydra_scale.training.step_edge import StepEdge
from hydra_scale.training.stopping import StopNotices, StopReason
from hydra_scale.watch.stragglers import ComputeTimes
from hydra_scale.watch.watchdog import Watchdog, new_board

log = logging.getLogger(__name__)


def pretrain(config: Config, run_dir: Path, notices: StopNotices | None = None) -> StopReason:
    """Train until config.training.steps, from the newest checkpoint of `run_dir` if it holds one.

    Every process of the job calls this with the same arguments. `notices`, already listening, may ask to stop early;
    absent: SIGTERM, SIGUSR1 and RUN/stop-request are heeded from here on. Returns why the run stopped early, with a
    checkpoint of its last step, or NONE when it is done.

    Raises:
        HydraScaleError: one of the named failures of `hydra_scale.errors`.
    """
    if notices is None:
        with StopNotices(run_dir) as notices:
            return pretrain(config, run_dir, notices)
    env = ProcessEnvironment.read()
    check_layout(config, env.world_size)
    run = RunFolder(run_dir)
    if run.marks.is_done(config.training.steps, config.data.skip_batches):
        run.check(config)
        log.info("%s: all %d steps are done", run.path, config.training.steps)
        return StopReason.NONE
    limits = config.watchdog
    timeout, meet_within = timedelta(seconds=limits.longest + 60), timedelta(seconds=limits.join)
    with (
        Watchdog(limits, env.rank, env.world_size) as watchdog,
        joined(config.parallel, timeout, facts_of(config), meet_within) as topology,
        watchdog.naming_the_lost(),
        naming_lack_of_memory(env.rank),
    ):
        return _open(config, run, topology, notices, watchdog)


def _open(config: Config, run: RunFolder, topology: Topology, notices: StopNotices, watchdog: Watchdog) -> StopReason:
    on_main_rank(lambda: run.check(config))
    broken = on_main_rank(lambda: quarantine(config.data, run))
    data = TrainingData(config.data, config.training.seed, broken.without)
    held_out = EvaluationData(config.data, data.tokenizer, broken.without)
    held_out.check_targets(config.evaluation.sequences)
    agree(f"{config.data.train}: hash of its manifest", data.fingerprint, "give all nodes the same prepared folder")
    vocab_size = vocab_size_for(config, data.tokenizer.vocab_size)
    on_main_rank(lambda: check_data(run, data, config.data.accept_change))
    on_main_rank(lambda: run.prepare(config, data.tokenizer_folder))
    with logged_to(run.log_file, topology.is_main):
        if config.data.quarantine:
            on_main_rank(lambda: broken.write(run))
        edge = StepEdge(run, notices, topology)
        watchdog.meet(on_main_rank(lambda: new_board(run.watch, edge.epoch)), lambda: f"reading {data.reading}")
        initialise = partial(_initialise, config, run, topology)
        while True:
            with assembled(config, vocab_size, topology, initialise) as (model, optimizer):
                stop = _loop(config, run, topology, edge, watchdog, data, held_out, model, optimizer)
            if stop is not None:
                return stop
            watchdog.enter("start-up", 0)  # going back is a start in the same processes


def _initialise(config: Config, run: RunFolder, topology: Topology, model: MaskedLanguageModel) -> None:
    if config.checkpoint.init_from is not None and not on_main_rank(run.checkpoints.steps):
        names = names_of_all_stages(model, topology)
        log.info("weights of %s", start_from(model, Path(config.checkpoint.init_from), names))


def _loop(
    config: Config,
    run: RunFolder,
    topology: Topology,
    edge: StepEdge,
    watchdog: Watchdog,
    data: TrainingData,
    held_out: EvaluationData,
    model: MaskedLanguageModel,
    optimizer: ZeroOptimizer,
) -> StopReason | None:
    """Train to the end or a reason to stop; None if the run is to go back to an earlier checkpoint."""
    times = ComputeTimes(optimizer.computing, topology, config.watchdog, config.monitor.console_every)
    names = names_of_all_stages(model, topology)
    checkpointing = Checkpointing(run, optimizer, config, topology, data.fingerprint)
    first_step, tokens, numerics, skipped, data_begins = checkpointing.restore(names)
    data.begin_at(data_begins)
    guard = NumericsGuard(model, config, topology, numerics)
    on_main_rank(lambda: run.rewind_logs(first_step))
    if first_step >= config.training.steps:
        log.info("%s: has all %d steps already", run.path, config.training.steps)

    num_steps, batch_size = config.training.steps, config.training.global_batch_size
    share = topology.batch_rank, topology.batch_size, batch_size, config.training.micro_batch_size

    def ledger(step: int) -> LedgerEntry:
        before, number = batch_of(step - 1, skipped), batch_of(step, skipped)
        return LedgerEntry(number, number - before - 1, data.ledger_hash(number - 1, batch_size))

    with (
        checkpointing,
        Monitor(run, config, topology, first_step, ledger) as monitor,
        data.prefetch(first_step, num_steps, *share, skipped) as batches,
    ):
        step, stop = first_step, edge.stop_reason()  # a notice may have come while all this was built
        watchdog.enter("data", first_step + 1)
        for index, micro_batches, waited in batches:
            if stop:
                break
            step = index + 1  # the batch of index i makes optimizer step i + 1
            watchdog.enter("step", step)
            lr = learning_rate(step, num_steps, config.optimizer.lr, config.schedule)
            batch = batch_of(step, skipped)
            guard.check_replicas(step, partial(data.ledger_hash, batch - 1, batch_size))
            compute = partial(train_step, optimizer, micro_batches, lr, topology, guard.allows)
            judged = guard.judge(step, batch, compute, optimizer.sources_not_finite)
            if judged.verdict == "rewind":
                watchdog.enter("save", step)
                rewind = checkpointing.rewind(step, judged.why)
                monitor.goes_back(step, rewind.to_step, rewind.batches, judged.why)
                return None
            tokens += judged.result.num_tokens
            if judged.verdict == "skipped":
                monitor.skipped(step, judged.result, judged.why)
            else:
                monitor.step(step, tokens, lr, judged.result, waited, judged.why)
            for slow in times.after(step):
                monitor.slow_rank(step, slow.rank, times.hosts[slow.rank], slow.speed)
            stop = edge.stop_reason()
            if step % config.evaluation.every == 0 or step == num_steps:
                watchdog.enter("evaluation", step)
                monitor.evaluation(step, evaluate(optimizer.score, held_out, config, topology))
            watchdog.enter("save", step)
            published = checkpointing.poll()
            last = step == num_steps or bool(stop)
            if step % config.checkpoint.every == 0 or last:
                published += checkpointing.save(step, tokens, guard.state, edge.check_held, wait=last)
            for saved in published:
                monitor.checkpoint(saved)
            watchdog.enter("data", step + 1)
        watchdog.enter("end", step)
        if stop and step < num_steps:
            monitor.stopped(step, str(stop))
            return stop
    if config.checkpoint.weights_at_end:
        on_main_rank(lambda: run.publish_weights(num_steps))
    edge.mark_done(num_steps, skipped)
    return StopReason.NONE
