"""Files that an earlier version saved still load, resume and continue with the same numbers.

Commit b8eceef wrote `tests/frozen` with jax 0.10.2 on a CPU; do not write it again. `workdir` is a run of CONFIG that a signal
stopped after STOPPED of its eight steps; `prefix.npz` is its model's prefilled prefix for PROMPT.
`expected.json` contains the losses of the uninterrupted run, logits of the stopped one, the tokens and log-probabilities that
it generates after the prefix, and the initial parameters of experiments/tiny.py at seed 0: a digest, and a few values of each.
A change that alters any of these values breaks users' checkpoints.
"""
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import mmx
from mmx import config
from mmx.checkpoints import convert
from mmx.inference import engine, prefix
from mmx.launch import experiments
from mmx.model import Model
from mmx.training import metrics, optim
from mmx.training.run import train
from mmx.training.step import init

FROZEN = Path(__file__).parent / "frozen"
EXPECTED = json.loads((FROZEN / "expected.json").read_text())
STOPPED = 4
PROMPT, QUESTION, STEPS = "the people of the union ", "and the state", 16
TOKENS_BT = np.arange(96).reshape(2, 48) * 5 % 256
CONFIG = {
    "model": {"dim": 32, "layers": 2, "pattern": "LS", "heads": 2, "kv_heads": 1, "head_dim": 16, "rotary_dim": 8, "experts": 4,
              "expert_dim": 32, "init": "fan_in", "embed_std": 1.0, "capacity": 1.25},
    "train": {"steps": 8, "batch": 4, "length": 64, "lr": 1e-2, "warmup": 2, "log_every": 1, "tensorboard": False},
    "data": {"sources": ["text"]},
    "checkpoint": {"every": 4},
    "mesh": {"edp": 1},
}


def digest(params) -> str:
    """A SHA-256 of the names, shapes, dtypes and bytes of a tree of arrays."""
    found = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        found.update(f"{jax.tree_util.keystr(path)}{x.shape}{x.dtype}".encode() + np.asarray(x).tobytes())
    return found.hexdigest()


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A copy of the frozen run. The current folder contains its data.sources=("text",)."""
    shutil.copytree(FROZEN, tmp_path / "frozen")
    monkeypatch.chdir(tmp_path / "frozen")
    return Path("workdir")


def test_a_frozen_workdir_loads(workdir):
    loaded = mmx.load(workdir)
    assert digest(loaded.params) == EXPECTED["params"]
    logits_BTW = mmx.forward(loaded, TOKENS_BT)
    np.testing.assert_allclose(np.asarray(logits_BTW)[:, ::12, :8], EXPECTED["logits"], rtol=0, atol=1e-4)


def test_a_frozen_run_resumes_like_the_uninterrupted_one(workdir):
    done = train(config.build(CONFIG), workdir)
    assert (done["step"], done["new"]) == (8, 8 - STOPPED)
    records = metrics.read(workdir)
    assert [record["step"] for record in records] == list(range(1, 9))
    np.testing.assert_allclose([record["loss"] for record in records], EXPECTED["losses"], rtol=1e-5)
    np.testing.assert_allclose([record["grad_norm"] for record in records], EXPECTED["grad_norms"], rtol=1e-4)


def test_a_frozen_prefix_continues(workdir):
    loaded = mmx.load(workdir)
    saved = prefix.load("prefix.npz", loaded)
    pieces = list(engine.stream(loaded, [engine.Request(QUESTION, STEPS)], prefix=saved))
    assert np.concatenate([piece.ids_T for piece in pieces]).tolist() == EXPECTED["ids"]
    np.testing.assert_allclose(np.concatenate([piece.logprobs_T for piece in pieces]), EXPECTED["logprobs"], rtol=0, atol=1e-4)
    recomputed = engine.make_prefix(loaded, PROMPT)
    for new, old in zip(jax.tree.leaves(recomputed), jax.tree.leaves(saved), strict=True):
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-4)


def test_a_frozen_workdir_survives_conversion_and_back(workdir):
    convert.to_hf(workdir, "hf", progress=False)
    convert.from_hf("hf", "back", progress=False)
    assert digest(mmx.load("back").params) == EXPECTED["params"]


def test_tiny_starts_with_the_same_parameters():
    e = experiments.read(str(FROZEN.parents[1] / "experiments" / "tiny.py"), [])
    params, _ = jax.jit(lambda: init(Model(e.model), optim.adamw(e.train), e.train))()
    leaves = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    assert {name: [list(x.shape), str(x.dtype)] for name, x in leaves.items()} == EXPECTED["tiny_shapes"]
    for name, x in leaves.items():
        np.testing.assert_allclose(np.ravel(x)[:4], EXPECTED["tiny_values"][name], rtol=1e-5, err_msg=name)
    if jax.__version__ == EXPECTED["jax"] and "optimization_level=0" in os.environ["XLA_FLAGS"]:
        assert digest(params) == EXPECTED["tiny"]       # other compilers differ in the last bits
