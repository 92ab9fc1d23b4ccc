"""What a run tells: metrics.jsonl (one object a step), TensorBoard, the progress bar."""
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter
from tqdm.auto import tqdm

from mmx import atomic, config

SCALARS = ("loss", "bits_per_byte", "grad_norm", "lr", "tokens_per_s", "flops_per_s", "aux_loss", "z_loss", "drop_rate",
           "overflow_rate")


class Log:
    """Writes the metrics of a run in WORKDIR; lines past `step`, which a restored run makes again, are cut.

    That of a process which does not `write` tells the time alone.
    """

    def __init__(self, workdir: Path, t: config.Train, step: int, tokens: int, write: bool = True):
        path = workdir / "metrics.jsonl"
        if write:
            _cut(path, step)
        self.file, self.seconds = path.open("a") if write else None, t.seconds
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1) if t.tensorboard and write else None
        self.bar = tqdm(total=None if t.seconds else t.steps, initial=step, unit="step", desc="train", disable=not write,
                        mininterval=0.5 if sys.stderr.isatty() else 30)
        self.last = tokens, time.monotonic()

    def tokens_per_s(self, tokens: int) -> float:
        """Since the last call, or since the log was opened."""
        before, self.last = self.last, (tokens, time.monotonic())
        return (tokens - before[0]) / (self.last[1] - before[1])

    def step(self, record: dict, load_LE, dropped_L, board: bool):
        """One step's figures; `board` says whether TensorBoard gets them too."""
        if not self.file:
            return
        self.file.write(json.dumps(record) + "\n")
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

    def text(self, name: str, value: str, step: int):
        if self.board:
            self.board.add_text(name, value, step)

    def flush(self):
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self):
        self.flush()
        if self.file:
            self.file.close()
        self.bar.close()
        if self.board:
            self.board.close()


def read(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl (none without one); what follows a damaged one is left out."""
    path, records = workdir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            records.append(record | {"step": int(record["step"])})
        except (KeyError, TypeError, ValueError):
            break
    return records


def latest(workdir: Path) -> dict | None:
    """The last whole line of metrics.jsonl, whatever its length; None without one."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError):
        return None


def _cut(path: Path, step: int):
    kept = [json.dumps(r) + "\n" for r in read(path.parent) if r["step"] <= step]
    with atomic.replacing(path) as file:
        file.writelines(kept)
