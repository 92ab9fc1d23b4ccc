"""The training loop: fetch a batch, update, report the previous step, save, evaluate, sample, roll back, stop."""
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mmx import config
from mmx.checkpoints.manager import Checkpoints
from mmx.config import NonFiniteError
from mmx.training import optim
from mmx.training.batches import Batches
from mmx.training.guards import DivergedError, Guard, Rollback
from mmx.training.metrics import Log, StepResult, build_record, evaluation_record
from mmx.training.signals import StopSignals


class State(NamedTuple):
    """A run between two steps."""
    step: int           # steps done
    params: dict
    opt: tuple
    host_state: dict    # for JSON: the states of the data "stream" and of the "guard", and the training time in "seconds"


class Evaluation(NamedTuple):
    """The functions that evaluate a run's parameters, and a property of the held-out text."""
    held_out: Callable          # params -> `evaluate.HeldOut`
    sample: Callable | None     # params -> a generated text; None: the run generates no samples
    bytes_per_token: float      # of the held-out text


class Run(NamedTuple):
    """Everything that the loop needs besides the state."""
    experiment: config.Experiment
    batches: Batches
    update: Callable            # (params, opt, batch, lr) -> params, opt, metrics
    evaluation: Evaluation
    checkpoints: Checkpoints
    restore: Callable           # () -> the State of the last checkpoint
    guard: Guard
    log: Log
    stop: StopSignals


class Clock:
    """The training time of a run in seconds. A resumed run starts with the `seconds` of its checkpoint."""

    def __init__(self, seconds: float):
        self.start = time.monotonic() - seconds

    def seconds(self) -> float:
        return time.monotonic() - self.start


def train_loop(run: Run, state: State, clock: Clock) -> int:
    """Trains until the run is done or a signal stops it, and saves the last step. Returns the number of steps done."""
    t, first = run.experiment.train, state.step
    step, params, opt, _ = state
    # The result of the last step. Its metrics are fetched only after the next step is dispatched, so that no device waits.
    pending = None
    rollback = None
    while True:
        if rollback:
            params = opt = metrics = pending = None     # frees memory for the restored arrays
            step, params, opt = roll_back(run, rollback)
            rollback = None
        seconds = clock.seconds()
        progress = fraction_done(t, step, seconds)
        if run.checkpoints.preempted(step):
            run.stop.number = signal.SIGTERM
        done = progress >= 1 or run.stop.number
        if pending and (done or step % run.experiment.checkpoint.every == 0):
            rollback, pending = report(run, pending), None
            if rollback:
                continue
            save(run, step, params, opt, seconds, force=done)
        run.checkpoints.check_saved()       # raises the error of a checkpoint that could not be saved in the background
        if done:
            return step
        if step == first:
            run.checkpoints.check_disk_space(params, opt)
        lr = optim.learning_rate(t, step, progress)
        batch, tiles = run.batches.next(t.micro_batches(t.tokens_seen(step)))
        params, opt, metrics = run.update(params, opt, batch, run.batches.replicate(lr))
        step += 1
        if pending:
            rollback = report(run, pending)     # done at the start of the next iteration
        run.guard.record_stream(step, run.batches.stream)
        seconds = clock.seconds()
        moment = clock.start + seconds
        pending = StepResult(step, t.tokens_seen(step), tiles, lr, seconds, moment, run.batches.waited, metrics)
        run.log.bar.update()
        evaluate_and_sample(run, step, params)


def fraction_done(t: config.Train, step: int, seconds: float) -> float:
    """The part of the run that is done, 0 to 1, by the number of tokens or, with train.seconds, by the clock of process 0."""
    if not t.seconds:
        return t.tokens_seen(step) / t.tokens_seen(t.steps)
    if jax.process_count() > 1:
        with jax.transfer_guard_host_to_device("allow"):
            seconds = float(multihost_utils.broadcast_one_to_all(np.float32(seconds)))
    return seconds / t.seconds


def report(run: Run, result: StepResult) -> Rollback | None:
    """Waits for a step's metrics and logs them. If a Rollback is needed, returns it and logs nothing."""
    result = result._replace(metrics=jax.device_get(result.metrics))
    loss, grad_norm = float(result.metrics["loss"]), float(result.metrics["grad_norm"])
    if rollback := run.guard.check(result.step, loss, grad_norm):
        return rollback
    if run.guard.skipped_in_a_row:
        run.log.message(f"step {result.step} has loss {loss} and gradient norm {grad_norm}: its update was skipped",
                        result.step)
    speed = run.log.speed(result)
    record = build_record(run.experiment, result, run.guard.counts(), run.evaluation.bytes_per_token, speed)
    to_tensorboard = result.step % run.experiment.train.log_every == 0 and not run.guard.skipped_in_a_row
    run.log.step(record, result.metrics["load_E"], result.metrics["dropped"], to_tensorboard)
    return None


def roll_back(run: Run, rollback: Rollback) -> tuple:
    """Restores the last checkpoint and discards the data read since then. Returns its (step, params, opt)."""
    step, params, opt, _ = run.guard.roll_back(rollback, run.batches.stream, run.restore)
    run.log.rewind(step, run.experiment.train.tokens_seen(step))
    run.log.message(f"{rollback.reason}: rolled back to step {step}; the data read since then are discarded", step)
    return step, params, opt


def save(run: Run, step: int, params, opt, seconds: float, force: bool) -> None:
    """Starts to save a checkpoint if one is due or forced. Before that, it writes the metrics up to `step` to disk.

    Raises DivergedError if a parameter is not finite, so that the last checkpoint stays the newest.
    """
    run.log.flush()
    if not are_finite(params):
        raise DivergedError(f"a parameter is nan or infinite after step {step}, which is not saved: lower train.lr; the last "
                            "checkpoint is from before")
    host_state = {"stream": run.batches.stream.state(), "seconds": seconds, "guard": run.guard.state()}
    if run.checkpoints.save(step, params, opt, host_state, force=force):
        run.guard.saved()


@jax.jit
def are_finite(params):
    """Whether no parameter is nan or infinite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)]))


def evaluate_and_sample(run: Run, step: int, params) -> None:
    """Logs the loss on held-out documents and a sample, each if it is due."""
    t = run.experiment.train
    with jax.transfer_guard_host_to_device("allow"):
        if t.eval_every and step % t.eval_every == 0:
            record = evaluation_record(step, t.tokens_seen(step), run.evaluation.held_out(params))
            run.log.evaluation(record)
        if run.evaluation.sample and t.sample_every and step % t.sample_every == 0:
            try:
                run.log.text("sample", run.evaluation.sample(params), step)
            except NonFiniteError as error:     # the guard decides whether the run ends
                run.log.message(f"step {step}: no sample: {error}", step)
