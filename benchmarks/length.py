"""Tokens/s and memory of one attention layer, forward and backward, over the sequence's length, at equal tokens a call.

    python benchmarks/length.py             # a quarter of an hour on two idle cores; writes experiments/results/length.jsonl

Hidden 256, 8 heads x 32 (softmax: 2 KV heads), float32. A call reads 131,072 tokens, of many sequences or of one, so that the
length alone changes: calls that are larger need new memory, and are slower for that. Each point is a process of its own, in
turn, pass after pass: the median of several calls, after as many as still take new memory, and the peak of the call's buffers
beyond its inputs as XLA lays them out. Softmax attention's time grows with the length: it stops where four times its last call
is over --limit. `python -m experiments.findings` draws the figure.
Result: lightning keeps 97 % of its tokens/s (91 to 102) from 1,024 to 131,072 tokens; a loss of 5 % being none: cannot tell.
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

from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from mmx import config
from mmx.files import atomic
from mmx.launch import hugepages

LENGTHS = [1024, 4096, 16384, 65536, 131072]
NAMES = {"L": "lightning", "S": "softmax"}
OUT = Path(__file__).parents[1] / "experiments" / "results" / "length.jsonl"


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--tokens", type=int, default=131072, help="of a call (default 131072)")
    flags.add_argument("--lengths", type=lambda s: [int(n) for n in s.split(",")], default=LENGTHS)
    flags.add_argument("--limit", type=float, default=30, help="longest call, in seconds (default 30)")
    flags.add_argument("--passes", type=int, default=3, help="how often all is measured (default 3)")
    flags.add_argument("--out", default=OUT, help="the points, a line of JSON each (default experiments/results/length.jsonl)")
    flags.add_argument("--point", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.point:
        kind, sequences, length = args.point.split(",")
        print(json.dumps(measure(kind, int(sequences), int(length))))
        return
    if args.passes < 1:
        flags.error(f"--passes {args.passes}: give one, or more")
    if uneven := [n for n in args.lengths if n < 1 or args.tokens < 1 or args.tokens % n]:
        flags.error(f"--lengths: {uneven[0]} does not divide the {args.tokens:,} tokens of a call; give others, or --tokens")
    rows, last = [], {}
    for number, length in tqdm(list(itertools.product(range(args.passes), args.lengths)), "lengths"):
        for kind in NAMES:
            if kind == "S" and 4 * last.get(number, 0) > args.limit:
                continue
            sequences = args.tokens // length
            out = subprocess.run([sys.executable, __file__, "--point", f"{kind},{sequences},{length}"], capture_output=True,
                                 text=True)
            if out.returncode:
                sys.exit(out.stderr)
            rows.append({"kind": kind, "length": length, "sequences": sequences, "seed": number}
                        | json.loads(out.stdout.splitlines()[-1]))
            if kind == "S":
                last[number] = rows[-1]["seconds"]
            with atomic.replacing(args.out) as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    show(rows, args.lengths)
    print(f"{len(rows)} rows: {args.out}")


def measure(kind: str, sequences: int, length: int) -> dict:
    import jax
    import jax.numpy as jnp

    from mmx.layers.common import Context
    from mmx.layers.kinds import kind_of

    c = config.Model(pattern=kind)
    mixer = kind_of(kind).mixer(c)
    u_BTD = jax.random.normal(jax.random.key(0), (sequences, length, c.dim))
    context = Context(None, jnp.tile(jnp.arange(length), (sequences, 1)), None)
    constants = kind_of(kind).constants and kind_of(kind).constants(c, 3)
    params = jax.jit(mixer.init)(jax.random.key(1), u_BTD[:1, :8], Context(None, jnp.arange(8)[None], None), None, constants)
    step = jax.jit(jax.grad(lambda p, u: jnp.mean(mixer.apply(p, u, context, None, constants)[0] ** 2), (0, 1)))
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
    return {"seconds": median, "tokens_per_s": sequences * length / median,
            "peak_mib": (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2 ** 20}


def show(rows, lengths):
    """A table of the passes' medians."""
    table = Table("length", *(f"{name} {what}" for name in NAMES.values() for what in ("tokens/s", "peak MiB")),
                  title="one layer, forward and backward")
    for length in lengths:
        cells = []
        for kind in NAMES:
            found = [row for row in rows if (row["kind"], row["length"]) == (kind, length)]
            cells += [f"{statistics.median(row[name] for row in found):,.0f}" if found else "-"
                      for name in ("tokens_per_s", "peak_mib")]
        table.add_row(f"{length:,}", *cells)
    Console().print(table)


if __name__ == "__main__":
    hugepages.restart(hugepages.BENCHMARK)
    main()
