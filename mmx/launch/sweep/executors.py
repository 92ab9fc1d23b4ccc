"""Where jobs execute: in this process, in local processes or on a SLURM cluster."""
import atexit
import contextlib
import dataclasses
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import submitit
from submitit.core.utils import FailedJobError

from mmx.config import ConfigError
from mmx.launch.sweep.worker import FAILED, Job, Outcome
from mmx.startup import interrupts

DEFAULT_JOBS = {"inline": 1, "local": 1, "slurm": 64}       # runs at a time, by kind of executor
STOP_SECONDS = 60       # that local runs have to save after SIGTERM


class RefusedError(ConfigError):
    """The sweep is refused before any run starts; it leaves no files."""


@dataclasses.dataclass(frozen=True)
class ExecutorOptions:
    """Where runs execute, and how many at a time."""
    kind: str = "local"             # "inline", "local" or "slurm"
    jobs: int | None = None         # runs at a time; None: DEFAULT_JOBS
    slurm: str = ""                 # parameters of sbatch, such as "partition=gpu,gpus_per_node=8"

    @property
    def max_jobs(self) -> int:
        return self.jobs or DEFAULT_JOBS[self.kind]


class InlineExecutor:
    """Executes jobs in this process, with submitit's interface; their output goes to a log file.

    submitit's own DebugExecutor starts a debugger when a job fails.
    """

    def __init__(self, log: Path):
        self.log = log

    def submit(self, job, *args, **kwargs):
        with self.log.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            return _FinishedJob(job(*args, **kwargs))


class _FinishedJob(NamedTuple):
    outcome: Outcome

    def done(self) -> bool:
        return True

    def result(self) -> Outcome:
        return self.outcome


def make(options: ExecutorOptions, out: Path):
    """Returns an executor with submitit's interface, which keeps its files in out/jobs.

    Raises:
      RefusedError: the options are invalid or SLURM is not installed.
    """
    kind, slurm = options.kind, options.slurm
    if slurm and kind != "slurm":
        raise RefusedError(f"--slurm {slurm} needs --executor slurm")
    if kind == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise RefusedError("--executor slurm needs the commands sbatch and srun, which this machine does not have; --executor "
                           "local runs processes on this machine")
    pairs = [pair.partition("=")[::2] for pair in filter(None, slurm.split(","))]
    parameters = {key: int(value) if value.isdecimal() else value for key, value in pairs}
    if parameters.get("nodes", 1) != 1 or parameters.get("ntasks_per_node", 1) != 1:
        raise RefusedError(f"--slurm {slurm}: each run is one process on one node and uses all its devices; leave nodes and "
                           "ntasks_per_node at 1")
    (out / "jobs").mkdir(parents=True, exist_ok=True)
    if kind == "inline":
        return InlineExecutor(out / "jobs" / "inline.log")
    # A new folder for each sweep: submitit numbers local jobs by process id, so an older result could have the same number.
    folder = tempfile.mkdtemp(dir=(out / "jobs").absolute(), prefix=time.strftime("%Y%m%d-%H%M%S-"))
    if "%" in folder or (kind == "slurm" and "\\" in folder):
        folder = _alias(folder, kind)
    if kind == "local":
        executor = submitit.LocalExecutor(folder)
        executor.update_parameters(timeout_min=60 * 24 * 365)
        return executor
    executor = submitit.SlurmExecutor(folder)
    try:
        executor.update_parameters(**{"time": 60 * 24, "job_name": "mmx-sweep"} | parameters)
    except (TypeError, ValueError) as error:
        raise RefusedError(f"--slurm {slurm}: {str(error).replace(chr(10), ' ')}") from None
    return executor


def _alias(folder: str, kind: str) -> str:
    """A link to `folder` without % in its path: submitit replaces %j, %t and others there, as sbatch does, too."""
    if kind == "slurm":
        raise RefusedError(f"--out: {folder} contains % or \\, which have a meaning for sbatch: use another --out")
    links = tempfile.mkdtemp(prefix="mmx-jobs-")
    atexit.register(shutil.rmtree, links, ignore_errors=True)
    os.symlink(folder, f"{links}/jobs")
    return f"{links}/jobs"


def submit(executor, function, *args):
    """Submits a job that calls function(*args), which returns an Outcome.

    Local processes start with SIGINT ignored, because the terminal sends Ctrl-C to all of them. Training sets its own
    handler, which saves.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if isinstance(executor, InlineExecutor):
        return executor.submit(Job(), function, *args, visible=visible)
    try:
        with interrupts.handling(signal.SIG_IGN, signal.SIGINT):
            return executor.submit(Job(), function, *args, visible=visible)
    except FailedJobError as error:
        raise ConfigError(f"the job could not be submitted: {_last_line(error)}") from None


def outcome(job) -> Outcome:
    """Returns the outcome of a job that is done; a killed job has left none and has failed."""
    if isinstance(job, _FinishedJob) or job.paths.result_pickle.exists():
        try:
            return job.result()
        except FailedJobError as error:     # an error outside Job; the path of its logs follows the traceback
            trace = str(error).rpartition("\n---")[0]
            return Outcome(FAILED, f"{_last_line(trace or error)}; {job.paths.stderr.resolve()}")
    return Outcome(FAILED, f"the process ended without a result: {_last_line(job.stderr() or '') or job.state}; "
                           f"{job.paths.stderr.resolve()}")


def _last_line(text) -> str:
    return (str(text).strip().splitlines() or [""])[-1]


def run_copies(executor, count: int, function, *args) -> list[Outcome]:
    """Runs `count` jobs of the same call at the same time, waits for all and returns their outcomes."""
    jobs = []
    try:
        for _ in range(count):
            jobs.append(submit(executor, function, *args))
        while not all(job.done() for job in jobs):
            time.sleep(0.2)
    except BaseException:
        stop(jobs)
        raise
    return [outcome(job) for job in jobs]


def stop(jobs: list) -> None:
    """Stops local jobs, which save and end. Jobs on a cluster continue, and the next sweep collects their rows."""
    local = [job for job in jobs if isinstance(job, submitit.LocalJob)]
    for job in local:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(job.job_id), signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline and not all(job.done() for job in local):
        time.sleep(0.2)
