"""Loss by place, up to eight times the length of training, of the runs of experiments/rope_length.py.

    mmx sweep --config experiments/rope_length.py --out rope_length --jobs 6
    python experiments/measure/rope_length.py --run rope_length      # the sweep's rows and by_place: results/rope_length.jsonl

Held-out text in rows of 2,048 bytes, each read alone; nats a byte are means over bytes 0 to 255, 256 to 511, 512 to 1,023 ...
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
from mmx.data import packing, pipeline, tokens
from mmx.files import atomic
from mmx.launch import hugepages, sweep
from mmx.model import Model
from mmx.parallel.vocabulary import cross_entropy

OUT = Path(__file__).parents[1] / "results" / "rope_length.jsonl"
LENGTH, ROWS, BATCH = 2048, 64, 8


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--run", metavar="DIR", type=Path, required=True, help="what mmx sweep --out was given")
    flags.add_argument("--out", type=Path, default=OUT, help="the rows (default experiments/results/rope_length.jsonl)")
    args = flags.parse_args()
    found = sweep.collect(args.run).values()
    if not found:
        flags.error(f"--run {args.run} has no runs that ended: make them by mmx sweep --out {args.run}")
    rows = [row | {"by_place": by_place(load(args.run / "runs" / row["name"])) if row["loss"] is not None else None}
            for row in found]
    with atomic.replacing(args.out) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{len(rows)} rows: {args.out}")


@functools.cache
def text() -> list[dict]:
    """ROWS rows of held-out text from random places, in batches; most begin amid a document, as those of training do."""
    documents = [tokens.document(tokens.tokenizer("bytes"), raw, name) for name, raw in pipeline.validation(Data())]
    parts = [document[at:at + LENGTH + 1] for document in documents for at in range(0, len(document) - LENGTH, LENGTH)]
    order = np.random.default_rng(0).permutation(len(parts))[:ROWS]
    return [packing.stack(next(packing.rows(parts[n], LENGTH)) for n in some) for some in np.split(order, ROWS // BATCH)]


def by_place(loaded, trained: int = 256) -> dict[str, float]:
    """Mean nats a byte by how many bytes stand before it: below `trained`, then by octaves."""
    begins = [0, *(trained << n for n in range((LENGTH // trained).bit_length() - 1))]
    ends = [*begins[1:], LENGTH]
    found = [_nats(loaded.config, tuple(zip(begins, ends)), loaded.params, batch) for batch in text()]
    return {f"{begin}-{end - 1}": float(nats) for begin, end, nats in zip(begins, ends, np.mean(found, axis=0), strict=True)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _nats(c, spans, params, batch):
    """Of each span of places."""
    x_BTD, _, _ = Model(c).apply({"params": params}, batch["tokens"], batch["segments"], batch["positions"])
    return jnp.stack([cross_entropy(x_BTD[:, begin:end], params["head_WD"], batch["targets"][:, begin:end],
                                    jnp.ones((BATCH, end - begin)), BATCH * LENGTH).mean() / (end - begin)
                      for begin, end in spans])


if __name__ == "__main__":
    hugepages.restart(hugepages.BENCHMARK)
    main()
