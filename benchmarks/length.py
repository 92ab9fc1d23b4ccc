"""Tokens/s and peak memory of one attention layer, forward and backward, over the sequence's length.

    python benchmarks/length.py                 # about 4 minutes on 2 cores; writes length.png
    python benchmarks/length.py --passes 3 --lengths 1024,131072 --limit 0 --rows experiments/length.jsonl    # docs/findings.md

Hidden 256, 8 heads x 32 (softmax: 2 KV heads), float32, one sequence. Each point is a process of its own: the median of
several calls, after as many as still take new memory, and the peak of the call's buffers beyond its inputs as XLA lays them
out. Softmax attention's time grows with the square of the length: it stops where four times its last call is over --limit.
"""
import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from mmx import config, hugepages

LENGTHS = [2 ** n for n in range(10, 18)]
NAMES = {"L": "lightning", "S": "softmax"}


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--limit", type=float, default=20, help="longest call, in seconds (default 20)")
    flags.add_argument("--lengths", type=lambda s: [int(n) for n in s.split(",")], default=LENGTHS)
    flags.add_argument("--passes", type=int, default=1, help="how often all is measured; table and plot have the medians")
    flags.add_argument("--rows", help="a file for all points, a line of JSON each")
    flags.add_argument("--out", default="length.png", help="the plot (default length.png)")
    flags.add_argument("--point", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.point:
        kind, length = args.point.split(",")
        print(json.dumps(measure(kind, int(length))))
        return
    rows, last = [], {}
    for number, length in tqdm(list(itertools.product(range(args.passes), args.lengths)), "lengths"):
        for kind in NAMES:
            if kind == "S" and 4 * last.get(number, 0) > args.limit:
                continue
            out = subprocess.run([sys.executable, __file__, "--point", f"{kind},{length}"], capture_output=True, text=True)
            if out.returncode:
                sys.exit(out.stderr)
            rows.append({"kind": kind, "tokens": length, "seed": number} | json.loads(out.stdout.splitlines()[-1]))
            if kind == "S":
                last[number] = rows[-1]["seconds"]
            if args.rows:
                Path(args.rows).write_text("".join(json.dumps(row) + "\n" for row in rows))
    points = {kind: {length: {name: statistics.median(row[name] for row in found) for name in ("tokens_per_s", "peak_mib")}
                     for length in args.lengths if (found := [r for r in rows if (r["kind"], r["tokens"]) == (kind, length)])}
              for kind in NAMES}
    show(points, args.lengths)
    plot(points, args.out)
    print(f"plot: {args.out}")


def measure(kind: str, length: int) -> dict:
    import jax
    import jax.numpy as jnp

    from mmx.layers.common import Context
    from mmx.model import MIXERS

    c = config.Model(pattern=kind)
    mixer = MIXERS[kind](c)
    u_BTD = jax.random.normal(jax.random.key(0), (1, length, c.dim))
    context = Context(None, jnp.arange(length)[None], None)
    log_decay_H = jnp.array(c.log_decay[3])
    params = jax.jit(mixer.init)(jax.random.key(1), u_BTD[:, :8], Context(None, jnp.arange(8)[None], None), None, log_decay_H)
    step = jax.jit(jax.grad(lambda p, u: jnp.mean(mixer.apply(p, u, context, None, log_decay_H)[0] ** 2), (0, 1)))
    compiled = step.lower(params, u_BTD).compile()
    memory = compiled.memory_analysis()
    touched = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(12):                 # warm-up: until a call finds all its memory there
        before = touched()
        jax.block_until_ready(compiled(params, u_BTD))
        if touched() - before < 100:
            break
    seconds = []
    begin = time.perf_counter()
    while len(seconds) < 3 or (len(seconds) < 30 and time.perf_counter() - begin < 6):
        start = time.perf_counter()
        jax.block_until_ready(compiled(params, u_BTD))
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return {"seconds": median, "tokens_per_s": length / median,
            "peak_mib": (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2 ** 20}


def show(points, lengths):
    table = Table("tokens", *(f"{name} {what}" for name in NAMES.values() for what in ("tokens/s", "peak MiB")),
                  title="one layer, forward and backward")
    for length in lengths:
        cells = [(f"{p['tokens_per_s']:,.0f}", f"{p['peak_mib']:,.0f}") if (p := points[kind].get(length)) else ("-", "-")
                 for kind in NAMES]
        table.add_row(f"{length:,}", *(cell for pair in cells for cell in pair))
    Console().print(table)
    rates = [p["tokens_per_s"] for p in points["L"].values()]
    print(f"lightning: slowest length at {min(rates) / max(rates):.0%} of the fastest, "
          f"{min(rates) / statistics.median(rates):.0%} to {max(rates) / statistics.median(rates):.0%} of the median")


def plot(points, path):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for kind, name in NAMES.items():
        lengths = list(points[kind])
        speed.loglog(lengths, [p["tokens_per_s"] for p in points[kind].values()], "o-", label=name)
        memory.loglog(lengths, [p["peak_mib"] for p in points[kind].values()], "o-", label=name)
    speed.set(title="one layer, forward and backward", xlabel="tokens", ylabel="tokens/s")
    memory.set(title="peak of the buffers beyond the inputs", xlabel="tokens", ylabel="MiB")
    for axes in (speed, memory):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    hugepages.restart(hugepages.KEPT)
    main()
