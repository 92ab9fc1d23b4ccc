"""The row of a run, row.json and runs.jsonl, and the table of results."""
import contextlib
import datetime
import math
import shutil
import sys
from pathlib import Path

import numpy as np
from rich.table import Column, Table

import mmx
from mmx.analysis.counts import count_params, flops_companion
from mmx.config import ConfigError
from mmx.files import atomic, json_text, texts, untrusted
from mmx.launch.sweep.grid import Cell
from mmx.training import metrics

PARTS = 20      # equal parts of a run; a row has one value of each COURSE metric for each part
COURSE = ("tokens", "loss", "grad_norm", "micro_norm", "drop_rate")     # metrics of metrics.jsonl
MAX_BYTES = 1 << 30     # of runs.jsonl


def make(cell: Cell, folder: Path, measured: dict) -> dict:
    """Returns the row of a run that ended in `folder`: the cell's keys, counts, what was `measured`, and training metrics.

    "train_loss" and "layer_norms" are means over the last twentieth of the steps. "course" divides the run into PARTS equal
    parts and has the mean of each part (for norms, the root mean square).
    """
    import jax

    e, m = cell.experiment, cell.experiment.model
    records = metrics.read(folder, "loss")
    end = records[-max(1, len(records) // 20):]
    parts = [part.tolist() for part in np.array_split(np.array(records, object), max(1, min(PARTS, len(records))))]
    last = end[-1] if end else {}       # empty: the run diverged at the first step
    course = {name: [_mean([record.get(name, math.nan) for record in part], 2 if name.endswith("_norm") else 1)
                     for part in parts] for name in COURSE if name in last}     # steps of one micro-batch have no micro_norm
    params, companion = count_params(m), flops_companion(m, e.train.length)
    return cell.keys | {
        "name": cell.name, "hash": cell.hash,
        "params": params.active, "params_total": params.total, "params_active_all": params.active_all,
        "tokens": cell.tokens, "steps": e.train.steps,
        "flops": cell.flops, "flops_companion": companion and cell.tokens * companion,
        "seconds": last.get("seconds", 0.0), **measured,
        "train_loss": _mean([record["loss"] for record in end]), "course": course, "skipped": last.get("skipped", 0),
        "layer_norms": [_mean(norms) for norms in zip(*[record["layer_norms"] for record in end if "layer_norms" in record])],
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"mmx": mmx.__version__, "jax": jax.__version__, "python": sys.version.split()[0]},
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


def _mean(values, power: int = 1) -> float | None:
    """Returns the mean of the finite values, for power 2 the root mean square; None if there are none."""
    finite = [value ** power for value in values if math.isfinite(value)]
    return float(np.mean(finite)) ** (1 / power) if finite else None


def save(folder: Path, row: dict) -> None:
    _write(folder / "row.json", json_text.dumps(row) + "\n")


def exists(folder: Path) -> bool:
    """Whether the run in `folder` has its row."""
    return (folder / "row.json").exists()


def collect(out: Path) -> dict[str, dict]:
    """Returns the rows of all runs in `out` by hash, and writes to runs.jsonl those that it lacks."""
    path, rows = out / "runs.jsonl", {}
    raw = untrusted.read_bytes(path, MAX_BYTES) if path.exists() else b""
    found = [(f"{path}:{line.number}", line.value) for line in texts.json_lines(raw)
             if not line.problem]       # a truncated line: row.json has the same row
    for file in sorted(out.glob("runs/*/row.json")):
        text = untrusted.read_bytes(file)
        with contextlib.suppress(ValueError):
            found.append((file, untrusted.loads(text)))
    for place, row in found:
        if not (isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("name", "hash"))):
            raise ConfigError(f"{place} is not a row of a sweep, it has no name and hash: use another --out")
        rows[row["hash"]] = row
    lines = "".join(json_text.dumps(row) + "\n" for row in rows.values())
    if lines.encode() != raw:
        _write(path, lines)
    return rows


def _write(path: Path, text: str) -> None:
    with atomic.replacing(path) as file:
        file.write(text)


def write_hparams(cell: Cell, folder: Path, row: dict) -> None:
    """Writes hyperparameters and results for TensorBoard's HParams page, replacing earlier ones of the run."""
    from tensorboardX import SummaryWriter

    shutil.rmtree(folder / "tensorboard" / "hparams", ignore_errors=True)
    keys = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in cell.keys.items()}
    with SummaryWriter(str(folder / "tensorboard")) as board:
        board.add_hparams(keys | {"params": row["params"], "flops": row["flops"]}, {
            f"final/{name}": row[name] for name in ("loss", "bits_per_byte", "train_loss", "seconds") if row[name] is not None},
            name="hparams")


def results_table(rows: list[dict], title: str) -> Table:
    """Returns a table with one line for each row."""
    names = ("parameters", "tokens", "FLOPs", "training loss", "loss", "bits/byte", "s")
    table = Table(Column("run", overflow="fold"), *names, title=title,
                  caption="losses in nats per token; loss: on held-out text or ids; bits/byte: on held-out text; "
                          "empty: diverged, or not measured")
    for row in rows:
        losses = ["" if loss is None else f"{loss:.4f}" for loss in (row["train_loss"], row["loss"], row["bits_per_byte"])]
        table.add_row(row["name"], f"{row['params']:,}", f"{row['tokens']:,}", f"{row['flops']:.3g}", *losses,
                      f"{row['seconds']:,.0f}")
    return table
