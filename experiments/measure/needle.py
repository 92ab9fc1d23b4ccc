"""Trains and evaluates the models of experiments/needle.py or needle_rope.py with three seeds, and prints their tables.

    python experiments/measure/needle.py --run DIR      # a sweep, then evaluations; skips what DIR already has
    python experiments/measure/needle.py                # only the tables, from experiments/results/needle.jsonl
    python experiments/measure/needle.py --experiment needle_rope --run DIR --jobs 2 --hours 2

A row is one question: the arm of the model, the seed, the prompt's length in tokens, the needle's depth in percent, the score
(1 if the answer is correct, otherwise 0), the correct answer, and the model's output. `python -m experiments.findings` draws
the figures.
"""
import argparse
import concurrent.futures
import functools
import itertools
import json
import multiprocessing
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmx import cli
from mmx.files import atomic, texts
from mmx.launch import experiments, sweep

FOLDER = Path(__file__).parents[1]
DEPTHS = (0, 25, 50, 75, 100)


class Plan(NamedTuple):
    documents: tuple    # lengths of the training documents, and how many of each length and depth
    lengths: tuple      # prompt lengths of the evaluation, in tokens
    examples: int       # questions of each length and depth


PLANS = {"needle": Plan(("192,256,512,1k", 150), (512, 1024, 2048, 4096, 8192, 16384), 2),
         "needle_rope": Plan(("192,256", 300), (256, 512, 1024, 2048), 10)}


def run(folder: Path, name: str, jobs: int, hours: float | None) -> list[dict]:
    """Trains and evaluates the models of an experiment in `folder`, and returns the rows."""
    folder = folder.resolve()       # the runs' configs contain this path, and finished runs are recognised by their config
    write_documents(folder, PLANS[name])
    file = f"{FOLDER / name}.py"
    sources = tuple(str(folder / Path(source).name) for source in experiments.read(file, []).data.sources)
    overrides = [f"--config.data.sources={sources!r}"]
    mmx("sweep", "--config", file, "--out", folder, "--jobs", jobs, *([] if hours is None else ["--hours", hours]), *overrides)
    cells = sweep.cells(*experiments.grid(file, overrides))
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return list(itertools.chain(*pool.map(functools.partial(evaluate, folder, PLANS[name]), cells)))


def write_documents(folder: Path, plan: Plan):
    """Writes the training documents that `folder` does not have yet."""
    lengths, examples = plan.documents
    for name, options in (("again", ["--rows", "again", "--lengths", "128", "--examples", "4000"]),
                          ("needle", ["--lengths", lengths, "--examples", examples])):
        if not (folder / f"{name}.jsonl").exists():
            mmx("examples", "--suite", "needle", *options, "--seed", 1, "--out", folder / f"{name}.jsonl")


def evaluate(folder: Path, plan: Plan, cell: sweep.Cell) -> list[dict]:
    """Evaluates a trained model on needles, and returns its rows."""
    workdir = folder / "runs" / cell.name
    mmx("eval", "--checkpoint", workdir, "--suite", "needle", "--lengths", ",".join(map(str, plan.lengths)),
        "--rows", ",".join(map(str, DEPTHS)), "--examples", plan.examples)
    found = [line for _, line in texts.read_json_lines(workdir / "needle.jsonl")[1:]]
    return [cell.keys | {"length": int(line["column"]), "depth": int(line["row"]), "score": line["score"],
                         "answer": line["answers"][0], "output": line["output"]} for line in found]


def mmx(*arguments):
    """Runs an mmx command, and exits if it fails."""
    if code := cli.main([str(argument) for argument in arguments]):
        raise SystemExit(code)


def correct_digits(row: dict) -> float:
    """The share of the answer's digits that the output has in their places."""
    return np.mean([a == b for a, b in zip(row["answer"], row["output"].strip().ljust(len(row["answer"])))])


def print_table(name: str, rows: list[dict], arms: list[dict], plan: Plan, measure=lambda row: row["score"]):
    """Prints the mean of `measure` over seeds and depths for each arm and length, with the lowest and the highest seed."""
    print(f"| {name} % | " + " | ".join(f"{length:,}" for length in plan.lengths) + " |\n|---|" + "---|" * len(plan.lengths))
    for arm in arms:
        cells = []
        for length in plan.lengths:
            found = [row for row in rows if arm.items() <= row.items() and row["length"] == length]
            seeds = [100 * np.mean([measure(row) for row in found if row["seed"] == seed])
                     for seed in sorted({row["seed"] for row in found})]
            cells.append(f"{np.mean(seeds):.0f} ({min(seeds):.0f} to {max(seeds):.0f})" if seeds else "")
        print(f"| {', '.join(map(str, arm.values()))} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", choices=PLANS, default="needle", help="the experiment (default needle)")
    parser.add_argument("--run", type=Path, metavar="DIR", help="first train and evaluate in this folder")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="with --run: models to train at a time (default 1)")
    parser.add_argument("--hours", type=float, metavar="H", help="with --run: refuse to train if training is expected to take "
                        "longer; each evaluation takes another half a minute to two minutes")
    args = parser.parse_args()
    if args.jobs < 1:       # checked before documents are written
        parser.error(f"--jobs {args.jobs}: must be at least 1")
    plan, path = PLANS[args.experiment], FOLDER / "results" / f"{args.experiment}.jsonl"
    if args.run:
        found = run(args.run, args.experiment, args.jobs, args.hours)
        with atomic.replacing(path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    if not path.exists():
        parser.error(f"{path} does not exist: create it with --run DIR")
    rows = [row for _, row in texts.read_json_lines(path)]
    grid, _ = experiments.grid(f"{FOLDER / args.experiment}.py", [])
    arms = [arm for arm in grid if not arm.pop("seed")]
    print_table("correct answers", rows, arms, plan)
    print()
    print_table("correct digits", rows, arms, plan, correct_digits)


if __name__ == "__main__":
    main()
