"""Measures the loss by place, up to eight times the training length, for the runs of experiments/rope_length.py.

    mmx sweep --config experiments/rope_length.py --out rope_length --jobs 6
    python experiments/measure/rope_length.py --run rope_length     # writes experiments/results/rope_length.jsonl

A row is the sweep's row with `by_place`: the mean loss in nats per byte over bytes 0 to 255, 256 to 511, 512 to 1,023 and
1,024 to 2,047 of held-out rows. Each row of text is read on its own.
"""
import argparse
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mmx.checkpoints.convert import load
from mmx.config import Data
from mmx.data import held_out, packing, tokens
from mmx.files import atomic
from mmx.launch import hugepages, sweep
from mmx.model import Model
from mmx.parallel.vocabulary import cross_entropy

OUT = Path(__file__).parents[1] / "results" / "rope_length.jsonl"
LENGTH, ROWS, BATCH = 2048, 64, 8


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--run", metavar="DIR", type=Path, required=True, help="the --out folder of the sweep")
    flags.add_argument("--out", type=Path, default=OUT,
                       help="file to write the rows to (default experiments/results/rope_length.jsonl)")
    args = flags.parse_args()
    found = sweep.collect(args.run).values()
    if not found:
        flags.error(f"--run {args.run} has no finished runs: create them with "
                    f"mmx sweep --config experiments/rope_length.py --out {args.run}")
    rows = [row | {"by_place": loss_by_place(load(args.run / "runs" / row["name"])) if row["loss"] is not None else None}
            for row in found]
    with atomic.replacing(args.out) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{len(rows)} rows: {args.out}")


@functools.cache
def held_out_batches() -> list[dict]:
    """ROWS rows of held-out text in batches. Most rows begin inside a document, like the rows of training."""
    documents = [tokens.document(tokens.tokenizer("bytes"), raw, name) for name, raw in held_out.validation(Data())]
    parts = [document[at:at + LENGTH + 1] for document in documents for at in range(0, len(document) - LENGTH, LENGTH)]
    order = np.random.default_rng(0).permutation(len(parts))[:ROWS]
    return [packing.stack(next(packing.rows(parts[n], LENGTH)) for n in some) for some in np.split(order, ROWS // BATCH)]


def loss_by_place(loaded, trained: int = 256) -> dict[str, float]:
    """{span of bytes: mean nats per byte}: the first `trained` bytes, then spans that double the number of bytes read."""
    begins = [0, *(trained << n for n in range((LENGTH // trained).bit_length() - 1))]
    ends = [*begins[1:], LENGTH]
    found = [_mean_losses(loaded.config, tuple(zip(begins, ends)), loaded.params, batch) for batch in held_out_batches()]
    return {f"{begin}-{end - 1}": float(nats) for begin, end, nats in zip(begins, ends, np.mean(found, axis=0), strict=True)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mean_losses(c, spans, params, batch):
    """The mean loss of a batch over each span of positions."""
    x_BTD, _, _ = Model(c).apply({"params": params}, batch["tokens"], batch["segments"], batch["positions"])
    return jnp.stack([cross_entropy(x_BTD[:, begin:end], params["head_WD"], batch["targets"][:, begin:end],
                                    jnp.ones((BATCH, end - begin)), BATCH * LENGTH).mean() / (end - begin)
                      for begin, end in spans])


if __name__ == "__main__":
    hugepages.restart(hugepages.BENCHMARK)
    main()
