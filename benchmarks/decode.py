"""Compares decoding at batch sizes 1, 8 and 32 with transformers, and measures the time to first token of short prompts.

    python benchmarks/decode.py             # about 3 minutes on 2 cores

Both sides run the 28 M-parameter model of benchmarks/vs_transformers.py with the same weights, in separate processes, in
alternation. Decoding is greedy, after prompts of 512 tokens. The bandwidth of this machine is measured by a sum over 512 MB.
The bytes of a step are the weights that its tokens use (with uniform routing, the expected number of experts), the keys and
values up to the current length, and the states, read and written. Short prompts of 7 to 300 tokens are prefilled in the
engine's chunk sizes, and for comparison padded to multiples of 256.
"""
import argparse
import contextlib
import statistics
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from child import started
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from vs_transformers import MODEL, STEPS, cases_of, decode_seconds, greedy, stock, timed

import mmx
from mmx.analysis import memory
from mmx.inference import engine
from mmx.launch import hugepages

BATCHES = 1, 8, 32
PROMPT = 512


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--rounds", type=int, default=5, help="alternating rounds; prints medians (default 5)")
    flags.add_argument("--threads", type=int, default=2, help="threads of torch; XLA uses all visible cores (default 2)")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stock().save_pretrained(folder)
        run = {side.__name__: stack.enter_context(started(cases_of, side, folder, args.threads)) for side in SIDES}
        cases = [*BATCHES, "levels", "padded"]
        times = {case: {side: [] for side in run if side == "ours" or case in BATCHES} for case in cases}
        for number in tqdm(range(args.rounds + 1), "rounds"):
            for case, sides in times.items():
                for side, measured in sides.items():
                    seconds = run[side](case)
                    if number:                                  # round 0 compiles and warms up
                        measured.append(seconds)
        bandwidth = run["ours"]("bandwidth")
    median = {case: {side: statistics.median(measured) for side, measured in sides.items()} for case, sides in times.items()}
    table = Table("batch", "transformers tokens/s", "mmx tokens/s", "mmx / transformers", "MB per step", "share of bandwidth",
                  title=f"medians of {args.rounds} alternating rounds, torch {torch.__version__}, transformers "
                        f"{transformers.__version__}, jax {jax.__version__}; memory bandwidth {bandwidth / 1e9:.1f} GB/s")
    for batch in BATCHES:
        rates = {side: batch * STEPS / seconds for side, seconds in median[batch].items()}
        size = bytes_per_step(batch)
        table.add_row(f"{batch}", f"{rates['theirs']:,.0f}", f"{rates['ours']:,.0f}", f"{rates['ours'] / rates['theirs']:.2f}",
                      f"{size / 1e6:.1f}", f"{size * rates['ours'] / batch / bandwidth:.0%}")
    Console().print(table)
    lengths = short_lengths()
    levels, padded = (sum(sum(f(n - 1)) for n in lengths) for f in (engine.chunk_sizes, pad_to_256))
    print(f"{len(lengths)} prompts of 7 to 300 tokens, {sum(lengths):,} tokens in all. Prefill computes {levels:,} tokens in "
          f"chunks of several sizes, {padded:,} tokens with padding to 256: {1 - levels / padded:.0%} less. Time to the first "
          f"tokens: {median['levels']['ours']:.2f} s against {median['padded']['ours']:.2f} s")


def bytes_per_step(batch: int) -> float:
    """Bytes of memory traffic of a decoding step: weights, keys and values are read, states are read and written."""
    cache = memory.footprint(MODEL)
    return 4 * memory.params_read(MODEL, batch) + batch * (cache.sequence(PROMPT + STEPS / 2) + cache.state)


def short_lengths() -> list[int]:
    return np.random.default_rng(0).integers(7, 301, 32).tolist()


def pad_to_256(count: int) -> list[int]:
    return [256] * -(-count // 256)


def prompts(batch: int, length: int = PROMPT):
    return np.random.default_rng(batch).integers(0, MODEL.vocab, (batch, length))


def theirs(folder, _):
    model = transformers.MiniMaxForCausalLM.from_pretrained(folder).float().eval()
    return {batch: decode_seconds(greedy(model), prompts(batch)) for batch in BATCHES}


def ours(folder, _):
    loaded = mmx.load(folder)
    requests = [engine.Request(prompts(1, n)[0], 1) for n in short_lengths()]
    levels = engine.chunk_sizes

    def first_tokens(chunk_sizes):
        engine.chunk_sizes = chunk_sizes
        list(engine.stream(loaded, requests, rows=8))
        engine.chunk_sizes = levels

    def bandwidth():
        x, total = jnp.ones(1 << 27), jax.jit(jnp.sum)
        best = min(timed(lambda: total(x).block_until_ready())() for _ in range(8))
        return x.nbytes / best

    cases = {batch: decode_seconds(lambda prompt_BT, count: mmx.generate(loaded, prompt_BT, steps=count), prompts(batch))
             for batch in BATCHES}
    return cases | {"levels": timed(lambda: first_tokens(levels)), "padded": timed(lambda: first_tokens(pad_to_256)),
                    "bandwidth": bandwidth}


SIDES = theirs, ours

if __name__ == "__main__":
    hugepages.restart(hugepages.BENCHMARK)
    main()
