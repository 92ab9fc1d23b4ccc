"""Runs a suite. Every example is written to disk before the next one starts, so a killed run can resume.

OUT/SUITE.jsonl has a header line that identifies the run, then one line for each example; OUT/SUITE.json contains the table and
OUT/SUITE.png its figure. The model is a pair of functions (`ModelInterface`), so anything that answers can be evaluated.

Flags in the files: "seen" marks examples, and columns, whose text includes training text of the embedded corpus; "cut" marks
prompts whose middle was removed to fit --context.
"""
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table

from mmx.checkpoints import convert, manager
from mmx.config import ConfigError, nearest
from mmx.data import tokens
from mmx.evals import user_files
from mmx.evals.examples import SuiteOptions, format_length, prompt_length, training_record
from mmx.evals.suites import SUITES, Suite
from mmx.files import atomic, json_text, output, texts, untrusted
from mmx.inference import engine, forward

SCALE = {"accuracy": 100, "chrF": 1, "perplexity": 1}       # factor in tables and figures


class ModelInterface(NamedTuple):
    generate: Callable  # (prompt, steps, stop, *images) -> the continuation
    score: Callable     # (ids_T, next_T) -> (nats_T of the next ids, best_T: the likeliest next ids)


def model_interface(loaded) -> ModelInterface:
    """Greedy decoding and scoring with a checkpoint that `mmx.load` returned."""
    def generate(prompt, steps, stop, *images):
        return engine.generate(loaded, [prompt], steps=steps, stop=stop, images=[images] if images else ())[0]

    def score(ids_T, next_T):
        return forward.score(loaded, ids_T, np.maximum(next_T, 0))

    return ModelInterface(generate, score)


def find_suite(name: str) -> Suite:
    if name not in SUITES:
        raise ConfigError(f"there is no suite {name!r}{nearest(name, SUITES)}")
    return SUITES[name]


def evaluate_checkpoint(path, name: str, out: Path, weights_dtype: str | None = None, **options) -> dict:
    """Runs a suite on a checkpoint, as `mmx eval --suite` does.

    Args:
      options: the fields of `SuiteOptions` except tokenizer and vision.
    """
    find_suite(name)
    loaded = convert.load(path, weights_dtype=weights_dtype)
    tokenizer = tokens.of_checkpoint(loaded.tokenizer, loaded.config.vocab)
    _, step = manager.find_step(path) or (None, None)
    header = {"checkpoint": str(Path(path).resolve()), "step": step and int(step.name), "tokenizer": loaded.tokenizer,
              "weights_dtype": weights_dtype}
    options = SuiteOptions(tokenizer, vision=loaded.config.vision, **options)
    return run(name, options, model_interface(loaded), out, header, progress=True)


def write_examples(name: str, path: Path, tokenizer: str = "bytes", **options) -> int:
    """Writes a suite's examples as training documents and returns their number.

    An existing file is replaced only when the new one is complete.

    Args:
      options: the other fields of `SuiteOptions`.
    """
    suite = find_suite(name)
    if not suite.trainable:
        raise ConfigError(f"{name} is for evaluation only and has no training examples: give another --suite")
    planned = list(suite.plan(SuiteOptions(tokens.tokenizer(tokenizer), train=True, **options)))
    with atomic.replacing(path) as file:
        for one in output.bar(planned, name, unit="example", disable=None):
            file.write(json_text.dumps(training_record(one.make()), ensure_ascii=False) + "\n")
    return len(planned)


def run(name: str, options: SuiteOptions, model: ModelInterface, out: Path, header: dict, progress: bool = False) -> dict:
    """Runs the remaining examples of a suite in OUT and returns the content of OUT/SUITE.json.

    Args:
      header: identifies what is evaluated. Together with the seed, the context and the data of `options` it must be equal to
        the header of an earlier run in OUT.
    """
    suite, path = find_suite(name), out / f"{name}.jsonl"
    planned = _plan(suite, name, options)
    header = {"suite": name, **header, "seed": options.seed, "context": options.context,
              "data": options.data and str(Path(options.data).resolve())}
    out.mkdir(parents=True, exist_ok=True)
    done = _resume(path, header)        # records by (row, column, index)
    remaining = [one for one in planned if one[:3] not in done]
    with output.bar(total=len(planned), initial=len(planned) - len(remaining), desc=name, unit="example",
                    disable=not progress) as bar:
        for one in remaining:
            record = _evaluate(suite, one, options, model)
            _append(path, record)
            done[one[:3]] = record
            mean = suite.aggregate(_split_scores([done[p[:3]] for p in planned if p[:3] in done], "all"))
            bar.set_postfix_str(f"{suite.unit} {SCALE[suite.unit] * mean:.1f}, {format_length(one.column)} {one.row}, "
                                f"{record['tokens'] / max(record['seconds'], 1e-9):,.0f} tokens/s", refresh=False)
            bar.update()
    result = _summarize(suite, header, [done[one[:3]] for one in planned])
    text = json_text.dumps(result, indent=1, ensure_ascii=False)
    with atomic.replacing(out / f"{name}.json") as file:
        file.write(text + "\n")
    return result


def _plan(suite: Suite, name: str, options: SuiteOptions) -> list:
    """The planned examples of a run. Raises ConfigError for options that do not fit the suite."""
    if options.data and not suite.data:
        raise ConfigError(f"{name} generates its own text: leave --data out")
    too_long = [length for length in options.lengths if options.context and length > options.context]
    if too_long:
        raise ConfigError(f"prompts of {too_long[0]:,} tokens are longer than --context {options.context:,}")
    planned = list(suite.plan(options))
    if not planned:
        raise ConfigError(f"{name}: --data {options.data} has no examples for the given --rows and --lengths")
    # make the shortest example of each row: lengths that are too short, and errors in files, are reported before anything runs
    shortest = {one.row: one for one in sorted(planned, key=lambda one: -int(one.column) if one.column.isdecimal() else 0)}
    for one in shortest.values():
        one.make()
    return planned


def _evaluate(suite: Suite, planned, options: SuiteOptions, model: ModelInterface) -> dict:
    """Makes an example, lets the model answer it, and returns its line."""
    example = planned.make()
    length = prompt_length(example, options)
    if options.context and length > options.context:
        raise ConfigError(f"{planned.column} {planned.row}, example {planned.index}: a prompt of {length:,} tokens is longer "
                          f"than --context {options.context:,}")
    begin = time.monotonic()
    if isinstance(example.prompt, str):
        output = model.generate(example.prompt, example.steps, example.stop, *example.images)
        texts = {"output": output, "answers": list(example.answers)}
    else:
        output, texts = model.score(example.prompt, example.answers), {}
    return {"row": planned.row, "column": planned.column, "index": planned.index, "score": suite.score(output, example),
            "tokens": length, "seconds": round(time.monotonic() - begin, 3), **example.meta, **texts}


def _resume(path: Path, header: dict) -> dict[tuple, dict]:
    """Reads the finished examples of a file, by (row, column, index).

    Writes `header` if the file is new, and removes an incomplete last line. Raises ConfigError if the file is of another run.
    """
    lines, complete_bytes = [], 0
    raw = untrusted.read_bytes(path, user_files.MAX_BYTES) if path.exists() else b""
    if raw and not raw.startswith(b'{"suite"'):
        raise ConfigError(f"{path} does not contain examples of a suite: move it, or give another --out")
    for line in texts.json_lines(raw):
        if line.problem or not line.raw.endswith(b"\n"):
            break
        lines.append(line.value)
        complete_bytes = line.end
    for number, record in enumerate(lines, 1):
        cell = [record.get(key) for key in ("row", "column", "index")] if isinstance(record, dict) else ()
        if not (cell and (number == 1 or list(map(type, cell)) == [str, str, int])):
            raise ConfigError(f"{path}:{number} is not an example of a suite: move the file, or give another --out")
    if complete_bytes < len(raw):
        with path.open("r+b") as file:
            file.truncate(complete_bytes)
    if not lines:
        _append(path, header)
        return {}
    differ = [f"{k} (was {lines[0].get(k)!r}, now {v!r})" for k, v in header.items() if lines[0].get(k) != v]
    if differ:
        raise ConfigError(f"{path} is from another run: {', '.join(differ)}; use the same settings, or another --out")
    return {(r["row"], r["column"], r["index"]): r for r in lines[1:]}


def _append(path: Path, record: dict):
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json_text.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:        # when a disk is full, the error does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from None


def _split_scores(records: list[dict], row: str | None = None) -> list[dict]:
    """Records with a single score each: an example with scores for several rows becomes one record for each of them.

    Args:
      row: keep only this row of such an example, if it has it.
    """
    single = []
    for record in records:
        scores = record["score"] if isinstance(record["score"], dict) else {record["row"]: record["score"]}
        if row in scores:
            scores = {row: scores[row]}
        single += [record | {"row": name, "score": score} for name, score in scores.items()]
    return single


def _summarize(suite: Suite, header: dict, records: list[dict]) -> dict:
    cells = defaultdict(lambda: defaultdict(list))
    for record in _split_scores(records):
        cells[record["row"]][record["column"]].append(record)
    scores = {row: {column: suite.aggregate(cell) for column, cell in columns.items()} for row, columns in cells.items()}
    columns = list(dict.fromkeys(record["column"] for record in records))
    scored = columns
    if suite.chance:
        chance = suite.chance()
        scores = {row: scores[row] | {"chance": chance[row]} for row in scores}
        scored, columns = columns[:1], [*columns, "chance"]
    by_column = {c: float(np.mean([row[c] for row in scores.values() if c in row])) for c in columns}
    if "all" in scores:
        by_column = scores.pop("all")
    return header | {
        "unit": suite.unit, "score": float(np.mean([by_column[c] for c in scored])), "by_column": by_column, "scores": scores,
        "examples": len(records), "seen": [c for c in columns if any(r.get("seen") for r in records if r["column"] == c)],
        "cut": sum(bool(r.get("cut")) for r in records), "tokens": sum(r["tokens"] for r in records),
        "seconds": round(sum(r["seconds"] for r in records), 3)}


def make_table(result: dict) -> Table:
    """The result as a table for the terminal."""
    suite, columns = SUITES[result["suite"]], list(result["by_column"])
    scale = SCALE[suite.unit]
    notes = ["* contains text of the embedded corpus' training split"] * bool(result["seen"])
    notes += [f"{result['cut']} prompts were shortened to --context by removing their middle"] * bool(result["cut"])
    headings = (format_length(c) + "*" * (c in result["seen"]) for c in columns)
    title = f"{suite.title}, {suite.unit}{' (%)' * (scale == 100)}, {result['examples']} examples"
    table = Table(suite.rows, *headings, title=title, caption="; ".join(notes) or None, min_width=len(title))
    for row, cells in result["scores"].items():
        table.add_row(row, *(f"{scale * cells[c]:.1f}" if c in cells else "" for c in columns))
    table.add_section()
    table.add_row("all", *(f"{scale * result['by_column'][c]:.1f}" for c in columns))
    return table


def plot(result: dict, path: Path) -> Path:
    """Plots the result: perplexity as lines by position, other units as a heat map, or as the suite's own `plot` does."""
    if SUITES[result["suite"]].plot:
        return SUITES[result["suite"]].plot(result, path)
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
            axes.plot(ends, line, "o-", label=f"text of {format_length(column)} tokens")
        axes.set(xscale="log", xlabel="end of the range of positions (tokens)", ylabel="perplexity per token",
                 title=suite.title)
        axes.set_xticks(ends, [format_length(str(end)) for end in ends])
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
        axes.set_xticks(range(len(columns)), [format_length(c) + "*" * (c in result["seen"]) for c in columns])
        axes.set_yticks(range(len(rows)), rows)
        axes.set(xlabel="prompt length (tokens)" if columns[0].isdecimal() else "", ylabel=suite.rows,
                 title=f"{suite.title}: {scale * result['score']:.1f}{' %' * (scale == 100)}")
        figure.colorbar(image, label=suite.unit + " (%)" * (scale == 100))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
