"""Runs the cells of a grid that have no row yet, with a live table."""
import contextlib
import dataclasses
import errno
import functools
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from mmx.config import ConfigError
from mmx.files import output
from mmx.launch.sweep import executors, plan, rows
from mmx.launch.sweep.executors import ExecutorOptions, RefusedError
from mmx.launch.sweep.grid import Cell
from mmx.launch.sweep.worker import DONE, FAILED, LOCKED, STOPPED, Outcome, attempt, is_locked, try_lock
from mmx.startup import interrupts
from mmx.training import metrics

WAITING, RUNNING, ELSEWHERE = "waiting", "running", "elsewhere"     # states of a run that has not ended


def run(cells: list[Cell], out: str | Path, options: ExecutorOptions, *, retries: int = 1,
        hours: float | None = None, flops_per_s: float | None = None, title: str = "") -> dict[str, str]:
    """Runs the cells that have no row in `out`, and prints the plan, the progress and the results.

    Args:
      options: where runs execute, and how many at a time.
      retries: how often a failed run is started again.
      hours: refuses a sweep that is expected to take longer.
      flops_per_s: speed of a run; None: taken from finished runs, or measured.
      title: of the table of results.
    Returns:
      why each failed run failed, by name.
    Raises:
      ConfigError: another sweep runs in `out`, or the sweep is refused.
    """
    out = Path(out)
    console = output.console(file=sys.stdout)      # bound now: InlineExecutor redirects sys.stdout while a run executes
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    # Ctrl-C and SIGTERM raise KeyboardInterrupt here, which stops the runs in other processes. A run in this process may
    # compile, and must not be interrupted by an exception.
    if options.kind == "inline":
        stops, handler = contextlib.nullcontext(), interrupts.end_program
    else:
        stops, handler = interrupts.unwinding(), _interrupt
    with stops, interrupts.handling(handler, signal.SIGTERM), (out / "lock").open("w") as file:
        if not try_lock(file):
            raise ConfigError(f"another mmx sweep is running in {out}: wait for its end, or use another --out")
        try:
            executor = executors.make(options, out)
            todo = _plan(cells, out, executor, options, hours, flops_per_s, console)
        except RefusedError:
            if new:
                shutil.rmtree(out)
            raise
        failed = _Scheduler(todo, out, executor, options.max_jobs, retries, console).run() if todo else {}
        found = rows.collect(out)
        console.print(rows.results_table([found[cell.hash] for cell in cells if cell.hash in found], title))
        return failed


def _plan(cells: list[Cell], out: Path, executor, options: ExecutorOptions, hours: float | None,
          flops_per_s: float | None, console: Console) -> list[Cell]:
    """Prints the plan and returns the cells that have no row; raises RefusedError if they need more than `hours`."""
    found, jobs = rows.collect(out), options.max_jobs
    todo = [cell for cell in cells if cell.hash not in found]
    if not todo:
        return todo
    at_once = min(jobs, len(todo))
    run_copies = functools.partial(executors.run_copies, executor, at_once) if options.kind != "slurm" else None
    done = [found[cell.hash] for cell in cells if cell.hash in found]
    with console.status("measuring the speed of a run"):
        rate = plan.estimate_rate(todo, done, run_copies, out, flops_per_s)
    expected = rate and sum(map(rate.seconds, todo)) / 3600 / at_once
    console.print(plan.plan_table(cells, todo, rate, expected, jobs), soft_wrap=True)
    if hours is not None and (expected is None or expected > hours):
        need = "an unknown time" if expected is None else f"{expected:.2f} hours ({rate.source})"
        raise RefusedError(f"the {len(todo)} runs need {need}, which exceeds --hours {hours:g}: use fewer or shorter runs, "
                           "more --jobs, or more hours")
    return todo


@dataclasses.dataclass
class _Progress:
    """The live table: the state of each run of a sweep, read from its metrics.jsonl."""
    out: Path
    todo: list[Cell]
    states: dict[str, str]          # by name of the run
    begin: float = dataclasses.field(default_factory=time.monotonic)

    def __rich__(self):
        table, done = Table("run", "", "step", "loss", "tokens/s"), 0.0
        for cell in self.todo:
            state, last = self.states[cell.name], metrics.latest(self.out / "runs" / cell.name) or {}
            share = 1.0 if state == DONE else last.get("step", 0) / cell.experiment.train.steps
            done += share * cell.flops
            if state not in (DONE, WAITING):
                table.add_row(cell.name, state, f"{last.get('step', 0):,} of {cell.experiment.train.steps:,}",
                              *(f"{last[name]:{form}}" if name in last else ""
                                for name, form in (("loss", ".3f"), ("tokens_per_s", ",.0f"))))
        total, elapsed = sum(cell.flops for cell in self.todo), time.monotonic() - self.begin
        ended = list(self.states.values()).count(DONE)
        return Group(table, f"{ended} of {len(self.todo)} runs, {done / total:.0%} of the FLOPs, {elapsed / 60:.1f} minutes",
                     ProgressBar(total=total, completed=done, width=60))


class _Scheduler:
    """Runs cells, at most `jobs` at a time, until each has a row or has failed `retries` + 1 times."""

    def __init__(self, todo: list[Cell], out: Path, executor, jobs: int, retries: int, console: Console):
        self.todo, self.out, self.executor, self.jobs, self.retries, self.console = todo, out, executor, jobs, retries, console
        self.states = {cell.name: WAITING for cell in todo}
        self.tries = {cell.name: 0 for cell in todo}
        self.queue, self.running, self.failed = list(todo), {}, {}
        self.print = functools.partial(console.print, soft_wrap=True, highlight=False)

    def run(self) -> dict[str, str]:
        """Returns why each failed run failed, by name."""
        progress = _Progress(self.out, self.todo, self.states)
        with Live(get_renderable=lambda: progress, console=self.console, refresh_per_second=1, transient=True,
                  redirect_stdout=False, redirect_stderr=False):
            try:
                while self.queue or self.running:
                    self._start()
                    for cell, job in list(self.running.values()):
                        if job.done():
                            del self.running[cell.name]
                            self._finish(cell, executors.outcome(job))
                    time.sleep(0.2)
            except BaseException:
                executors.stop([job for _, job in self.running.values()])
                raise
        return self.failed

    def _folder(self, cell: Cell) -> Path:
        return self.out / "runs" / cell.name

    def _start(self) -> None:
        """Submits as many waiting runs as there are free places; runs that other processes train use places too."""
        for cell in self.queue:
            self.states[cell.name] = ELSEWHERE if is_locked(self._folder(cell) / "lock") else WAITING
        free = self.jobs - len(self.running) - list(self.states.values()).count(ELSEWHERE)
        for cell in [cell for cell in self.queue if self.states[cell.name] == WAITING][:max(free, 0)]:
            self.queue.remove(cell)
            self.states[cell.name] = RUNNING
            self.running[cell.name] = cell, executors.submit(self.executor, attempt, cell, self._folder(cell))

    def _finish(self, cell: Cell, outcome: Outcome) -> None:
        """Records the outcome of a run, and queues the run again if it failed and has a retry left."""
        status, reason = outcome
        if status == DONE or rows.exists(self._folder(cell)):       # a job may be killed after it has written its row
            row = rows.collect(self.out)[cell.hash]
            result = "diverged" if row["loss"] is None else f"loss {row['loss']:.4f}"
            self.print(f"done: {cell.name}, {result}, {row['seconds']:.0f} s")
            self.states[cell.name] = DONE
        elif status == STOPPED and isinstance(self.executor, executors.InlineExecutor):     # the signal was for the sweep
            raise KeyboardInterrupt
        elif os.strerror(errno.ENOSPC) in reason:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}; free some, then the same command continues the sweep",
                          str(self.out))
        elif status in (LOCKED, STOPPED) or (status == FAILED and self.tries[cell.name] < self.retries):
            self.queue.append(cell)
            self.tries[cell.name] += status == FAILED
            self.print(f"{'retry' if status == FAILED else 'waiting'}: {cell.name}, {reason}")
            self.states[cell.name] = WAITING
        else:
            self.failed[cell.name] = reason
            self.print(f"failed: {cell.name}, {reason}")
            self.states[cell.name] = status


def _interrupt(*_):
    raise KeyboardInterrupt
