"""Reads the runs that scaling laws are fitted to, from a CSV or JSON lines file."""
import csv
import io
import math
from typing import NamedTuple

import numpy as np

from mmx.config import ConfigError, nearest
from mmx.files import texts

COLUMNS = ("params", "tokens", "flops", "loss")     # what a law may need of a run, by mmx's names
NEEDED = {"power": ("flops",), "envelope": ("flops",), "chinchilla": ("params", "tokens"), "moe": ("params", "tokens"),
          "isoflop": ("params", "tokens", "flops")}     # of each law, besides the loss
MAX_BYTES = 16 << 20            # of a file of runs
FALSE = {"", "0", "0.0", "false", "f", "no", "n", "none", "null", "nan", "na", "n/a", "-"}      # of a truth value in a CSV file


class Runs(NamedTuple):
    """Runs that are fitted together, one array for each of COLUMNS; None for a column that the file does not have."""
    label: str
    params: np.ndarray | None
    tokens: np.ndarray | None
    flops: np.ndarray | None
    loss: np.ndarray


def read_runs(path: str, law: str, columns: dict[str, str | None], by: list[str]) -> tuple[list[Runs], list[str]]:
    """Reads a file of runs and groups them. Leaves out runs that `mmx sweep` marks as diverged.

    Args:
      path: CSV with a header, or one JSON object a line.
      law: the law to fit, a key of NEEDED.
      columns: the file's name for each of COLUMNS; None: the same name, if the file has such a column.
      by: names of the columns to group by; empty: arch, and for the law "moe" experts too, if the file has them.
    Returns:
      One Runs for each combination of values in the `by` columns, and notes on columns that were computed from others.
    Raises:
      ConfigError: the file cannot be read, lacks a column, or has a value that is not a positive number.
    """
    all_rows = _read_rows(path)
    rows = [(line, row) for line, row in all_rows if not _is_true(row.get("diverged"))]
    if not rows:
        raise ConfigError(f"every run in {path} diverged: a fit needs runs that finished")
    known = list(dict.fromkeys(name for _, row in rows for name in row))
    for flag, column in [*((f"--{name}", columns[name]) for name in COLUMNS), *(("--by", name) for name in by)]:
        if column is not None and column not in known:
            raise ConfigError(f"{path} has no column {column!r} ({flag}){_suggestion(column, known)}")
    names = {name: columns[name] or (name if name in known else None) for name in COLUMNS}
    if not by:
        by = [name for name in ("arch", "experts")[:1 + (law == "moe")] if name in known]
    notes = _check_columns(path, law, {name for name, column in names.items() if column}, known)
    if len(rows) < len(all_rows):
        notes.append(f"diverged runs left out: {len(all_rows) - len(rows)}")
    values = {name: np.array([_positive(path, line, row, column) for line, row in rows])
              for name, column in names.items() if column}
    if "tokens" not in values and {"params", "flops"} <= values.keys():
        values["tokens"] = values["flops"] / (6 * values["params"])
    if "flops" not in values:
        values["flops"] = 6 * values["params"] * values["tokens"]
    labels = [", ".join(f"{name} {row.get(name)}" for name in by) for _, row in rows]
    return [Runs(label, *(values[name][[own == label for own in labels]] if name in values else None for name in COLUMNS))
            for label in dict.fromkeys(labels)], notes


def _check_columns(path, law, have, known) -> list[str]:
    """Notes on the columns that are computed from others. Raises ConfigError if the law needs a column that cannot be."""
    needs = {*NEEDED[law], "loss"}
    notes = []
    if "flops" in needs - have and {"params", "tokens"} <= have:
        notes.append(f"{path} has no column of FLOPs: computed as 6 * params * tokens")
        have = have | {"flops"}
    if "tokens" in needs - have and {"params", "flops"} <= have:
        notes.append(f"{path} has no column of tokens: computed as FLOPs / (6 * params)")
        have = have | {"tokens"}
    missing = [name for name in COLUMNS if name in needs - have]
    if missing:
        raise ConfigError(f"--law {law} needs {', '.join(name for name in COLUMNS if name in needs)}, and {path} has no column "
                          f"{missing[0]!r}: name it by --{missing[0]} COL{_suggestion(missing[0], known)}")
    return notes


def _suggestion(column, known) -> str:
    """The known column names, and the nearest one if any is near, to end an error message with."""
    hint = nearest(column, known)
    return hint if hint.startswith("; known") else f"{hint} known: {', '.join(known)}"


def _read_rows(path: str) -> list[tuple[int, dict]]:
    """(line number, {column: value}) of each row. Raises ConfigError if the file is neither CSV nor JSON lines."""
    try:
        raw = texts.read_bytes(path, MAX_BYTES)
        if raw.lstrip().startswith(b"{"):
            return [(line.number, _object(path, line)) for line in texts.json_lines(raw)]
        text = raw.decode()
        reader = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=text.partition("\n")[0].count),
                                skipinitialspace=True, strict=True)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        rows = [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is neither CSV nor JSON lines: not UTF-8 at byte {error.start}") from None
    except csv.Error as error:
        raise ConfigError(f"{path} is neither CSV nor JSON lines: {error}") from None
    for line, row in rows:
        if None in row or None in row.values():
            raise ConfigError(f"{path}:{line}: {'more' if None in row else 'fewer'} values than the header's "
                              f"{len(reader.fieldnames)} columns")
    if not rows:
        raise ConfigError(f"{path} has no rows: give a CSV header and one line for each run, or one JSON object a line")
    return rows


def _object(path, line: texts.JsonLine) -> dict:
    if not isinstance(line.value, dict):
        raise ConfigError(f"{path}:{line.number}: not a JSON object{line.problem and f': {line.problem}'}")
    return line.value


def _is_true(value) -> bool:
    """Whether a value is true. In a CSV file each value is a text, and a text such as "False" would count as true."""
    return str(value or "").strip().lower() not in FALSE


def _positive(path, line, row, column) -> float:
    """The number in a row's column. Raises ConfigError unless it is finite and positive."""
    try:
        value = math.nan if isinstance(row.get(column), bool) else float(row.get(column))
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{path}:{line}: {column} is {row.get(column)!r:.200}, and must be a positive number")
    return value
