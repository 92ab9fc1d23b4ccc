"""Accuracy on held-out documents, compared with a separate evaluation of each document."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx import config
from mmx.checkpoints.convert import load
from mmx.data import held_out
from mmx.evals import accuracy
from mmx.model import logits
from mmx.training.run import train

SOURCES = tuple(f"mqar:pairs={pairs},length={length},vocab=16,tokens=400,held={held}" for pairs, length, held in
                ((2, 8, 5), (2, 16, 3)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train(config.build({
        "model": {"vocab": 24, "dim": 8, "layers": 2, "pattern": "LS", "heads": 1, "kv_heads": 1, "head_dim": 8,
                  "rotary_dim": 4, "experts": 1, "top_k": 1, "expert_dim": 8, "embed_std": 1.0},
        "train": {"steps": 1, "batch": 2, "length": 18, "tensorboard": False, "warmup": 0, "lr": 0.1},
        "data": {"sources": SOURCES, "tokenizer": "numbers:16"}, "mesh": {"edp": 1}}), workdir)
    return workdir


def test_accuracy_equals_that_of_separate_documents(run):
    """A row of 18 contains two documents of 8. Tokens without a target and rows that only pad the batch do not count."""
    loaded = load(run)
    forward = jax.jit(lambda ids_T: logits(loaded.params, loaded.model.apply({"params": loaded.params}, ids_T[None])[0])[0])
    found, data = accuracy.measure(run), config.from_json((run / "config.json").read_text()).data
    assert list(found["by_source"]) == list(SOURCES)
    for source, documents in held_out.token_ids(data).items():
        correct, nats = [], []
        for ids_T, targets_T in documents:
            targets_at = np.flatnonzero(targets_T >= 0)
            logp_TW = jax.nn.log_softmax(forward(jnp.asarray(ids_T)))[targets_at]
            correct += (logp_TW.argmax(1) == targets_T[targets_at]).tolist()
            nats += (-logp_TW[np.arange(len(targets_at)), targets_T[targets_at]]).tolist()
        assert len(correct) == 2 * len(documents)
        assert found["by_source"][source] == pytest.approx({"loss": np.mean(nats), "accuracy": np.mean(correct)}, rel=1e-4)
    for name in ("loss", "accuracy"):       # sources have equal weight
        assert found[name] == pytest.approx(np.mean([found["by_source"][source][name] for source in SOURCES]))
