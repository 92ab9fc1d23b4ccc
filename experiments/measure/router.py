"""Measures dropped tokens and their cost: trains the models of experiments/router.py and evaluates them at several capacities.

    python experiments/measure/router.py --run router        # writes experiments/results/router.jsonl
"""
import argparse
import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mmx import cli
from mmx.checkpoints.convert import load
from mmx.config import Data
from mmx.data import held_out, packing, tokens
from mmx.files import atomic
from mmx.launch import experiments, hugepages, sweep
from mmx.model import Model
from mmx.training.loss import loss

EXPERIMENT = str(Path(__file__).parents[1] / "router.py")
CAPACITIES, SHARDS = (1.0, 1.25, 1.5, 2.0), (1, 4, 16, 32)
BATCH, BATCHES = 32, 3


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--run", type=Path, metavar="DIR", required=True, help="folder of the sweep; keeps finished runs")
    flags.add_argument("--jobs", default=1, metavar="N", help="models to train at a time (default 1)")
    flags.add_argument("--hours", metavar="H", help="refuse to train if training is expected to take longer; evaluation takes "
                       "some more minutes")
    flags.add_argument("--out", default=EXPERIMENT.replace("router.py", "results/router.jsonl"),
                       help="file to write the rows to (default experiments/results/router.jsonl)")
    args = flags.parse_args()
    hours = ["--hours", args.hours] if args.hours else []
    if code := cli.main(["sweep", "--config", EXPERIMENT, "--out", str(args.run), "--jobs", str(args.jobs), *hours]):
        raise SystemExit(code)
    rows = [cell.keys | row for cell in sweep.cells(*experiments.grid(EXPERIMENT, []))
            for row in measure(load(args.run / "runs" / cell.name), cell.experiment.train.length)]
    with atomic.replacing(Path(args.out)) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{len(rows)} rows: {args.out}")


def measure(loaded, length, capacities=CAPACITIES, shards=SHARDS, batches=BATCHES):
    """Evaluates a model on held-out text for each capacity factor and number of shards.

    Yields rows with the loss in nats per token, and the share of dropped assignments: the mean over layers ("dropped") and the
    largest of a layer ("worst"). The first row is without dropping.
    """
    documents = [tokens.document(tokens.tokenizer("bytes"), raw, name) for name, raw in held_out.validation(Data())]
    packed = packing.Packed(documents, length)
    order = np.random.default_rng(0).permutation(len(packed))[:batches * BATCH]
    batches_of_rows = [packing.stack(packed[n] for n in part) for part in np.split(order, batches)]
    for capacity in (0.0, *capacities):
        for count in shards if capacity else shards[:1]:
            c = dataclasses.replace(loaded.config, capacity=capacity)
            found = [_evaluate(c, count, loaded.params, batch) for batch in batches_of_rows]
            nats, dropped_l = (np.mean(x, axis=0) for x in zip(*found))
            yield {"capacity": capacity, "shards": count, "loss": float(nats), "dropped": float(dropped_l.mean()),
                   "worst": float(dropped_l.max())}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluate(c, shards, params, batch):
    """(loss, dropped_l), means over shards of the rows; each shard is evaluated separately, with its own capacity."""
    def one(part):
        _, metrics = loss(Model(c), params, part, part["tokens"].size)
        return metrics["loss"], metrics["dropped"]
    parts = jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), batch)
    return jax.tree.map(lambda x: jnp.mean(x, 0), jax.lax.map(one, parts))


if __name__ == "__main__":
    hugepages.restart(hugepages.BENCHMARK)
    main()
