"""Dropped tokens: a capacity over the whole batch, as the paper's and ours, against one for each shard of its rows.

    python experiments/measure/capacity.py               # about 3 minutes on 2 cores; writes capacity.png

Trains experiments/tiny.py (8 experts, top-2), without dropping, for --seconds, or takes --checkpoint; then reads held-out
text in batches of 32 rows of 512 tokens in random order, with the capacity over the whole batch, and counts by every layer's
routing what capacities of its own for each of 1 to 32 shards, of equally many rows, would drop of the assignments. Of one
shard the count must be the model's own.
"""
import argparse
import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

import mmx
from mmx.data import packing, pipeline, tokens
from mmx.launch import experiments, hugepages
from mmx.model import Model
from mmx.parallel import routing
from mmx.training import run

EXPERIMENT = str(Path(__file__).parents[1] / "tiny.py")
CAPACITIES = 1.0, 1.25, 1.5
SHARDS = 1, 2, 4, 8, 16, 32
ROWS, LENGTH = SHARDS[-1], 512


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--checkpoint", help="a workdir or a Hugging Face directory (default: train one)")
    flags.add_argument("--seconds", type=float, default=75, help="of training (default 75)")
    flags.add_argument("--out", default="capacity.png", help="the plot (default capacity.png)")
    args = flags.parse_args()
    if args.checkpoint:
        loaded = mmx.load(args.checkpoint)
    else:
        with tempfile.TemporaryDirectory() as workdir:
            run.train(experiments.read(EXPERIMENT, [f"--config.train.seconds={args.seconds}"]), workdir)
            loaded = mmx.load(workdir)
    batches = held_out(loaded.tokenizer)
    dropped = {c: count(loaded, c, batches) for c in CAPACITIES}
    show(dropped, len(batches))
    plot(dropped, args.out)
    print(f"plot: {args.out}")


def held_out(tokenizer) -> list[dict]:
    """Batches of full rows of the embedded validation texts, in random order."""
    read = tokens.tokenizer(tokenizer)
    texts = pipeline.validation(mmx.config.Data())
    rows = packing.Packed([tokens.document(read, raw, name) for name, raw in texts], LENGTH)
    order = np.random.default_rng(0).permutation(len(rows))[:len(rows) // ROWS * ROWS]
    return [packing.stack(rows[n] for n in part) for part in np.split(order, len(order) // ROWS)]


def count(loaded, capacity, batches):
    """dropped_SL: the share of the assignments, by number of shards and layer."""
    model = Model(dataclasses.replace(loaded.config, capacity=capacity))

    @jax.jit
    def one(params, tokens_BT, segments_BT, positions_BT):
        _, _, stats = model.apply({"params": params}, tokens_BT, segments_BT, positions_BT, trace=True)
        _, expert_LBTJ = jax.lax.top_k(stats["router_logits_BTE"], loaded.config.top_k)
        split = functools.partial(by_shard, capacity=capacity, E=loaded.config.experts)
        return jnp.stack([split(expert_LBTJ, shards=n) for n in SHARDS]), stats["dropped"]

    found = []
    for batch in tqdm(batches, f"capacity {capacity}", unit="batch"):
        dropped_SL, own_L = one(loaded.params, batch["tokens"], batch["segments"], batch["positions"])
        np.testing.assert_allclose(dropped_SL[0], own_L, atol=1e-6, err_msg="one shard drops what the model drops")
        found.append(dropped_SL)
    return np.mean(found, axis=0)


def by_shard(expert_LBTJ, *, shards, capacity, E):
    """dropped_L, where each of `shards` blocks of rows has a capacity of its own."""
    L, B, T, J = expert_LBTJ.shape
    expert_NBTJ = expert_LBTJ.reshape(L * shards, B // shards, T, J)
    live_BT = jnp.ones(expert_NBTJ.shape[1:3], bool)
    place_NBTJ, _ = jax.vmap(lambda expert_BTJ: routing.queue_positions(expert_BTJ, live_BT, E))(expert_NBTJ)
    limit = routing.expert_capacity(capacity, B // shards * T * J, E)
    return jnp.mean(place_NBTJ >= limit, axis=(1, 2, 3)).reshape(L, shards).mean(1)


def show(dropped, batches):
    table = Table("shards", *(f"capacity {c}{what}" for c in dropped for what in ("", ", worst layer")),
                  title=f"dropped assignments, % of {batches} batches of {ROWS} x {LENGTH} held-out tokens")
    for n, shards in enumerate(SHARDS):
        dropped_NL = [dropped_SL[n] for dropped_SL in dropped.values()]
        cells = [f"{100 * share:.2f}" for dropped_L in dropped_NL for share in (dropped_L.mean(), dropped_L.max())]
        table.add_row(f"{shards}{' (global)' * (shards == 1)}", *cells)
    Console().print(table)


def plot(dropped, path):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4), layout="constrained")
    for color, (capacity, dropped_SL) in enumerate(dropped.items()):
        axes.plot(SHARDS, 100 * dropped_SL.mean(1), "o-", color=f"C{color}", label=f"capacity {capacity}")
        axes.plot(SHARDS, 100 * dropped_SL.max(1), "o:", color=f"C{color}")
    axes.set_xscale("log", base=2)
    axes.set(title="one shard: the capacity is global; dotted: the worst layer",
             xlabel="shards, each with a capacity of its own", ylabel="dropped assignments, %",
             xticks=SHARDS, xticklabels=SHARDS, ylim=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    hugepages.restart(hugepages.BENCHMARK)
    main()
