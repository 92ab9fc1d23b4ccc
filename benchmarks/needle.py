"""The needle experiment: trains and reads experiments/needle.py's three kinds with three seeds, the figure and the table.

    python benchmarks/needle.py --run DIR       # all nine runs, one after another; what DIR has already is not done again
    python benchmarks/needle.py                 # docs/needle.png and the table, of the rows in experiments/results/needle.jsonl

A row is an example that was read: the kind, the seed, the prompt's length in tokens, the needle's depth in percent, whether the
answer was right, and what was written.
"""
import argparse
import json
from pathlib import Path

import numpy as np

from mmx import cli

ROOT = Path(__file__).parents[1]
EXPERIMENT, ROWS, FIGURE = ROOT / "experiments/needle.py", ROOT / "experiments/results/needle.jsonl", ROOT / "docs/needle.png"
KINDS, SEEDS = ("hybrid", "softmax", "lightning"), (0, 1, 2)
LENGTHS, DEPTHS = (512, 1024, 2048, 4096, 8192, 16384), (0, 25, 50, 75, 100)


def data(folder: Path):
    """The documents to train on."""
    for name, how in (("again", ["--rows", "again", "--lengths", "128", "--examples", "4000"]),
                      ("needle", ["--lengths", "192,256,512,1k", "--examples", "150"])):
        if not (folder / f"{name}.jsonl").exists():
            mmx("examples", "--suite", "needle", *how, "--seed", 1, "--out", folder / f"{name}.jsonl")


def one(folder: Path, kind: str, seed: int):
    """Trains and reads one model; its rows."""
    run, needles = folder / f"{kind}{seed}", str(folder / "needle.jsonl")
    mmx("train", "--config", f"{EXPERIMENT}:{kind}", "--workdir", run, f"--config.train.seed={seed}",
        f"--config.data.seed={seed}", f"--config.data.sources={(str(folder / 'again.jsonl'), needles, needles)!r}")
    mmx("eval", "--checkpoint", run, "--suite", "needle", "--lengths", ",".join(map(str, LENGTHS)),
        "--rows", ",".join(map(str, DEPTHS)), "--examples", 2)
    for line in (run / "needle.jsonl").read_text().splitlines()[1:]:
        found = json.loads(line)
        yield {"kind": kind, "seed": seed, "length": int(found["column"]), "depth": int(found["row"]), "score": found["score"],
               "answer": found["answers"][0], "output": found["output"]}


def mmx(*arguments):
    if code := cli.main([str(argument) for argument in arguments]):
        raise SystemExit(code)


def digits(row: dict) -> float:
    """The share of an answer's digits that stand where they should."""
    return np.mean([a == b for a, b in zip(row["answer"], row["output"].strip().ljust(len(row["answer"])))])


def scores(rows, measure=lambda row: row["score"]) -> np.ndarray:
    """Means over examples, [kind, seed, depth, length]."""
    cells = [[[[np.mean([measure(row) for row in rows if (row["kind"], row["seed"], row["depth"], row["length"]) ==
                         (kind, seed, depth, length)]) for length in LENGTHS] for depth in DEPTHS]
              for seed in sorted({row["seed"] for row in rows})] for kind in KINDS]
    return np.array(cells)


def show(name: str, scores_KSDL):
    """A table of means over seeds and depths, and the seeds' range."""
    print(f"| {name} % | " + " | ".join(f"{length:,}" for length in LENGTHS) + " |\n|---|" + "---|" * len(LENGTHS))
    for kind, scores_SL in zip(KINDS, 100 * scores_KSDL.mean(2)):
        print(f"| {kind} | " + " | ".join(f"{x.mean():.0f} ({x.min():.0f} to {x.max():.0f})" for x in scores_SL.T) + " |")


def plot(scores_KSDL, path: Path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(KINDS), figsize=(11, 3.2), layout="constrained", sharey=True)
    for ax, kind, grid in zip(axes, KINDS, 100 * scores_KSDL.mean(1)):
        image = ax.imshow(grid, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        for y, x in np.ndindex(grid.shape):
            ax.text(x, y, f"{grid[y, x]:.0f}", ha="center", va="center")
        ax.set_xticks(range(len(LENGTHS)), [f"{length / 1024:g}k" for length in LENGTHS])
        ax.set(title=kind, xlabel="tokens (trained to 1k)")
    axes[0].set_yticks(range(len(DEPTHS)), DEPTHS)
    axes[0].set_ylabel("depth %")
    figure.colorbar(image, ax=axes, label=f"right answers %, mean of {scores_KSDL.shape[1]} seeds")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, metavar="DIR", help="train and read here first")
    args = parser.parse_args()
    if args.run:
        data(args.run)
        rows = [row for kind in KINDS for seed in SEEDS for row in one(args.run, kind, seed)]
        ROWS.parent.mkdir(exist_ok=True)
        ROWS.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    show("right answers", scores(rows))
    print()
    show("right digits", scores(rows, digits))
    plot(scores(rows), FIGURE)
    print(f"written: {FIGURE}")


if __name__ == "__main__":
    main()
