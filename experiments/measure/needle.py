"""The needle experiments: trains and reads experiments/needle.py's or needle_rope.py's models with three seeds; their tables.

    python experiments/measure/needle.py --run DIR       # mmx sweep, then the readings; what DIR has already is not done again
    python experiments/measure/needle.py                 # the tables, of the rows in experiments/results/needle.jsonl
    python experiments/measure/needle.py --experiment needle_rope --run DIR --jobs 2 --hours 2

A row is an example that was read: what the model is, the seed, the prompt's length in tokens, the needle's depth in percent,
whether the answer was right, and what was written. `python -m experiments.findings` draws the figures.
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
from mmx.files import atomic
from mmx.launch import experiments, sweep

FOLDER = Path(__file__).parents[1]
DEPTHS = (0, 25, 50, 75, 100)


class Plan(NamedTuple):
    documents: tuple    # lengths to train on, and examples of each and of each depth
    lengths: tuple      # to read
    examples: int       # of each length and depth


PLANS = {"needle": Plan(("192,256,512,1k", 150), (512, 1024, 2048, 4096, 8192, 16384), 2),
         "needle_rope": Plan(("192,256", 300), (256, 512, 1024, 2048), 10)}


def run(folder: Path, name: str, jobs: int, hours: float | None) -> list[dict]:
    """Trains and reads the models of an experiment; the rows."""
    folder = folder.resolve()       # its path is in the runs' configs, by which what is done is known again
    data(folder, PLANS[name])
    file = f"{FOLDER / name}.py"
    sources = tuple(str(folder / Path(source).name) for source in experiments.read(file, []).data.sources)
    elsewhere = [f"--config.data.sources={sources!r}"]
    mmx("sweep", "--config", file, "--out", folder, "--jobs", jobs, *([] if hours is None else ["--hours", hours]), *elsewhere)
    cells = sweep.cells(*experiments.grid(file, elsewhere))
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return list(itertools.chain(*pool.map(functools.partial(read, folder, PLANS[name]), cells)))


def data(folder: Path, plan: Plan):
    """The documents to train on."""
    lengths, examples = plan.documents
    for name, how in (("again", ["--rows", "again", "--lengths", "128", "--examples", "4000"]),
                      ("needle", ["--lengths", lengths, "--examples", examples])):
        if not (folder / f"{name}.jsonl").exists():
            mmx("examples", "--suite", "needle", *how, "--seed", 1, "--out", folder / f"{name}.jsonl")


def read(folder: Path, plan: Plan, cell: sweep.Cell) -> list[dict]:
    """Asks a trained model for needles; its rows."""
    workdir = folder / "runs" / cell.name
    mmx("eval", "--checkpoint", workdir, "--suite", "needle", "--lengths", ",".join(map(str, plan.lengths)),
        "--rows", ",".join(map(str, DEPTHS)), "--examples", plan.examples)
    found = [json.loads(line) for line in (workdir / "needle.jsonl").read_text().splitlines()[1:]]
    return [cell.keys | {"length": int(line["column"]), "depth": int(line["row"]), "score": line["score"],
                         "answer": line["answers"][0], "output": line["output"]} for line in found]


def mmx(*arguments):
    if code := cli.main([str(argument) for argument in arguments]):
        raise SystemExit(code)


def digits(row: dict) -> float:
    """The share of an answer's digits that stand where they should."""
    return np.mean([a == b for a, b in zip(row["answer"], row["output"].strip().ljust(len(row["answer"])))])


def show(name: str, rows: list[dict], arms: list[dict], plan: Plan, measure=lambda row: row["score"]):
    """A table of means over seeds and depths, and the seeds' range."""
    print(f"| {name} % | " + " | ".join(f"{length:,}" for length in plan.lengths) + " |\n|---|" + "---|" * len(plan.lengths))
    for arm in arms:
        cells = []
        for length in plan.lengths:
            own = [row for row in rows if arm.items() <= row.items() and row["length"] == length]
            seeds = [100 * np.mean([measure(row) for row in own if row["seed"] == seed])
                     for seed in sorted({row["seed"] for row in own})]
            cells.append(f"{np.mean(seeds):.0f} ({min(seeds):.0f} to {max(seeds):.0f})" if seeds else "")
        print(f"| {', '.join(map(str, arm.values()))} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", choices=PLANS, default="needle", help="(default needle)")
    parser.add_argument("--run", type=Path, metavar="DIR", help="train and read here first")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="with --run, how many at a time (default 1)")
    parser.add_argument("--hours", type=float, metavar="H",
                        help="with --run, train only if that takes no longer; a reading takes half a minute to two on top")
    args = parser.parse_args()
    if args.jobs < 1:       # said before documents are made
        parser.error(f"--jobs {args.jobs}: give one, or more")
    plan, path = PLANS[args.experiment], FOLDER / "results" / f"{args.experiment}.jsonl"
    if args.run:
        found = run(args.run, args.experiment, args.jobs, args.hours)
        with atomic.replacing(path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    if not path.exists():
        parser.error(f"{path} is not there: make it by --run DIR")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    grid, _ = experiments.grid(f"{FOLDER / args.experiment}.py", [])
    arms = [arm for arm in grid if not arm.pop("seed")]
    show("right answers", rows, arms, plan)
    print()
    show("right digits", rows, arms, plan, digits)


if __name__ == "__main__":
    main()
