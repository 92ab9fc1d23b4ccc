"""The plan of a sweep: how fast runs are, and how long all of them take."""
import collections
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table

from mmx.analysis.counts import count_params
from mmx.config import ConfigError
from mmx.launch.sweep.grid import Cell, format_keys
from mmx.launch.sweep.worker import DONE, RATE_STEPS, measure_rate


class Rate(NamedTuple):
    """How fast runs are. Between `points` the rate is interpolated on log-log axes."""
    points: tuple[tuple[float, float], ...]     # (FLOPs per token, FLOPs per second)
    start_seconds: float                        # of each run before its first step
    source: str                                 # where the rate comes from, in words

    def seconds(self, cell: Cell) -> float:
        log_per_token, log_per_s = np.log(sorted(self.points)).T
        flops_per_s = math.exp(np.interp(math.log(cell.flops_per_token), log_per_token, log_per_s))
        return self.start_seconds + cell.flops / flops_per_s


def estimate_rate(todo: list[Cell], done: list[dict], run_copies, out: Path, given: float | None) -> Rate | None:
    """Returns the rate as given, else of the finished runs, else measured; None where none of them is possible.

    Args:
      todo: the cells to run.
      done: the rows of the sweep's finished runs.
      run_copies: run_copies(function, *args) executes copies of a job at the same time, as many as the sweep will execute runs
        at the same time, and returns their outcomes. None: the rate cannot be measured.
      out: where the runs that measure keep their files.
      given: FLOPs per second, or None.
    """
    if given:
        return Rate(((1.0, given),), 0.0, "rate given by --rate")
    complete = [row for row in done if row["loss"] is not None and row["seconds"]]      # diverged runs stopped early
    if complete:
        return _rate_of_rows(complete)
    return _measured_rate(todo, run_copies, out) if run_copies else None


def _rate_of_rows(rows: list[dict]) -> Rate:
    spent = collections.defaultdict(list)
    for row in rows:
        spent[row["flops"] / row["tokens"]].append(row["seconds"] / row["flops"])
    points = tuple((flops_per_token, 1 / float(np.mean(seconds))) for flops_per_token, seconds in spent.items())
    return Rate(points, 0.0, f"rate of {len(rows)} finished run{'s' * (len(rows) > 1)}")


def _measured_rate(todo: list[Cell], run_copies, out: Path) -> Rate:
    """Measures the cells with the fewest and the most FLOPs per token."""
    smallest, largest = (pick(todo, key=lambda cell: cell.flops_per_token) for pick in (min, max))
    points, start_seconds, ends = {}, [], [smallest] if smallest is largest else [smallest, largest]
    for cell in ends:
        begin = time.monotonic()
        outcomes = run_copies(measure_rate, cell, out)
        for status, value in outcomes:
            if status != DONE:
                raise ConfigError(f"{format_keys(cell.keys)}: {value}")
        points[cell.flops_per_token] = float(np.mean([value for _, value in outcomes]))
        step_seconds = cell.flops / cell.experiment.train.steps / points[cell.flops_per_token]
        start_seconds.append(time.monotonic() - begin - RATE_STEPS * step_seconds)
    names = " and ".join(f"({format_keys(cell.keys)})" for cell in ends)
    names += f", {len(outcomes)} at a time" * (len(outcomes) > 1)
    return Rate(tuple(points.items()), float(np.mean(start_seconds)), f"measured over {RATE_STEPS} steps of {names}")


def plan_table(cells: list[Cell], todo: list[Cell], rate: Rate | None, hours: float | None, jobs: int) -> Table:
    """Returns a table of the grid's keys, of its cost, and of the hours that the cells of `todo` need."""
    table = Table("", "", title=f"{len(cells)} runs, {len(cells) - len(todo)} of them done", show_header=False)
    for key in dict.fromkeys(key for cell in cells for key in cell.keys):
        table.add_row(key, ", ".join(dict.fromkeys(str(cell.keys[key]) for cell in cells if key in cell.keys)))
    table.add_section()
    params = [count_params(cell.experiment.model).active for cell in cells]
    table.add_row("active parameters", f"{min(params):,} to {max(params):,}, without embedding and head")
    table.add_row("tokens", f"{sum(cell.tokens for cell in cells):,}, of which {sum(cell.tokens for cell in todo):,} remain")
    table.add_row("FLOPs", f"{sum(cell.flops for cell in cells):.3g}, of which {sum(cell.flops for cell in todo):.3g} remain")
    if hours is not None:
        rates = sorted(flops_per_s for _, flops_per_s in rate.points)
        span = f"{rates[0]:.3g}" + f" to {rates[-1]:.3g}" * (rates[-1] > rates[0])
        start = f", {rate.start_seconds:.0f} s to start a run" * bool(rate.start_seconds)
        table.add_row("expected hours", f"{hours:.2f}, {jobs} at a time, at {span} FLOP/s{start}; {rate.source}")
    elif todo:
        table.add_row("expected hours", "unknown: give a run's FLOPs per second with --rate")
    return table
