"""Measures tokens/s and memory of one attention layer, forward and backward, by sequence length, at equal tokens per call.

    python benchmarks/length.py             # a quarter of an hour on two idle cores; writes experiments/results/length.jsonl

Width 256, 8 heads of 32 (softmax: 2 KV heads), float32. Every call processes 131,072 tokens, as many short sequences or one
long one. Calls with more tokens would need more memory, which alone makes them slower. Each point is measured in a separate
process: the median time of several calls, after a warm-up that lasts until calls allocate no new memory, and the peak size of
XLA's buffers without the inputs. All points are measured once per pass. Softmax attention slows down with the length; a length
is skipped if four times the previous call exceeds --limit. `python -m experiments.findings` draws the figure.
Result: from 1,024 to 131,072 tokens, lightning keeps 97 % of its tokens/s (91 to 102). Up to 5 % slower counts as equal:
cannot tell.
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
    flags.add_argument("--tokens", type=int, default=131072, help="tokens per call (default 131072)")
    flags.add_argument("--lengths", type=lambda s: [int(n) for n in s.split(",")], default=LENGTHS,
                       help="sequence lengths, separated by commas (default 1024,4096,16384,65536,131072)")
    flags.add_argument("--limit", type=float, default=30, help="longest expected softmax call, in seconds (default 30)")
    flags.add_argument("--passes", type=int, default=3, help="measurements of each point (default 3)")
    flags.add_argument("--out", default=OUT,
                       help="file to write the rows to (default experiments/results/length.jsonl)")
    flags.add_argument("--point", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.point:
        kind, sequences, length = args.point.split(",")
        print(json.dumps(measure(kind, int(sequences), int(length))))
        return
    if args.passes < 1:
        flags.error(f"--passes {args.passes}: must be at least 1")
    if uneven := [n for n in args.lengths if n < 1 or args.tokens < 1 or args.tokens % n]:
        flags.error(f"--lengths: {uneven[0]} does not divide --tokens {args.tokens:,}; change --lengths or --tokens")
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
    print_table(rows, args.lengths)
    print(f"{len(rows)} rows: {args.out}")


def measure(kind: str, sequences: int, length: int) -> dict:
    """Measures one point: seconds per call, tokens_per_s and peak_mib of a layer of this kind."""
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
    page_faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(12):                 # warm-up, until a call allocates almost no new memory
        before = page_faults()
        jax.block_until_ready(compiled(params, u_BTD))
        if page_faults() - before < 100:
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


def print_table(rows, lengths):
    """Prints a table of medians over the passes."""
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
