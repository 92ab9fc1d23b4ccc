"""Dropped tokens and what they cost, by experiments/router.py: trains its seeds, then reads held-out text under capacities.

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
from mmx.data import packing, pipeline, tokens
from mmx.files import atomic
from mmx.launch import experiments, hugepages, sweep
from mmx.model import Model
from mmx.training.loss import loss

EXPERIMENT = str(Path(__file__).parents[1] / "router.py")
CAPACITIES, SHARDS = (1.0, 1.25, 1.5, 2.0), (1, 4, 16, 32)
BATCH, BATCHES = 32, 3


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--run", type=Path, metavar="DIR", required=True, help="mmx sweep's --out: what it has stays")
    flags.add_argument("--jobs", default=1, metavar="N", help="runs at a time (default 1)")
    flags.add_argument("--hours", metavar="H", help="train only if that takes no longer; a reading takes some minutes on top")
    flags.add_argument("--out", default=EXPERIMENT.replace("router.py", "results/router.jsonl"),
                       help="the rows (default experiments/results/router.jsonl)")
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
    """By capacity and number of shards: nats a token, and the share of assignments dropped, of all layers and of the worst."""
    documents = [tokens.document(tokens.tokenizer("bytes"), raw, name) for name, raw in pipeline.validation(Data())]
    packed = packing.Packed(documents, length)
    order = np.random.default_rng(0).permutation(len(packed))[:batches * BATCH]
    read = [packing.stack(packed[n] for n in part) for part in np.split(order, batches)]
    for capacity in (0.0, *capacities):
        for parts in shards if capacity else shards[:1]:
            c = dataclasses.replace(loaded.config, capacity=capacity)
            found = [_read(c, parts, loaded.params, batch) for batch in read]
            nats, dropped_L = (np.mean(x, axis=0) for x in zip(*found))
            yield {"capacity": capacity, "shards": parts, "loss": float(nats), "dropped": float(dropped_L.mean()),
                   "worst": float(dropped_L.max())}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(c, shards, params, batch):
    """Mean over shards that are read one by one, each with its own capacity: loss, dropped_L."""
    def one(part):
        _, metrics = loss(Model(c), params, part, part["tokens"].size)
        return metrics["loss"], metrics["dropped"]
    parts = jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), batch)
    return jax.tree.map(lambda x: jnp.mean(x, 0), jax.lax.map(one, parts))


if __name__ == "__main__":
    hugepages.restart(hugepages.BENCHMARK)
    main()
