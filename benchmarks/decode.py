"""Decode at batch 1, 8 and 32 beside transformers' generate, and time to first token of short prompts.

    python benchmarks/decode.py             # about 3 minutes on 2 cores

The 28 M-parameter model of benchmarks/vs_transformers.py, the same weights in both, each in its process, alternating;
greedy, behind 512 tokens a row. Bandwidth is that of a sum over 512 MB here; a step's bytes are the weights that its tokens
touch (of the experts the expected number, were routing uniform), read once, keys and values up to the row's length, and
states both ways. Short prompts of 7 to 300 tokens are read in the engine's levels, and once more padded to multiples of 256.
"""
import argparse
import statistics
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from vs_transformers import MODEL, STEPS, after, greedy, start, stock, timed

import mmx
from mmx.analysis import memory
from mmx.inference import engine
from mmx.launch import hugepages

BATCHES = 1, 8, 32
PROMPT = 512


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--rounds", type=int, default=5, help="alternating rounds, medians are shown (default 5)")
    flags.add_argument("--threads", type=int, default=2, help="torch's threads; XLA takes the cores it sees (default 2)")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stock().save_pretrained(folder)
        run = {side.__name__: start(side, folder, args.threads) for side in SIDES}
        cases = [*BATCHES, "levels", "padded"]
        times = {case: {side: [] for side in run if side == "ours" or case in BATCHES} for case in cases}
        for number in tqdm(range(args.rounds + 1), "rounds"):
            for case, sides in times.items():
                for side, kept in sides.items():
                    seconds = run[side](case)
                    if number:                                  # round 0 compiles and warms up
                        kept.append(seconds)
        bandwidth = run["ours"]("bandwidth")
    median = {case: {side: statistics.median(kept) for side, kept in sides.items()} for case, sides in times.items()}
    table = Table("batch", "transformers tokens/s", "mmx tokens/s", "mmx / transformers", "MB a step", "of bandwidth",
                  title=f"medians of {args.rounds} alternating rounds, torch {torch.__version__}, transformers "
                        f"{transformers.__version__}, jax {jax.__version__}; reads {bandwidth / 1e9:.1f} GB/s here")
    for batch in BATCHES:
        rates = {side: batch * STEPS / seconds for side, seconds in median[batch].items()}
        size = touched(batch)
        table.add_row(f"{batch}", f"{rates['theirs']:,.0f}", f"{rates['ours']:,.0f}", f"{rates['ours'] / rates['theirs']:.2f}",
                      f"{size / 1e6:.1f}", f"{size * rates['ours'] / batch / bandwidth:.0%}")
    Console().print(table)
    lengths = short_lengths()
    levels, padded = (sum(sum(f(n - 1)) for n in lengths) for f in (engine.chunk_sizes, pad))
    print(f"{len(lengths)} prompts of 7 to 300 tokens, {sum(lengths):,} in all: {levels:,} computed in levels, {padded:,} "
          f"padded to 256s, {1 - levels / padded:.0%} of the work saved; all read and first tokens drawn in "
          f"{median['levels']['ours']:.2f} s against {median['padded']['ours']:.2f} s")


def touched(batch: int) -> float:
    """Bytes that a step reads, and writes of states."""
    of = memory.footprint(MODEL)
    return 4 * memory.params_read(MODEL, batch) + batch * (of.sequence(PROMPT + STEPS / 2) + of.state)


def short_lengths() -> list[int]:
    return np.random.default_rng(0).integers(7, 301, 32).tolist()


def pad(count: int) -> list[int]:
    return [256] * -(-count // 256)


def prompts(batch: int, length: int = PROMPT):
    return np.random.default_rng(batch).integers(0, MODEL.vocab, (batch, length))


def theirs(folder, _):
    model = transformers.MiniMaxForCausalLM.from_pretrained(folder).float().eval()
    return {batch: after(greedy(model), prompts(batch)) for batch in BATCHES}


def ours(folder, _):
    loaded = mmx.load(folder)
    asked = [engine.Request(prompts(1, n)[0], 1) for n in short_lengths()]
    levels = engine.chunk_sizes

    def first_tokens(cut):
        engine.chunk_sizes = cut
        list(engine.stream(loaded, asked, rows=8))
        engine.chunk_sizes = levels

    def bandwidth():
        x, total = jnp.ones(1 << 27), jax.jit(jnp.sum)
        best = min(timed(lambda: total(x).block_until_ready())() for _ in range(8))
        return x.nbytes / best

    cases = {batch: after(lambda prompt_BT, count: mmx.generate(loaded, prompt_BT, steps=count), prompts(batch))
             for batch in BATCHES}
    return cases | {"levels": timed(lambda: first_tokens(levels)), "padded": timed(lambda: first_tokens(pad)),
                    "bandwidth": bandwidth}


SIDES = theirs, ours

if __name__ == "__main__":
    hugepages.restart(hugepages.BENCHMARK)
    main()
