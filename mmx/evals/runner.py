"""Runs a suite: every example's line is on disk before the next begins, so that a run that was killed goes on.

OUT/SUITE.jsonl has what the run is in its first line and then an example a line; OUT/SUITE.json the table,
OUT/SUITE.png its picture. The model is two functions (`Reader`): whatever answers can be measured.
"""
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table
from tqdm.auto import tqdm

from mmx.checkpoints import manager
from mmx.config import ConfigError, nearest
from mmx.data import tokens
from mmx.evals import files
from mmx.evals.examples import Ask, document, show_length, size
from mmx.evals.suites import SUITES, Suite
from mmx.files import atomic, untrusted
from mmx.inference import engine, forward

SCALE = {"accuracy": 100, "chrF": 1, "perplexity": 1}       # to what tables and pictures show


class Reader(NamedTuple):
    write: Callable     # (prompt, steps, stop, *images) -> its continuation
    read: Callable      # (ids_T, next_T) -> (nats_T of the next ids, best_T: the likeliest ones)


def reader(loaded) -> Reader:
    """A checkpoint that `mmx.load` gave, greedy."""
    def write(prompt, steps, stop, *images):
        return engine.generate(loaded, [prompt], steps=steps, stop=stop, images=[images] if images else ())[0]

    def read(ids_T, next_T):
        return forward.score(loaded, ids_T, np.maximum(next_T, 0))

    return Reader(write, read)


def find(name: str) -> Suite:
    if name not in SUITES:
        raise ConfigError(f"there is no suite {name!r}{nearest(name, SUITES)}")
    return SUITES[name]


def evaluate_checkpoint(path, name: str, out: Path, weights_dtype: str | None = None, **ask) -> dict:
    """A suite on a checkpoint, as `mmx eval --suite` runs it; `ask` has the fields of `Ask` but for the checkpoint's."""
    find(name)
    from mmx.checkpoints import convert  # here, for train imports this package

    loaded = convert.load(path, weights_dtype=weights_dtype)
    tokenizer = tokens.of_checkpoint(loaded.tokenizer, loaded.config.vocab)
    _, step = manager.find_step(path) or (None, None)
    about = {"checkpoint": str(Path(path).resolve()), "step": step and int(step.name), "tokenizer": loaded.tokenizer,
             "weights_dtype": weights_dtype}
    return run(name, Ask(tokenizer, vision=loaded.config.vision, **ask), reader(loaded), out, about, progress=True)


def write(name: str, path: Path, tokenizer: str = "bytes", **ask) -> int:
    """Writes a suite's examples as documents to train on, and returns how many; `ask` has the other fields of `Ask`.

    A file that is there is replaced once the new one is whole.
    """
    suite = find(name)
    if not suite.learned:
        raise ConfigError(f"{name} is to be evaluated on, not to be trained on: give another --suite")
    tasks = list(suite.plan(Ask(tokens.tokenizer(tokenizer), train=True, **ask)))
    with atomic.replacing(path) as file:
        for task in tqdm(tasks, name, unit="example", disable=None):
            file.write(json.dumps(document(task.make()), ensure_ascii=False) + "\n")
    return len(tasks)


def run(name: str, ask: Ask, model: Reader, out: Path, about: dict, progress: bool = False) -> dict:
    """Runs what is left of a suite in OUT and returns its table, as OUT/SUITE.json has it.

    `about` says what is measured: with the seed, the context and the files of `ask` it must be what OUT holds a run of.
    """
    suite, path = find(name), out / f"{name}.jsonl"
    if ask.data and not suite.data:
        raise ConfigError(f"{name} makes its own text: leave --data out")
    too_long = [length for length in ask.lengths if ask.context and length > ask.context]
    if too_long:
        raise ConfigError(f"prompts of {too_long[0]:,} tokens are longer than --context {ask.context:,}")
    tasks = list(suite.plan(ask))
    if not tasks:
        raise ConfigError(f"{name}: nothing of --data {ask.data} is in the --rows and --lengths asked for")
    shortest = {task.row: task for task in sorted(tasks, key=lambda t: -int(t.column) if t.column.isdecimal() else 0)}
    for task in shortest.values():      # what is too short, or wrong with a file, is told before anything runs
        task.make()
    about = {"suite": name, **about, "seed": ask.seed, "context": ask.context,
             "data": ask.data and str(Path(ask.data).resolve())}
    out.mkdir(parents=True, exist_ok=True)
    done = _resume(path, about)
    left = [task for task in tasks if task[:3] not in done]
    with tqdm(total=len(tasks), initial=len(tasks) - len(left), desc=name, unit="example", disable=not progress,
              mininterval=0.5 if sys.stderr.isatty() else 30) as bar:
        for task in left:
            record = _answered(suite, task, ask, model)
            _append(path, record)
            done[task[:3]] = record
            figure = suite.cell(_flat([done[t[:3]] for t in tasks if t[:3] in done], "all"))
            bar.set_postfix_str(f"{suite.unit} {SCALE[suite.unit] * figure:.1f}, {show_length(task.column)} {task.row}, "
                                f"{record['tokens'] / max(record['seconds'], 1e-9):,.0f} tokens/s", refresh=False)
            bar.update()
    result = _table(suite, about, [done[task[:3]] for task in tasks])
    (out / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def _answered(suite: Suite, task, ask: Ask, model: Reader) -> dict:
    """The line of an example."""
    example = task.make()
    length = size(example, ask)
    if ask.context and length > ask.context:
        raise ConfigError(f"{task.column} {task.row}, example {task.index}: a prompt of {length:,} tokens is longer than "
                          f"--context {ask.context:,}")
    begin = time.monotonic()
    if isinstance(example.prompt, str):
        output = model.write(example.prompt, example.steps, example.stop, *example.images)
        said = {"output": output, "answers": list(example.answers)}
    else:
        output, said = model.read(example.prompt, example.answers), {}
    return {"row": task.row, "column": task.column, "index": task.index, "score": suite.score(output, example),
            "tokens": length, "seconds": round(time.monotonic() - begin, 3), **example.meta, **said}


def _resume(path: Path, about: dict) -> dict[tuple, dict]:
    """The examples that a file has by place; it begins with `about` from now on, and a line that was cut off is gone."""
    lines, kept = [], 0
    raw = untrusted.read_bytes(path, files.MOST_BYTES) if path.exists() else b""
    if raw and not raw.startswith(b'{"suite"'):
        raise ConfigError(f"{path} is no file of a suite: move it, or give another --out")
    for line in raw.splitlines(keepends=True):
        try:
            lines.append(untrusted.loads(line))
        except ValueError:
            break
        if not line.endswith(b"\n"):
            lines.pop()
            break
        kept += len(line)
    for number, record in enumerate(lines, 1):
        place = [record.get(key) for key in ("row", "column", "index")] if isinstance(record, dict) else ()
        if not (place and (number == 1 or list(map(type, place)) == [str, str, int])):
            raise ConfigError(f"{path}:{number} is no example of a suite: move the file, or give another --out")
    if kept < len(raw):
        with path.open("r+b") as file:
            file.truncate(kept)
    if not lines:
        _append(path, about)
        return {}
    differ = [f"{k} (there {lines[0].get(k)!r}, now {v!r})" for k, v in about.items() if lines[0].get(k) != v]
    if differ:
        raise ConfigError(f"{path} is of another run: {', '.join(differ)}; give the same, or another --out")
    return {(r["row"], r["column"], r["index"]): r for r in lines[1:]}


def _append(path: Path, record: dict):
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:        # a full disk is told without its file
        raise OSError(error.errno, error.strerror, str(path)) from None


def _flat(records: list[dict], row: str | None = None) -> list[dict]:
    """One record a score: an example that scores several rows is one in each; of these only `row`, if given."""
    flat = []
    for record in records:
        scores = record["score"] if isinstance(record["score"], dict) else {record["row"]: record["score"]}
        if row in scores:
            scores = {row: scores[row]}
        flat += [record | {"row": name, "score": score} for name, score in scores.items()]
    return flat


def _table(suite: Suite, about: dict, records: list[dict]) -> dict:
    cells = defaultdict(lambda: defaultdict(list))
    for record in _flat(records):
        cells[record["row"]][record["column"]].append(record)
    scores = {row: {column: suite.cell(found) for column, found in columns.items()} for row, columns in cells.items()}
    columns = list(dict.fromkeys(record["column"] for record in records))
    scored = columns
    if suite.chance:
        chance = suite.chance()
        scores = {row: scores[row] | {"chance": chance[row]} for row in scores}
        scored, columns = columns[:1], [*columns, "chance"]
    by_column = {c: float(np.mean([row[c] for row in scores.values() if c in row])) for c in columns}
    if "all" in scores:
        by_column = scores.pop("all")
    return about | {
        "unit": suite.unit, "score": float(np.mean([by_column[c] for c in scored])), "by_column": by_column, "scores": scores,
        "examples": len(records), "seen": [c for c in columns if any(r.get("seen") for r in records if r["column"] == c)],
        "cut": sum(bool(r.get("cut")) for r in records), "tokens": sum(r["tokens"] for r in records),
        "seconds": round(sum(r["seconds"] for r in records), 3)}


def show(result: dict) -> Table:
    """The table for the screen."""
    suite, columns = SUITES[result["suite"]], list(result["by_column"])
    scale = SCALE[suite.unit]
    notes = ["* holds text of the embedded corpus' training part"] * bool(result["seen"])
    notes += [f"{result['cut']} prompts lost their middle to --context"] * bool(result["cut"])
    heads = (show_length(c) + "*" * (c in result["seen"]) for c in columns)
    title = f"{suite.title}, {suite.unit}{' %' * (scale == 100)}, {result['examples']} examples"
    table = Table(suite.rows, *heads, title=title, caption="; ".join(notes) or None, min_width=len(title))
    for row, cells in result["scores"].items():
        table.add_row(row, *(f"{scale * cells[c]:.1f}" if c in cells else "" for c in columns))
    table.add_section()
    table.add_row("all", *(f"{scale * result['by_column'][c]:.1f}" for c in columns))
    return table


def plot(result: dict, path: Path) -> Path:
    """The table as a heat map, perplexity as lines over the position, or as the suite has it."""
    if SUITES[result["suite"]].picture:
        return SUITES[result["suite"]].picture(result, path)
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    suite, columns = SUITES[result["suite"]], list(result["by_column"])
    rows, scale = list(result["scores"]), SCALE[suite.unit]
    if suite.unit == "perplexity":
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        ends = [int(row.split("-")[1]) + 1 for row in rows]
        for column in columns:
            line = [result["scores"][row].get(column, np.nan) for row in rows]
            axes.plot(ends, line, "o-", label=f"{show_length(column)} tokens")
        axes.set(xscale="log", xlabel="position, up to", ylabel="perplexity a token", title=suite.title)
        axes.set_xticks(ends, [show_length(str(end)) for end in ends])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    else:
        grid = np.array([[result["scores"][row].get(c, np.nan) for c in columns] for row in rows]) * scale
        size = (2.5 + 0.9 * len(columns), 1.6 + 0.4 * len(rows))
        figure, axes = pyplot.subplots(figsize=(max(size[0], 5), max(size[1], 3)), layout="constrained")
        image = axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        for y, x in np.argwhere(np.isfinite(grid)):
            axes.text(x, y, f"{grid[y, x]:.0f}", ha="center", va="center")
        axes.set_xticks(range(len(columns)), [show_length(c) + "*" * (c in result["seen"]) for c in columns])
        axes.set_yticks(range(len(rows)), rows)
        axes.set(xlabel="tokens" if columns[0].isdecimal() else "", ylabel=suite.rows,
                 title=f"{suite.title}: {scale * result['score']:.1f}{' %' * (scale == 100)}")
        figure.colorbar(image, label=suite.unit + " %" * (scale == 100))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
