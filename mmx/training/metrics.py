"""The metrics of a run: metrics.jsonl (one object for each step and each evaluation), TensorBoard and the progress bar."""
import contextlib
import functools
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmx import config
from mmx.analysis.counts import flops_tile, flops_training
from mmx.files import atomic, json_text, output, texts, untrusted

SCALARS = ("loss", "bits_per_byte", "grad_norm", "lr", "tokens_per_s", "flops_per_s", "data_wait", "aux_loss", "z_loss",
           "drop_rate", "overflow_rate", "skipped", "rollbacks")
NUMERIC_FIELDS = {"step", "seconds", "tokens", *SCALARS}      # fields that must be a number; others may be lists of numbers
EVALUATION = "held_out_loss"        # the field that only records of evaluations have
MOST_BYTES = 1 << 30        # largest metrics.jsonl that `read` accepts, about 1,000,000 steps


class StepResult(NamedTuple):
    """A finished step."""
    step: int           # the first is 1
    tokens: int         # tokens of the run up to and including this step
    tiles: int          # image tiles in the step's batch
    lr: float
    seconds: float      # training time of the run when the step was dispatched
    dispatched: float   # the same moment on time.monotonic's clock
    waited: float       # seconds that the step waited for its batch
    metrics: dict       # what `step.train_step` returns


def build_record(e: config.Experiment, result: StepResult, counts: dict, bytes_per_token: float, speed: dict) -> dict:
    """The record of a step for metrics.jsonl. `counts` is from `Guard.counts`, `speed` from `Log.speed`."""
    m, c = result.metrics, e.model
    tiles_per_token = result.tiles / (result.tokens - e.train.tokens_seen(result.step - 1))
    flops_per_token = flops_training(c, e.train.length) + 3 * tiles_per_token * flops_tile(c)
    record = {"step": result.step, "loss": float(m["loss"]), "bits_per_byte": float(m["loss"]) / math.log(2) / bytes_per_token,
              "tokens": result.tokens, "lr": result.lr, "grad_norm": float(m["grad_norm"]), "seconds": result.seconds,
              "aux_loss": float(m["aux_loss"]), "z_loss": float(m["z_loss"]), "drop_rate": float(m["dropped"].mean()),
              "overflow_rate": float(m["overflow"].mean()), **counts, **speed,
              "flops_per_s": speed["tokens_per_s"] * flops_per_token}
    if c.vision.layers:
        record["tiles"] = result.tiles
    if "contrastive_loss" in m:
        record["contrastive_loss"] = float(m["contrastive_loss"])
    if "layer_norms" in m:
        record["layer_norms"] = [float(f"{norm:.4g}") for norm in m["layer_norms"]]
    if "micro_norm_squared" in m:
        # The root mean square of the micro-batches' gradient norms. The noise of these gradients makes it larger than
        # grad_norm, the norm of their mean.
        record["micro_norm"] = math.sqrt(m["micro_norm_squared"])
    return record


def evaluation_record(step: int, tokens: int, result) -> dict:
    """The record of an evaluation for metrics.jsonl. It has no "held_out_bits_per_byte" if only token ids were scored.

    Args:
      result: an `evaluate.HeldOut`.
    """
    record = {"step": step, "tokens": tokens, EVALUATION: result.loss, "held_out_bits_per_byte": result.bits_per_byte,
              "held_out_documents": result.documents, "held_out_tokens": result.targets}
    return {name: value for name, value in record.items() if value is not None}


class Log:
    """Writes the metrics of a run.

    A resumed run repeats the steps after its checkpoint. Opening a log therefore removes the lines after `step`. A process with
    `write=False` writes nothing and only measures the throughput. If a file cannot be written, the OSError contains its name.
    """

    def __init__(self, workdir: Path, t: config.Train, step: int, tokens: int, write: bool = True):
        self.path, self.seconds, self.tensorboard = workdir / "metrics.jsonl", t.seconds, t.tensorboard
        self.file = self.board = None
        if write:
            self._open(step)
        self.bar = output.bar(total=None if t.seconds else t.steps, initial=step, unit="step", desc="train", disable=not write)
        self.last = tokens, time.monotonic()

    def _open(self, step: int):
        _truncate(self.path, step)
        self.file = self.path.open("a")
        if self.tensorboard:
            from tensorboardX import SummaryWriter  # takes seconds: it imports torch where torch is installed

            self.board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step + 1)
            self.writer = _SafeWriter(self.board.file_writer.event_writer)

    def rewind(self, step: int, tokens: int):
        """Removes the steps after `step`: a run that was rolled back repeats them."""
        if self.file:
            self._close_files()
            self._open(step)
        self.bar.n, self.last = step, (tokens, time.monotonic())

    def speed(self, result: StepResult) -> dict[str, float]:
        """The throughput between the dispatches of two steps, or since the log was opened, and the share of waiting for data.

        The moments at which steps are reported would not do: before a checkpoint, two steps are reported at once.
        """
        before, self.last = self.last, (result.tokens, result.dispatched)
        seconds = max(result.dispatched - before[1], 1e-9)
        return {"tokens_per_s": (result.tokens - before[0]) / seconds, "data_wait": min(result.waited / seconds, 1.0)}

    def step(self, record: dict, load_lE, dropped_l, to_tensorboard: bool):
        """Writes the record of a step to metrics.jsonl and shows it in the progress bar.

        With `to_tensorboard`, also writes it to TensorBoard, with the expert load and the drop rate of each layer (axis l).
        """
        if not self.file:
            return
        self._write(record)
        remaining = f", {max(0, self.seconds - record['seconds']):.0f} s left" if self.seconds else ""
        self.bar.set_postfix_str(f"loss {record['loss']:.3f}, {record['bits_per_byte']:.3f} bits/byte, "
                                 f"{record['tokens_per_s']:,.0f} tokens/s{remaining}", refresh=False)
        if self.board and to_tensorboard:
            step = record["step"]
            for name in SCALARS:
                self.board.add_scalar(f"train/{name}", record[name], step)
            for layer, (load_E, dropped) in enumerate(zip(load_lE, dropped_l)):
                self.board.add_scalar(f"load_max_over_mean/layer_{layer:02}", load_E.max() * len(load_E), step)
                self.board.add_scalar(f"drop_rate/layer_{layer:02}", dropped, step)
            image_lE = np.clip(load_lE * load_lE.shape[1] / 2, 0, 1)      # a balanced load is mid-grey
            self.board.add_image("expert_load/layers_by_experts", image_lE.repeat(8, 0).repeat(8, 1), step, dataformats="HW")

    def _write(self, record: dict):
        with atomic.add_filename(self.path):
            self.file.write(_line(record))

    def evaluation(self, record: dict):
        """Writes the record of an evaluation to metrics.jsonl and TensorBoard, and prints its numbers."""
        if not self.file:
            return
        self._write(record)
        scalars = {name: record[f"held_out_{name}"] for name in ("bits_per_byte", "loss") if f"held_out_{name}" in record}
        self.bar.write(f"step {record['step']}: " + ", ".join(f"validation/{name} {x:.4f}" for name, x in scalars.items()))
        for name, value in scalars.items() if self.board else ():
            self.board.add_scalar(f"validation/{name}", value, record["step"])

    def message(self, text: str, step: int):
        """Prints a line on stderr and writes it to TensorBoard."""
        if self.file and sys.stderr is not None:
            self.bar.write(text, file=sys.stderr)
        self.text("guard", text, step)

    def text(self, name: str, value: str, step: int):
        """Writes a text to TensorBoard."""
        if self.board:
            self.board.add_text(name, value, step)

    def flush(self):
        """Forces metrics.jsonl to disk; raises the error of a TensorBoard event that could not be written."""
        if self.file:
            with atomic.add_filename(self.path):
                self.file.flush()
                os.fsync(self.file.fileno())
        if self.board:
            self.writer.check()

    def close(self):
        try:
            self.bar.close()
            self._close_files()
        finally:
            self.file = self.board = None

    def _close_files(self):
        with contextlib.ExitStack() as stack:       # closes both files even if closing one of them fails
            if self.board:
                stack.callback(self.board.close)
            if self.file:
                stack.enter_context(atomic.add_filename(self.path))
                stack.callback(self.file.close)
                self.flush()


class _SafeWriter:
    """Catches OSErrors of the thread that writes TensorBoard events. `check` raises the last one in the training loop.

    An uncaught error, such as a full disk, would end that thread. Writing a later event would then wait forever.
    """

    def __init__(self, writer):
        self.error, inner = None, writer._ev_writer
        for name in ("write_event", "flush", "close"):      # replaces the three methods by calls of `_call`
            setattr(inner, name, functools.partial(self._call, name, getattr(inner, name), inner._file_name))

    def _call(self, name, function, path, *args):
        """Calls a method of the writer. After an error, only `close` does anything."""
        try:
            return function(*args) if name == "close" or not self.error else None
        except OSError as error:
            self.error = OSError(error.errno, error.strerror, path)

    def check(self):
        if self.error:
            raise self.error


def read(workdir: Path, *names: str) -> list[dict]:
    """The records of steps in metrics.jsonl that have all fields `names`, with nan for null; [] if there is no file.

    Reading stops at the first damaged line. Raises ConfigError if the file is not a regular file or exceeds MOST_BYTES.
    """
    return [record for record in _read_all(workdir) if EVALUATION not in record and all(name in record for name in names)]


def read_evaluations(workdir: Path) -> list[dict]:
    """The records of evaluations in metrics.jsonl (`evaluation_record`), with nan for null. Reads as `read` does."""
    return [record for record in _read_all(workdir) if EVALUATION in record]


def _read_all(workdir: Path) -> list[dict]:
    path, records = workdir / "metrics.jsonl", []
    for line in texts.json_lines(untrusted.read_bytes(path, MOST_BYTES)) if path.exists() else ():
        try:
            records.append(_parse(line))
        except ValueError:
            break
    return records


def latest(workdir: Path) -> dict | None:
    """The record of the last complete step in metrics.jsonl; None without one. Reads only the last 1 MiB of the file."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return None
    with untrusted.open_file(path, sys.maxsize) as file:
        file.seek(max(0, path.stat().st_size - 2**20))
        complete = file.read(2**20).rpartition(b"\n")[0]
    for line in reversed(list(texts.json_lines(complete))):
        try:
            record = _parse(line)
        except ValueError:
            return None
        if EVALUATION not in record:
            return record
    return None


def _parse(line: texts.JsonLine) -> dict:
    """The record of one line. Raises ValueError unless it has a step, and every value is a number or a list of numbers."""
    record = line.value
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise ValueError("the line has no step")
    return {name: _number(value) if name in NUMERIC_FIELDS else _map(value, _number) for name, value in record.items()}


def _number(x) -> int | float:
    if x is None:
        return math.nan
    if type(x) is float or (type(x) is int and abs(x) < 2**63):
        return x
    raise ValueError("not a number")


def _line(record: dict) -> str:
    """A record as one line of JSON. JSON has no nan and no infinity, so they become null."""
    return json_text.dumps({k: _map(v, lambda x: x if math.isfinite(x) else None) for k, v in record.items()}) + "\n"


def _map(value, function):
    return [function(x) for x in value] if isinstance(value, list) else function(value)


def _truncate(path: Path, step: int):
    """Removes the lines of steps after `step`, the first damaged line and all lines after it. Other lines stay unchanged."""
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(untrusted.open_file(path, sys.maxsize)) if path.exists() else b""
        file = stack.enter_context(atomic.replacing(path, "wb"))
        for line in texts.json_lines(lines):
            try:
                keep = line.value["step"] <= step
            except (KeyError, TypeError):       # TypeError: the line is not JSON, or not an object
                break
            if keep:
                file.write(line.raw.removesuffix(b"\n") + b"\n")
