"""Counts dropped tokens: one capacity for the whole batch, as in the paper and in mmx, against one for each shard of its rows.

    python experiments/measure/capacity.py               # about 3 minutes on 2 cores; writes capacity.png

Trains experiments/tiny.py (8 experts, top-2) without dropping for --seconds, or loads --checkpoint. Then it evaluates held-out
text in batches of 32 rows of 512 tokens, in random order, with one capacity for the whole batch. From the routing of each layer
it counts the assignments that would be dropped if each of 1 to 32 equal shards of the rows had its own capacity. For one shard,
the count must equal the model's own.
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
from mmx.data import held_out, packing, tokens
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
    flags.add_argument("--checkpoint", help="workdir or Hugging Face directory (default: train a model)")
    flags.add_argument("--seconds", type=float, default=75, help="seconds of training (default 75)")
    flags.add_argument("--out", default="capacity.png", help="file of the plot (default capacity.png)")
    args = flags.parse_args()
    if args.checkpoint:
        loaded = mmx.load(args.checkpoint)
    else:
        with tempfile.TemporaryDirectory() as workdir:
            run.train(experiments.read(EXPERIMENT, [f"--config.train.seconds={args.seconds}"]), workdir)
            loaded = mmx.load(workdir)
    batches = held_out_batches(loaded.tokenizer)
    dropped = {c: count_dropped(loaded, c, batches) for c in CAPACITIES}
    print_table(dropped, len(batches))
    plot(dropped, args.out)
    print(f"plot: {args.out}")


def held_out_batches(tokenizer) -> list[dict]:
    """Batches of full rows of the embedded validation texts, in random order."""
    loaded_tokenizer = tokens.tokenizer(tokenizer)
    texts = held_out.validation(mmx.config.Data())
    rows = packing.Packed([tokens.document(loaded_tokenizer, raw, name) for name, raw in texts], LENGTH)
    order = np.random.default_rng(0).permutation(len(rows))[:len(rows) // ROWS * ROWS]
    return [packing.stack(rows[n] for n in part) for part in np.split(order, len(order) // ROWS)]


def count_dropped(loaded, capacity, batches):
    """The dropped share of the assignments, by number of shards (first axis) and layer."""
    model = Model(dataclasses.replace(loaded.config, capacity=capacity))

    @jax.jit
    def one(params, tokens_BT, segments_BT, positions_BT):
        _, _, stats = model.apply({"params": params}, tokens_BT, segments_BT, positions_BT, trace=True)
        _, expert_LBTj = jax.lax.top_k(stats["router_logits_BTE"], loaded.config.top_k)
        by_shard = functools.partial(dropped_by_shard, capacity=capacity, E=loaded.config.experts)
        return jnp.stack([by_shard(expert_LBTj, shards=n) for n in SHARDS]), stats["dropped"]

    found = []
    for batch in tqdm(batches, f"capacity {capacity}", unit="batch"):
        shares, own_L = one(loaded.params, batch["tokens"], batch["segments"], batch["positions"])
        np.testing.assert_allclose(shares[0], own_L, atol=1e-6, err_msg="with one shard, the count must equal the model's")
        found.append(shares)
    return np.mean(found, axis=0)


def dropped_by_shard(expert_LBTj, *, shards, capacity, E):
    """dropped_l if each of `shards` equal blocks of rows has its own capacity. j is a token's choices of experts."""
    L, B, T, j = expert_LBTj.shape
    blocks = expert_LBTj.reshape(L * shards, B // shards, T, j)
    live_BT = jnp.ones(blocks.shape[1:3], bool)
    positions, _ = jax.vmap(lambda expert_BTj: routing.queue_positions(expert_BTj, live_BT, E))(blocks)
    limit = routing.expert_capacity(capacity, B // shards * T * j, E)
    return jnp.mean(positions >= limit, axis=(1, 2, 3)).reshape(L, shards).mean(1)


def print_table(dropped, batches):
    table = Table("shards", *(f"capacity {c}{what}" for c in dropped for what in ("", ", worst layer")),
                  title=f"dropped assignments, %, in {batches} batches of {ROWS} x {LENGTH} held-out tokens")
    for n, shards in enumerate(SHARDS):
        dropped_Nl = [shares[n] for shares in dropped.values()]
        cells = [f"{100 * share:.2f}" for dropped_l in dropped_Nl for share in (dropped_l.mean(), dropped_l.max())]
        table.add_row(f"{shards}{' (global)' * (shards == 1)}", *cells)
    Console().print(table)


def plot(dropped, path):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4), layout="constrained")
    for color, (capacity, shares) in enumerate(dropped.items()):
        axes.plot(SHARDS, 100 * shares.mean(1), "o-", color=f"C{color}", label=f"capacity factor {capacity}")
        axes.plot(SHARDS, 100 * shares.max(1), "o:", color=f"C{color}")
    axes.set_xscale("log", base=2)
    axes.set(title="mean over layers (solid) and worst layer (dotted)",
             xlabel="shards with their own capacity (1: global)", ylabel="dropped assignments, %",
             xticks=SHARDS, xticklabels=SHARDS, ylim=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    hugepages.restart(hugepages.BENCHMARK)
    main()
