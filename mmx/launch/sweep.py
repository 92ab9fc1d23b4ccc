"""Sweeps: a grid of runs, planned, run through submitit, resumed, and told in one table.

A cell of the grid is an experiment with the keys that made it. Its run is `training.train` on DIR/runs/NAME, so that it goes on
by its own checkpoints; what it found is DIR/runs/NAME/row.json, which exists whole or not at all. DIR/runs.jsonl is made anew
from those, and from what it held, after each run: no moment of a kill can lose a row or double one. The process that trains
holds NAME/lock (by flock): a second one, of a sweep that was killed and started again, leaves the run to it.
"""
import collections
import contextlib
import dataclasses
import datetime
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import submitit
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from submitit.core.utils import FailedJobError

import mmx
from mmx import config
from mmx.config import ConfigError, Experiment
from mmx.data import pipeline, sources, tokens
from mmx.data.document_types import ImageText
from mmx.files import atomic, untrusted
from mmx.training import metrics
from mmx.training.guards import DivergedError

PARTS = 20              # of a run, over each of which a row has means, of norms root mean squares, of COURSE in metrics.jsonl
COURSE = ("tokens", "loss", "grad_norm", "micro_norm", "drop_rate")
MOST_BYTES = 1 << 30    # of runs.jsonl
STEPS = 12              # that measure a FLOP rate; the first two, which compile, do not count
FAILED, MISTAKE, HELD, STOPPED, DONE = "failed", "mistake", "held", "stopped", "done"
EXECUTORS = {"inline": 1, "local": 1, "slurm": 64}      # and how many runs at a time


class RefusedError(ConfigError):
    """Of a sweep that begins no run: nothing of it is left."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run of the grid: its keys as the grid gives them, and what they make."""
    keys: dict
    experiment: Experiment

    @functools.cached_property
    def hash(self) -> str:
        """Of the sections model, train and data, and of guards that are set; not of the mesh."""
        sections = config.sections(self.experiment)
        kept = {name: sections[name] for name in ("model", "train", "data")}
        if self.experiment.guard != config.Guard():     # unsaid where it is the default, as in rows of before
            kept["guard"] = sections["guard"]
        if self.experiment.guard.spike:     # which goes back to the last save
            kept["checkpoint"] = sections["checkpoint"]
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        return "-".join([re.sub(r"[^\w.]+", "_", str(value)) for value in self.keys.values()] + [self.hash])

    @property
    def tokens(self) -> int:
        return self.experiment.train.tokens_seen(self.experiment.train.steps)

    @property
    def per_token(self) -> float:
        return self.experiment.model.flops_training(self.experiment.train.length)

    @property
    def flops(self) -> float:
        return self.tokens * self.per_token


class Rate(NamedTuple):
    """FLOPs a second at some FLOPs a token, what a run costs before its first steps, and where that is known from."""
    points: tuple[tuple[float, float], ...]
    start: float            # seconds
    source: str

    def seconds(self, cell: Cell) -> float:
        at, rates = np.log(sorted(self.points)).T
        return self.start + cell.flops / math.exp(np.interp(math.log(cell.per_token), at, rates))


def cells(grid, make) -> list[Cell]:
    """The cells of what an experiment file's sweep() returns; `make(keys)` is a cell's experiment.

    A dict of values by key is their product; a list of dicts has a cell each.
    """
    if isinstance(grid, dict):
        bad = [key for key, values in grid.items() if not isinstance(values, (list, tuple)) or not values]
        if bad:
            raise ConfigError(f"sweep(): {bad[0]!r} needs a list of values, got {grid[bad[0]]!r}")
        grid = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    if not isinstance(grid, (list, tuple)) or not grid or not all(isinstance(keys, dict) and keys for keys in grid):
        raise ConfigError("sweep() must return a dict of lists of values by key, or a list of dicts, a cell each")
    found, by_hash, holds_out = [], {}, functools.cache(_holds_out)
    for number, keys in enumerate(grid, 1):
        where = f"cell {number} of {len(grid)} ({_told(keys)})"
        try:
            _check_plain(keys)
            cell = Cell(keys, make(keys))
            _check(cell.experiment, holds_out)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        if cell.hash in by_hash:
            raise ConfigError(f"{where} is the same run as cell {by_hash[cell.hash]}: no key that differs changes its config")
        by_hash[cell.hash] = number
        found.append(cell)
    return found


def _told(keys: dict) -> str:
    return ", ".join(f"{key}={value}" for key, value in keys.items())


def _check_plain(keys: dict) -> None:
    """Raises where a row could not hold the keys."""
    for key, value in keys.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise ConfigError(f"{key} is of {type(value).__name__}, which no row can hold: give plain numbers, as int(x) or "
                              "float(x), and strings") from None


def _check(e: Experiment, holds_out) -> None:
    """What a run would find out only when it has begun."""
    if e.train.seconds:
        raise ConfigError(f"train.seconds={e.train.seconds:g} leaves open what a run computes: set train.steps")
    tokens.check_vocab(tokens.tokenizer(e.data.tokenizer), e.model.vocab)
    if not any([holds_out(source) for source in e.data.sources]):       # a list: each source is looked at
        raise ConfigError(f"data.sources={e.data.sources} hold nothing out: without it there is no loss to tell")


def _holds_out(source: str) -> bool:
    """Whether there is a loss to tell of a source: of text or ids, not of images."""
    return source == "sotu" or any(not isinstance(raw, ImageText) for _, raw in sources.documents(source, "validation"))


class Job(submitit.helpers.Checkpointable):
    """What runs where a run is: a function that gives (what came of it, its result or words).

    `visible` are the CUDA devices of the sweep, which submitit hides from local processes. On a cluster a job that is
    preempted or out of time is queued again by submitit, and goes on.
    """

    def __call__(self, function, *args, visible: str | None = None):
        if os.environ.get("SUBMITIT_EXECUTOR") == "local":
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            os.environ |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
            signal.signal(signal.SIGTERM, signal.SIG_DFL)       # until training listens to it; submitit lets it pass
        try:
            return function(*args)
        except ConfigError as error:
            return MISTAKE, " ".join(str(error).split())
        except Exception as error:
            traceback.print_exc()
            return FAILED, " ".join(f"{type(error).__name__}: {error}".split())


def attempt(cell: Cell, folder: Path) -> tuple[str, str]:
    """Trains a run to its end, unless another process does, and writes its row."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        if not _take(lock):
            return HELD, "another process trains it"
        if (folder / "row.json").exists():
            return DONE, ""
        from mmx.training import train

        try:
            done = train.run(cell.experiment, folder)
        except DivergedError as error:
            found = {"loss": None, "bits_per_byte": None, "diverged": str(error)}
        else:
            if done["stopped"]:
                return STOPPED, f"stopped at step {done['step']}"
            found = _held_out(cell.experiment, folder) | {"seconds": done["seconds"]}
        row = _row(cell, folder, found)
        if cell.experiment.train.tensorboard:
            _write_hparams(cell, folder, row)
        _write(folder / "row.json", json.dumps(row))
        return DONE, ""


def rate(cell: Cell, out: Path) -> tuple[str, float]:
    """The FLOPs a second of a cell's steps, in a run that is thrown away."""
    from mmx.training import train

    few = dataclasses.replace(cell.experiment.train, steps=STEPS, eval_every=0, sample_every=0, tensorboard=False)
    with tempfile.TemporaryDirectory(dir=out, prefix="rate-") as folder:
        train.run(dataclasses.replace(cell.experiment, train=few), folder)
        return DONE, float(np.median([record["flops_per_s"] for record in metrics.read(Path(folder))[2:]]))


def _held_out(e: Experiment, folder: Path) -> dict:
    """Nats a token and bits a byte on held-out text; on ids nats a target and the share met, which stand alone without text."""
    found = {"bits_per_byte": None}
    if pipeline.held_out_ids(e.data):
        from mmx.evals import accuracy

        found |= accuracy.measure(folder)
    if pipeline.validation(e.data):
        from mmx.evals import compression

        text = compression.measure(folder, limit=e.train.eval_bytes)
        found |= {"loss": text["nats_per_token"], "bits_per_byte": text["bits_per_byte"]}
    return found


def _row(cell: Cell, folder: Path, found: dict) -> dict:
    """What a run found: the cell's keys, counts, losses, that of training over its last twentieth, its course in PARTS."""
    import jax

    e, m = cell.experiment, cell.experiment.model
    records = metrics.read(folder, "loss")
    last = records[-max(1, len(records) // 20):]
    parts = [part.tolist() for part in np.array_split(np.array(records, object), max(1, min(PARTS, len(records))))]
    known = last[-1] if last else {}        # none: it diverged at the first step
    course = {name: [_mean([record.get(name, math.nan) for record in part], 2 if name.endswith("_norm") else 1)
                     for part in parts] for name in COURSE if name in known}       # a ramp's first steps have no micro_norm
    return cell.keys | {
        "name": cell.name, "hash": cell.hash,
        "params": m.params_active, "params_total": m.params_total, "params_active_all": m.params_active_all,
        "tokens": cell.tokens, "steps": e.train.steps,
        "flops": cell.flops, "flops_companion": cell.tokens * m.flops_companion(e.train.length),
        "seconds": known.get("seconds", 0.0), **found,
        "train_loss": _mean([record["loss"] for record in last]), "course": course, "skipped": known.get("skipped", 0),
        "layer_norms": [_mean(norms) for norms in zip(*[record["layer_norms"] for record in last if "layer_norms" in record])],
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"mmx": mmx.__version__, "jax": jax.__version__, "python": sys.version.split()[0]},
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


def _mean(values, power: int = 1) -> float | None:
    """Of those that are numbers; `power` 2: their root mean square."""
    finite = [value ** power for value in values if math.isfinite(value)]
    return float(np.mean(finite)) ** (1 / power) if finite else None


def _write_hparams(cell: Cell, folder: Path, row: dict) -> None:
    """For TensorBoard, in a folder of their own: those written again take the old ones' place."""
    from tensorboardX import SummaryWriter

    shutil.rmtree(folder / "tensorboard" / "hparams", ignore_errors=True)
    keys = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in cell.keys.items()}
    with SummaryWriter(str(folder / "tensorboard")) as board:
        board.add_hparams(keys | {"params": row["params"], "flops": row["flops"]}, {
            f"final/{name}": row[name] for name in ("loss", "bits_per_byte", "train_loss", "seconds") if row[name] is not None},
            name="hparams")


def _take(lock) -> bool:
    """Whether this process now holds an open file's lock, which ends with it."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _held(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open("a") as lock:
        return not _take(lock)


def _write(path: Path, text: str) -> None:
    """The file is whole, or what it was."""
    with atomic.replacing(path) as file:
        file.write(text + "\n")


def _text(path: Path, most: int = untrusted.JSON_BYTES) -> str:
    return untrusted.content(path, most).decode(errors="replace")


def collect(out: Path) -> dict[str, dict]:
    """The rows of all runs in OUT by hash: those of runs.jsonl, and those that runs left; runs.jsonl is made to have all."""
    path, rows = out / "runs.jsonl", {}
    texts = _text(path, MOST_BYTES).splitlines() if path.exists() else []
    places = [f"{path}:{number}" for number in range(1, len(texts) + 1)]
    own = sorted(out.glob("runs/*/row.json"))
    for place, text in zip([*places, *own], texts + [_text(found) for found in own]):
        try:
            row = untrusted.loads(text)
        except ValueError:      # a line that somebody cut: the run's own row stands
            continue
        if not (isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("name", "hash"))):
            raise ConfigError(f"{place} is no row of a sweep, it has no name and hash: give another --out")
        rows[row["hash"]] = row
    lines = [json.dumps(row) for row in rows.values()]
    if lines != texts:
        _write(path, "\n".join(lines))
    return rows


class Inline:
    """submitit's interface in this process. (Its own executor for that ends in a debugger where a run fails.)"""

    def __init__(self, log: Path):
        self.log = log

    def submit(self, job, *args, **kwargs):
        with self.log.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            return _Ended(job(*args, **kwargs))


class _Ended(NamedTuple):
    outcome: tuple

    def done(self) -> bool:
        return True

    def result(self) -> tuple:
        return self.outcome


def executor(kind: str, out: Path, slurm: str):
    """Where jobs run: "inline", "local" or "slurm", there with parameters, as "partition=gpu,gpus_per_node=8"."""
    if slurm and kind != "slurm":
        raise RefusedError(f"--slurm {slurm} needs --executor slurm")
    if kind == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise RefusedError("--executor slurm: no sbatch and srun here, this is no SLURM cluster; --executor local runs "
                           "processes on this machine")
    pairs = [pair.partition("=")[::2] for pair in filter(None, slurm.split(","))]
    parameters = {key: int(value) if value.isdecimal() else value for key, value in pairs}
    if parameters.get("nodes", 1) != 1 or parameters.get("ntasks_per_node", 1) != 1:
        raise RefusedError(f"--slurm {slurm}: a run is one process on one node, with all its devices; leave nodes and "
                           "ntasks_per_node at 1")
    (out / "jobs").mkdir(parents=True, exist_ok=True)
    if kind == "inline":
        return Inline(out / "jobs" / "inline.log")
    # its own: local jobs are numbered by process, and an older sweep's result of that number is not this one's
    folder = tempfile.mkdtemp(dir=out / "jobs", prefix=time.strftime("%Y%m%d-%H%M%S-"))
    if kind == "local":
        made = submitit.LocalExecutor(folder)
        made.update_parameters(timeout_min=60 * 24 * 365)
        return made
    made = submitit.SlurmExecutor(folder)
    try:
        made.update_parameters(**{"time": 60 * 24, "job_name": "mmx-sweep"} | parameters)
    except (TypeError, ValueError) as error:
        raise RefusedError(f"--slurm {slurm}: {str(error).replace(chr(10), ' ')}") from None
    return made


def estimate(todo: list[Cell], done: list[dict], start, out: Path, given: float | None) -> Rate | None:
    """The rate of what is to do: as given, of runs that ended here, or measured; None where it cannot be measured.

    `start(function, ...)` runs a function as a run will be, beside as many others as will be, and waits for all.
    """
    if given:
        return Rate(((1.0, given),), 0.0, "as --rate says")
    ended = [row for row in done if row["loss"] is not None and row["seconds"]]     # the others stopped short
    if ended:
        spent = collections.defaultdict(list)
        for row in ended:
            spent[row["flops"] / row["tokens"]].append(row["seconds"] / row["flops"])
        points = tuple((per_token, 1 / float(np.mean(seconds))) for per_token, seconds in spent.items())
        return Rate(points, 0.0, f"as {len(ended)} run{'s' * (len(ended) > 1)} here had")
    if not start:
        return None
    ends = [pick(todo, key=lambda cell: cell.per_token) for pick in (min, max)]
    points, spent = {}, []
    for cell in ends[ends[0] is ends[1]:]:
        begin = time.monotonic()
        outcomes = start(rate, cell, out)
        for kind, value in outcomes:
            if kind != DONE:
                raise ConfigError(f"{_told(cell.keys)}: {value}")
        points[cell.per_token] = float(np.mean([value for _, value in outcomes]))
        spent.append(time.monotonic() - begin - STEPS * cell.flops / cell.experiment.train.steps / points[cell.per_token])
    names = " and of ".join(f"({_told(cell.keys)})" for cell in ends[ends[0] is ends[1]:])
    names += f", {len(outcomes)} at a time" * (len(outcomes) > 1)
    return Rate(tuple(points.items()), float(np.mean(spent)), f"measured by {STEPS} steps of {names}")


def show_plan(cells: list[Cell], todo: list[Cell], known: Rate | None, hours: float | None, jobs: int) -> Table:
    """What the grid is and what it will take."""
    table = Table("", "", title=f"{len(cells)} runs, {len(cells) - len(todo)} of them done", show_header=False)
    for key in dict.fromkeys(key for cell in cells for key in cell.keys):
        table.add_row(key, ", ".join(dict.fromkeys(str(cell.keys[key]) for cell in cells if key in cell.keys)))
    table.add_section()
    params = [cell.experiment.model.params_active for cell in cells]
    table.add_row("active parameters", f"{min(params):,} to {max(params):,}, without embedding and head")
    table.add_row("tokens", f"{sum(cell.tokens for cell in cells):,}, {sum(cell.tokens for cell in todo):,} of them to do")
    table.add_row("FLOPs", f"{sum(cell.flops for cell in cells):.3g}, {sum(cell.flops for cell in todo):.3g} of them to do")
    if hours is not None:
        rates = sorted(rate for _, rate in known.points)
        told = f"{rates[0]:.3g}" + f" to {rates[-1]:.3g}" * (rates[-1] > rates[0])
        begun = f", {known.start:.0f} s to start a run" * bool(known.start)
        table.add_row("hours expected", f"{hours:.2f}, {jobs} at a time, at {told} FLOP/s{begun}; {known.source}")
    elif todo:
        table.add_row("hours expected", "unknown here: --rate FLOPS gives the FLOPs a second of a run")
    return table


@dataclasses.dataclass
class Board:
    """Where the runs of a sweep stand, for the live table."""
    out: Path
    todo: list[Cell]
    states: dict[str, str]          # of the runs to do, by name
    begin: float = dataclasses.field(default_factory=time.monotonic)

    def __rich__(self):
        table, done = Table("run", "", "step", "loss", "tokens/s"), 0.0
        for cell in self.todo:
            state, last = self.states[cell.name], metrics.latest(self.out / "runs" / cell.name) or {}
            share = 1.0 if state == DONE else last.get("step", 0) / cell.experiment.train.steps
            done += share * cell.flops
            if state not in (DONE, "waiting"):
                table.add_row(cell.name, state, f"{last.get('step', 0):,} of {cell.experiment.train.steps:,}",
                              *(f"{last[name]:{form}}" if name in last else ""
                                for name, form in (("loss", ".3f"), ("tokens_per_s", ",.0f"))))
        total, passed = sum(cell.flops for cell in self.todo), time.monotonic() - self.begin
        ended = list(self.states.values()).count(DONE)
        return Group(table, f"{ended} of {len(self.todo)} runs, {done / total:.0%} of the FLOPs, {passed / 60:.1f} minutes",
                     ProgressBar(total=total, completed=done, width=60))


def run(cells: list[Cell], out: str | Path, *, kind: str = "local", jobs: int | None = None, retries: int = 1,
        hours: float | None = None, flops_per_s: float | None = None, slurm: str = "", title: str = "") -> dict[str, str]:
    """Plans the runs of a grid that OUT has not, runs them, and tells them; what became of those that failed, by name."""
    out, jobs = Path(out), jobs or EXECUTORS[kind]
    console = Console(file=sys.stdout)      # of now: Inline sends that of its runs to a file
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        if not _take(lock):
            raise ConfigError(f"another mmx sweep is at work in {out}: wait for it, or give another --out")
        try:
            pool = executor(kind, out, slurm)
            todo = _planned(cells, out, pool, kind, jobs, hours, flops_per_s, console)
        except RefusedError:
            if new:
                shutil.rmtree(out)
            raise
        failed = _loop(todo, out, pool, jobs, retries, console) if todo else {}
        rows = collect(out)
        console.print(show([rows[cell.hash] for cell in cells if cell.hash in rows], title))
        return failed


def _planned(cells: list[Cell], out: Path, pool, kind: str, jobs: int, hours, flops_per_s, console: Console) -> list[Cell]:
    """The runs that OUT has not, after their plan is told."""
    rows = collect(out)
    todo = [cell for cell in cells if cell.hash not in rows]
    if not todo:
        return todo
    start = functools.partial(_together, pool, min(jobs, len(todo))) if kind != "slurm" else None
    here = [rows[cell.hash] for cell in cells if cell.hash in rows]
    with console.status("measuring how fast a run is"):
        known = estimate(todo, here, start, out, flops_per_s)
    expected = known and sum(map(known.seconds, todo)) / 3600 / min(jobs, len(todo))
    console.print(show_plan(cells, todo, known, expected, jobs), soft_wrap=True)
    if hours is not None and (expected is None or expected > hours):
        told = "an unknown time" if expected is None else f"{expected:.2f} hours ({known.source})"
        raise RefusedError(f"the {len(todo)} runs need {told}, --hours {hours:g} is less: give fewer or shorter runs, more "
                           "--jobs, or more hours")
    return todo


def _together(pool, count: int, *job) -> list[tuple]:
    """The outcomes of a job that is under way `count` times at once."""
    under_way = [_submit(pool, *job) for _ in range(count)]
    while not all(submitted.done() for submitted in under_way):
        time.sleep(0.2)
    return [_outcome(submitted) for submitted in under_way]


def _submit(pool, *job):
    """Local processes are started deaf to Ctrl-C, which the terminal sends to all: a run that trains listens and saves."""
    if isinstance(pool, Inline):
        return pool.submit(Job(), *job, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
    hears = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return pool.submit(Job(), *job, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
    except FailedJobError as error:
        raise ConfigError(f"a job was not taken: {_last_line(error)}") from None
    finally:
        signal.signal(signal.SIGINT, hears)


def _outcome(job) -> tuple[str, str]:
    """What a job that is done says; one that was killed says nothing."""
    if isinstance(job, _Ended) or job.paths.result_pickle.exists():
        try:
            return job.result()
        except FailedJobError as error:     # outside what Job catches; where its logs are follows its trace
            trace = str(error).rpartition("\n---")[0]
            return FAILED, f"{_last_line(trace or error)}; {job.paths.stderr}"
    return FAILED, f"ended without a word: {_last_line(job.stderr() or '') or job.state}; {job.paths.stderr}"


def _last_line(said) -> str:
    return (str(said).strip().splitlines() or [""])[-1]


def _loop(todo: list[Cell], out: Path, pool, jobs: int, retries: int, console: Console) -> dict[str, str]:
    """Runs cells until each is done or has failed for good; why those did, by name."""
    folder = lambda cell: out / "runs" / cell.name
    board = Board(out, todo, {cell.name: "waiting" for cell in todo})
    states, left, under_way, failed = board.states, list(todo), {}, {}
    tries = dict.fromkeys(states, 0)
    say = functools.partial(console.print, soft_wrap=True, markup=False, highlight=False)

    def ended(cell, kind, words):
        if kind == DONE or (folder(cell) / "row.json").exists():        # it may have been killed behind its row
            kind = DONE
            row = collect(out)[cell.hash]
            told = "diverged" if row["loss"] is None else f"loss {row['loss']:.4f}"
            say(f"done: {cell.name}, {told}, {row['seconds']:.0f} s")
        elif kind == STOPPED and isinstance(pool, Inline):      # it had the signal that was meant for the sweep
            raise KeyboardInterrupt
        elif os.strerror(errno.ENOSPC) in words:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}; the same command goes on when there is some", str(out))
        elif kind in (HELD, STOPPED) or (kind == FAILED and tries[cell.name] < retries):
            left.append(cell)
            tries[cell.name] += kind == FAILED
            say(f"{'again' if kind == FAILED else 'waits'}: {cell.name}, {words}")
            kind = "waiting"
        else:
            failed[cell.name] = words
            say(f"failed: {cell.name}, {words}")
        states[cell.name] = kind

    with _stopped_by_sigterm(), Live(get_renderable=lambda: board, console=console, refresh_per_second=1, transient=True,
                                     redirect_stdout=False, redirect_stderr=False):
        try:
            while left or under_way:
                states |= {cell.name: "elsewhere" if _held(folder(cell) / "lock") else "waiting" for cell in left}
                free = jobs - len(under_way) - list(states.values()).count("elsewhere")
                for cell in [cell for cell in left if states[cell.name] == "waiting"][:max(free, 0)]:
                    left.remove(cell)
                    states[cell.name] = "running"
                    under_way[cell.name] = cell, _submit(pool, attempt, cell, folder(cell))
                for cell, job in list(under_way.values()):
                    if job.done():
                        del under_way[cell.name]
                        ended(cell, *_outcome(job))
                time.sleep(0.2)
        except BaseException:
            _stop([job for _, job in under_way.values()])
            raise
    return failed


@contextlib.contextmanager
def _stopped_by_sigterm():
    """SIGTERM ends the sweep as Ctrl-C does."""
    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(jobs: list) -> None:
    """Local runs save and end; what a cluster has queued stays there, and the next sweep finds what it did."""
    local = [job for job in jobs if isinstance(job, submitit.LocalJob)]
    for job in local:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(job.job_id), signal.SIGTERM)
    until = time.monotonic() + 60
    while time.monotonic() < until and not all(job.done() for job in local):
        time.sleep(0.2)


def show(rows: list[dict], title: str) -> Table:
    """What runs found, a line each."""
    names = ("parameters", "tokens", "FLOPs", "training loss", "loss", "bits/byte", "s")
    table = Table(Column("run", overflow="fold"), *names, title=title,
                  caption="losses in nats a token; loss on held-out text or ids, bits/byte on text; none: diverged")
    for row in rows:
        losses = ["" if loss is None else f"{loss:.4f}" for loss in (row["train_loss"], row["loss"], row["bits_per_byte"])]
        table.add_row(row["name"], f"{row['params']:,}", f"{row['tokens']:,}", f"{row['flops']:.3g}", *losses,
                      f"{row['seconds']:,.0f}")
    return table
