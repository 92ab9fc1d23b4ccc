"""How many answers a model gives: held-out documents of ids, whose targets are met by the likeliest id or are not."""
import jax
import jax.numpy as jnp
import numpy as np

from mmx import config
from mmx.checkpoints import manager
from mmx.data import packing, pipeline
from mmx.model import logits

BATCH = 8       # rows at a time


def measure(path) -> dict:
    """Of a run's held-out documents of ids: nats a target, the share that is met, and both by source. Empty without any.

    Sources weigh alike, whatever they hold.
    """
    from mmx.checkpoints import convert  # here, for train imports this package

    workdir, _ = manager.find_step(path)
    experiment = config.build(manager.read_config(workdir))
    documents = pipeline.held_out_ids(experiment.data)
    if not documents:
        return {}
    loaded, t = convert.load(path), experiment.train

    @jax.jit
    def sums(params, row):
        x_BTD, _, _ = loaded.model.apply({"params": params}, row["tokens"], row["segments"], row["positions"])
        logits_BTW = logits(params, x_BTD)
        nats_BT = jax.nn.logsumexp(logits_BTW, axis=2) - jnp.take_along_axis(logits_BTW, row["targets"][..., None], 2)[..., 0]
        met_BT = logits_BTW.argmax(2) == row["targets"]
        return jnp.stack([jnp.sum(x * row["weights"]) for x in (nats_BT, met_BT)])

    by_source = {}
    for source, found in documents.items():
        rows = packing.Packed([ids for ids, _ in found], t.length, [targets for _, targets in found])
        total, count = np.zeros(2), 0.0
        for begin in range(0, len(rows), BATCH):
            row = packing.stack(rows[min(n, len(rows) - 1)] for n in range(begin, begin + BATCH))
            row["weights"][len(rows) - begin:] = 0
            total, count = total + sums(loaded.params, row), count + row["weights"].sum()
        by_source[source] = dict(zip(("loss", "accuracy"), (total / count).tolist()))
    means = {name: float(np.mean([found[name] for found in by_source.values()])) for name in ("loss", "accuracy")}
    return means | {"by_source": by_source}
