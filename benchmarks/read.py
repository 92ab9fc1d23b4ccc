"""Measures tokens/s and memory of the inference engine during the prefill of a long text, and decoding after it.

    python benchmarks/read.py                                       # 4 M tokens, lightning layers only: 72 s on 2 cores
    python benchmarks/read.py --pattern LLLS --tokens 262144        # the hybrid of experiments/tiny.py

The geometry of experiments/tiny.py (width 128, 4 layers, 8 experts top-2 of 128), random weights, float32, random tokens.
The first point includes the compilation.
"""
import argparse
import os
import time

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from mmx import config
from mmx.analysis.counts import count_params
from mmx.checkpoints.convert import Loaded
from mmx.inference import engine
from mmx.launch import hugepages
from mmx.model import Model

GEOMETRY = {"dim": 128, "layers": 4, "heads": 4, "kv_heads": 1, "rotary_dim": 16, "expert_dim": 128, "init": "fan_in",
            "embed_std": 1.0, "capacity": 0.0}
ROWS = 12       # at most about this many rows in the table


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--pattern", default="LLLL", help="kinds of the 4 layers (default LLLL)")
    flags.add_argument("--tokens", type=int, default=1 << 22, help="tokens of the text (default 4194304)")
    flags.add_argument("--part", type=int, default=0, help="tokens between two points (default: 1/32 of --tokens)")
    flags.add_argument("--steps", type=int, default=64, help="tokens to decode after the text (default 64)")
    flags.add_argument("--out", default="read.png", help="file of the plot (default read.png)")
    args = flags.parse_args()
    c = config.Model(pattern=args.pattern, **GEOMETRY)
    params = jax.jit(lambda: Model(c).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])()
    loaded, part = Loaded(Model(c), params, c, ""), args.part or args.tokens // 32
    ids_T = np.random.default_rng(0).integers(0, c.vocab, args.tokens).astype(np.int32)

    points, times = [], [time.perf_counter()]
    bar = tqdm(total=args.tokens, unit="token", unit_scale=True)

    def progress(count):
        bar.update(count)
        if bar.n // part > (bar.n - count) // part or bar.n == args.tokens - 1:
            times.append(time.perf_counter())
            points.append((bar.n, (bar.n - (points[-1][0] if points else 0)) / (times[-1] - times[-2]), resident_mib()))
            bar.set_postfix(tokens_per_s=f"{points[-1][1]:,.0f}", MiB=f"{points[-1][2]:,.0f}")

    prefix = engine.make_prefix(loaded, ids_T, progress=progress)
    bar.close()
    start = time.perf_counter()
    pieces = list(engine.stream(loaded, [engine.Request(ids_T[:1], args.steps)], prefix=prefix))
    decoded = time.perf_counter() - start
    table = Table("tokens read", "tokens/s", "resident MiB", title=f"{args.pattern}, {count_params(c).total:,} parameters")
    for count, rate, memory in points[::max(len(points) // ROWS, 1)] + points[-1:]:
        table.add_row(f"{count:,}", f"{rate:,.0f}", f"{memory:,.0f}")
    Console().print(table)
    seconds = times[-1] - times[0]
    eighth = max(len(points) // 8, 1)
    first, last = (np.mean([rate for _, rate, _ in some]) for some in (points[1:eighth + 1], points[-eighth:]))
    print(f"{args.tokens:,} tokens read in {seconds:.0f} s; speed of the last eighth relative to the first: {last / first:.0%}")
    print(f"{sum(len(piece.ids_T) for piece in pieces)} tokens decoded after it in {decoded:.1f} s, compilation included")
    plot(points, args)


def resident_mib() -> float:
    """The resident memory of this process in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20


def plot(points, args):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts, rates, memory = zip(*points)
    figure, both = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, values, name in zip(both, (rates, memory), ("tokens/s", "resident memory, MiB")):
        axes.plot(counts, values, "o-")
        axes.set(xlabel="tokens read", ylabel=name, title=f"{args.pattern}: {name}", ylim=(0, 1.1 * max(values)))
        axes.grid(alpha=0.3)
    figure.savefig(args.out, dpi=120)
    print(f"plot: {args.out}")


if __name__ == "__main__":
    hugepages.restart(hugepages.BENCHMARK)
    main()
