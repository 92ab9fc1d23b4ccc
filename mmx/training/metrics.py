"""What a run tells: metrics.jsonl (one object a step), TensorBoard, the progress bar."""
import contextlib
import functools
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from mmx import config
from mmx.files import atomic, untrusted

SCALARS = ("loss", "bits_per_byte", "grad_norm", "lr", "tokens_per_s", "flops_per_s", "aux_loss", "z_loss", "drop_rate",
           "overflow_rate", "skipped", "rollbacks")
FIGURES = {"step", "seconds", "tokens", *SCALARS}      # numbers, where others may be lists
MOST_BYTES = 1 << 30        # of metrics.jsonl: 1,000,000 steps


class Log:
    """Writes the metrics of a run in WORKDIR; lines past `step`, which a restored run makes again, are cut.

    That of a process which does not `write` tells the time alone. OSError names the file that could not be written.
    """

    def __init__(self, workdir: Path, t: config.Train, step: int, tokens: int, write: bool = True):
        self.path, self.seconds, self.tensorboard = workdir / "metrics.jsonl", t.seconds, t.tensorboard
        self.file = self.board = None
        if write:
            self._open(step)
        self.bar = tqdm(total=None if t.seconds else t.steps, initial=step, unit="step", desc="train", disable=not write,
                        mininterval=0.5 if sys.stderr.isatty() else 30)
        self.last = tokens, time.monotonic()

    def _open(self, step: int):
        _cut(self.path, step)
        self.file = self.path.open("a")
        if self.tensorboard:
            # it imports torch where there is one: seconds
            from tensorboardX import SummaryWriter

            self.board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step + 1)
            self.events = _Events(self.board.file_writer.event_writer)

    def go_back(self, step: int, tokens: int):
        """What is past `step` will be made again."""
        if self.file:
            self._shut()
            self._open(step)
        self.bar.n, self.last = step, (tokens, time.monotonic())

    def tokens_per_s(self, tokens: int) -> float:
        """Since the last call, or since the log was opened."""
        before, self.last = self.last, (tokens, time.monotonic())
        return (tokens - before[0]) / (self.last[1] - before[1])

    def step(self, record: dict, load_LE, dropped_L, board: bool):
        """One step's figures; `board` says whether TensorBoard gets them too."""
        if not self.file:
            return
        with atomic.named(self.path):
            self.file.write(_line(record))
        left = f", {max(0, self.seconds - record['seconds']):.0f} s left" if self.seconds else ""
        self.bar.set_postfix_str(f"loss {record['loss']:.3f}, {record['bits_per_byte']:.3f} bits/byte, "
                                 f"{record['tokens_per_s']:,.0f} tokens/s{left}", refresh=False)
        if self.board and board:
            step = record["step"]
            for name in SCALARS:
                self.board.add_scalar(f"train/{name}", record[name], step)
            for layer, (load_E, dropped) in enumerate(zip(load_LE, dropped_L)):
                self.board.add_scalar(f"load_max_over_mean/layer_{layer:02}", load_E.max() * len(load_E), step)
                self.board.add_scalar(f"drop_rate/layer_{layer:02}", dropped, step)
            heat_LE = np.clip(load_LE * load_LE.shape[1] / 2, 0, 1)       # mid-grey is balanced
            self.board.add_image("expert_load/layers_by_experts", heat_LE.repeat(8, 0).repeat(8, 1), step, dataformats="HW")

    def scalar(self, name: str, value: float, step: int):
        if self.file:
            self.bar.write(f"step {step}: {name} {value:.4f}")
        if self.board:
            self.board.add_scalar(name, value, step)

    def say(self, words: str, step: int):
        """What a guard did, or a start found."""
        if self.file:
            self.bar.write(words, file=sys.stderr)
        self.text("guard", words, step)

    def text(self, name: str, value: str, step: int):
        if self.board:
            self.board.add_text(name, value, step)

    def flush(self):
        """What was written is on disk, metrics.jsonl whole."""
        if self.file:
            with atomic.named(self.path):
                self.file.flush()
                os.fsync(self.file.fileno())
        if self.board:
            self.events.check()

    def close(self):
        try:
            self.bar.close()
            self._shut()
        finally:
            self.file = self.board = None

    def _shut(self):
        with contextlib.ExitStack() as all_of_it:
            if self.board:
                all_of_it.callback(self.board.close)
            if self.file:
                all_of_it.enter_context(atomic.named(self.path))
                all_of_it.callback(self.file.close)
                self.flush()


class _Events:
    """Keeps a full disk from the thread that writes TensorBoard's events: it would end, and the next event wait for ever."""

    def __init__(self, writer):
        self.problem, inner = None, writer._ev_writer
        for name in ("write_event", "flush", "close"):
            setattr(inner, name, functools.partial(self._try, name, getattr(inner, name), inner._file_name))

    def _try(self, name, function, path, *args):
        try:
            return function(*args) if name == "close" or not self.problem else None
        except OSError as error:
            self.problem = OSError(error.errno, error.strerror, path)

    def check(self):
        if self.problem:
            raise self.problem


def read(workdir: Path, *names: str) -> list[dict]:
    """The lines of metrics.jsonl (none without one) that have these names, nan for null; none behind a damaged one.

    Raises ConfigError where it is no plain file, or of more than MOST_BYTES.
    """
    path, records = workdir / "metrics.jsonl", []
    for line in untrusted.content(path, MOST_BYTES).splitlines() if path.exists() else ():
        try:
            records.append(_record(line))
        except ValueError:
            break
    return [record for record in records if all(name in record for name in names)]


def latest(workdir: Path) -> dict | None:
    """The last whole line of metrics.jsonl, of 1 MiB at most; None without one."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return None
    with untrusted.opened(path, sys.maxsize) as file:
        file.seek(max(0, path.stat().st_size - 2**20))
        lines = file.read(2**20).split(b"\n")[:-1]
    try:
        return _record(lines[-1])
    except (IndexError, ValueError):
        return None


def _record(line: bytes) -> dict:
    """A line of metrics.jsonl; raises ValueError unless it has a step, and all in it are numbers or lists of them."""
    record = untrusted.loads(line)
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise ValueError("no step of a run")
    return {name: (_number if name in FIGURES else _numbers)(value) for name, value in record.items()}


def _numbers(value):
    return _each(value, _number)


def _number(x) -> int | float:
    if x is None:
        return math.nan
    if type(x) is float or (type(x) is int and abs(x) < 2**63):
        return x
    raise ValueError("no number")


def _line(record: dict) -> str:
    """JSON has no nan and no infinity: null."""
    return json.dumps({k: _each(v, lambda x: x if math.isfinite(x) else None) for k, v in record.items()}) + "\n"


def _each(value, change):
    return [change(x) for x in value] if isinstance(value, list) else change(value)


def _cut(path: Path, step: int):
    """Keeps the lines of steps up to `step`, before the first that is damaged, as they are: a file of any size."""
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(untrusted.opened(path, sys.maxsize)) if path.exists() else ()
        file = stack.enter_context(atomic.replacing(path, "wb"))
        for line in lines:
            try:
                kept = untrusted.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):
                break
            if kept:
                file.write(line.removesuffix(b"\n") + b"\n")
