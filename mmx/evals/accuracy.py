"""Loss and accuracy on held-out documents of token ids: how many targets are the model's likeliest next id."""
import jax
import jax.numpy as jnp
import numpy as np

from mmx import config
from mmx.checkpoints import convert, finite, manager, run_config
from mmx.data import encoding, held_out, packing
from mmx.model import logits

BATCH = 8       # rows


def measure(path) -> dict:
    """Evaluates a run on the validation documents of its sources of token ids.

    Returns:
      "loss" (nats per target), "accuracy" (fraction of targets), and "by_source" with both for each source. The totals are
      unweighted means over the sources. Empty if the run has no such source.
    """
    workdir, _ = manager.find_step(path)
    experiment = config.build(run_config.read_config(workdir))
    documents = held_out.token_ids(experiment.data, encoding.image_options(experiment))
    if not documents:
        return {}
    loaded, t = convert.load(path), experiment.train

    @jax.jit
    def sums(params, row):
        x_BTD, _, _ = loaded.model.apply({"params": params}, row["tokens"], row["segments"], row["positions"])
        logits_BTW = logits(params, x_BTD)
        nats_BT = jax.nn.logsumexp(logits_BTW, axis=2) - jnp.take_along_axis(logits_BTW, row["targets"][..., None], 2)[..., 0]
        correct_BT = logits_BTW.argmax(2) == row["targets"]
        return jnp.stack([jnp.sum(x * row["weights"]) for x in (nats_BT, correct_BT)])

    by_source = {}
    for source, pairs in documents.items():
        rows = packing.Packed(packing.Documents(*zip(*pairs)), t.length)
        total, count = np.zeros(2), 0.0
        for begin in range(0, len(rows), BATCH):
            row = packing.stack(rows[min(n, len(rows) - 1)] for n in range(begin, begin + BATCH))
            row["weights"][len(rows) - begin:] = 0
            total, count = total + sums(loaded.params, row), count + row["weights"].sum()
        finite.check(total, loaded.params, "the loss")
        by_source[source] = dict(zip(("loss", "accuracy"), (total / count).tolist()))
    means = {name: float(np.mean([scores[name] for scores in by_source.values()])) for name in ("loss", "accuracy")}
    return means | {"by_source": by_source}
