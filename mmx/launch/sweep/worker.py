"""What a job executes: trains one cell to its end and writes its row, or measures the speed of a cell."""
import contextlib
import dataclasses
import fcntl
import os
import signal
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import submitit

from mmx.config import ConfigError, Experiment, NonFiniteError
from mmx.data import encoding, held_out
from mmx.launch.sweep import rows
from mmx.launch.sweep.grid import Cell
from mmx.startup import interrupts
from mmx.training import metrics
from mmx.training.guards import DivergedError

RATE_STEPS = 12         # of a run that measures the FLOP rate
COMPILE_STEPS = 2       # the first steps, which compile and are not counted
DONE, STOPPED, LOCKED, INVALID, FAILED = "done", "stopped", "locked", "invalid", "failed"       # statuses of an outcome


class Outcome(NamedTuple):
    """How a job ended: a status, and its result or, unless the status is DONE, the reason."""
    status: str
    value: str | float


class Job(submitit.helpers.Checkpointable):
    """Calls a function that returns an Outcome, and turns its exceptions into outcomes.

    Args of a call:
      function, *args: what to call.
      visible: CUDA_VISIBLE_DEVICES of the sweep's process, which submitit does not pass to local processes.

    On a cluster, submitit queues a preempted or timed-out job again, and the run resumes.
    """

    def __call__(self, function, *args, visible: str | None = None) -> Outcome:
        if os.environ.get("SUBMITIT_EXECUTOR") == "local":
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            os.environ |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
            signal.signal(signal.SIGTERM, signal.SIG_DFL)       # submitit ignores SIGTERM; training sets its own handler later
        try:
            return function(*args)
        except ConfigError as error:
            return Outcome(INVALID, " ".join(str(error).split()))
        except Exception as error:
            traceback.print_exc()
            return Outcome(FAILED, " ".join(f"{type(error).__name__}: {error}".split()))


def attempt(cell: Cell, folder: Path) -> Outcome:
    """Trains a cell to its end in the workdir `folder` and writes its row, unless another process is training it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        if not try_lock(file):
            return Outcome(LOCKED, "another process is training it")
        if rows.exists(folder):
            return Outcome(DONE, "")
        try:
            end = _train(cell.experiment, folder)
        except DivergedError as error:
            measured = {"loss": None, "bits_per_byte": None, "diverged": str(error)}
        else:
            if end["stopped"]:
                return Outcome(STOPPED, f"stopped at step {end['step']}")
            try:
                measured = _evaluate(cell.experiment, folder)
            except NonFiniteError as error:
                measured = {"loss": None, "bits_per_byte": None, "diverged": str(error)}
            measured["seconds"] = end["seconds"]
        row = rows.make(cell, folder, measured)
        if cell.experiment.train.tensorboard:
            rows.write_hparams(cell, folder, row)
        rows.save(folder, row)
        return Outcome(DONE, "")


def measure_rate(cell: Cell, out: Path) -> Outcome:
    """Measures the median FLOPs per second of a cell's steps, in a short run whose files are deleted."""
    short = dataclasses.replace(cell.experiment.train, steps=RATE_STEPS, eval_every=0, sample_every=0, tensorboard=False)
    with tempfile.TemporaryDirectory(dir=out, prefix="rate-") as folder, interrupts.removing(folder):
        _train(dataclasses.replace(cell.experiment, train=short), folder)
        return Outcome(DONE, float(np.median([r["flops_per_s"] for r in metrics.read(Path(folder))[COMPILE_STEPS:]])))


def _train(experiment: Experiment, folder: str | Path) -> dict:
    from mmx.training.run import train  # here: slow to import, and only the process that trains needs it

    return train(experiment, folder)


def _evaluate(e: Experiment, folder: Path) -> dict:
    """Evaluates the run in `folder` on held-out data.

    Returns the loss in nats per target and the bits per byte of text. On held-out ids it returns the share of targets that the
    model predicts. Without text, the loss is the mean over the sources of ids.
    """
    found = {"bits_per_byte": None}
    if held_out.token_ids(e.data, encoding.image_options(e)):
        from mmx.evals import accuracy

        found |= accuracy.measure(folder)
    if any(encoding.learned_text(content) for _, content in held_out.validation(e.data, encoding.image_options(e))):
        from mmx.evals import compression

        text = compression.measure(folder, limit=e.train.eval_bytes).held_out
        found |= {"loss": text.loss, "bits_per_byte": text.bits_per_byte}
    return found


def try_lock(file) -> bool:
    """Locks an open file if no other process has locked it, and returns whether it did. The lock ends with this process."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def is_locked(path: Path) -> bool:
    """Whether another process has locked the file."""
    if not path.exists():
        return False
    with path.open("a") as file:
        return not try_lock(file)
