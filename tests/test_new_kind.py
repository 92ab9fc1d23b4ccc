"""A layer kind that is defined outside the package and registered in KINDS works in every command."""
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from average_kind import KIND

import mmx
from mmx import cli
from mmx.analysis.counts import count_params
from mmx.layers.kinds import KINDS
from mmx.model import empty_cache
from mmx.training import metrics

pytestmark = pytest.mark.usefixtures("compiled_once")
EXPERIMENT = """\
from mmx.config import default

def get_config():
    config = default()
    model, train = config.model, config.train
    model.dim, model.layers, model.pattern, model.heads, model.kv_heads, model.head_dim = 16, 4, "LA", 2, 1, 8
    model.rotary_dim, model.experts, model.expert_dim, model.init, model.embed_std = 4, 4, 16, "fan_in", 1.0
    train.steps, train.batch, train.length, train.lr, train.warmup = 20, 4, 32, 1e-2, 2
    train.tensorboard = False
    config.data.sources = ("text",)
    return config
"""


@pytest.fixture(scope="module", autouse=True)
def registered():
    KINDS["A"] = KIND
    yield
    del KINDS["A"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, registered):
    """A folder with the experiment, its text, and runs of 20 steps on one device ("one") and on a 2x2 mesh ("four")."""
    folder, rng = tmp_path_factory.mktemp("new"), np.random.default_rng(0)
    (folder / "new.py").write_text(EXPERIMENT)
    (folder / "text").mkdir()
    for name in "abcd":
        (folder / "text" / f"{name}.txt").write_text("".join(rng.choice(["state ", "of ", "the ", "union ", "people "], 400)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for workdir, mesh in (("one", ["--config.mesh.edp=1"]), ("four", ["--config.mesh.edp=2", "--config.mesh.ep=2"])):
            assert cli.main(["train", "--config", "new.py", "--workdir", workdir, *mesh]) == 0
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_training_is_the_same_on_one_device_and_on_four():
    one, four = ([record["loss"] for record in metrics.read(Path(workdir))] for workdir in ("one", "four"))
    assert len(one) == 20 and one[-1] < 0.8 * one[0]
    np.testing.assert_allclose(four, one, rtol=1e-4)


def test_generation_with_a_cache_equals_recomputation(capsys):
    capsys.readouterr()
    command = ["generate", "--checkpoint", "one", "--prompt", "the state", "--steps", "12", "--temperature", "0", "--json"]
    assert cli.main(command) == 0
    found, loaded = json.loads(capsys.readouterr().out), mmx.load("one")
    prompt = [256, *b"the state"]       # 256: beginning of text
    logits_BTW = np.asarray(mmx.forward(loaded, np.array([prompt + found["ids"]])))
    assert np.argmax(logits_BTW[0, len(prompt) - 1:-1], axis=-1).tolist() == found["ids"]
    # The most likely ids may survive a wrong cache, so hidden states after a prefill of 8 tokens and one decoded token too.
    apply = jax.jit(lambda ids, cache: loaded.model.apply({"params": loaded.params}, ids, jnp.ones_like(ids), cache=cache)[:2])
    tokens_BT = jnp.array([prompt[:9]])
    expected_BTD, _ = apply(tokens_BT, None)
    _, cache = apply(tokens_BT[:, :8], empty_cache(loaded.config, 1, 16))
    x_BTD, _ = apply(tokens_BT[:, 8:], cache)
    np.testing.assert_allclose(x_BTD[:, 0], expected_BTD[:, 8], atol=3e-5)


def test_packed_documents_equal_separate_ones():
    loaded, (a_T, b_T) = mmx.load("one"), (np.arange(9) + 97, np.arange(7) + 105)
    packed_BTW = mmx.forward(loaded, np.concatenate([a_T, b_T])[None], np.array([[1] * 9 + [2] * 7]))
    for part, alone_T in ((packed_BTW[0, :9], a_T), (packed_BTW[0, 9:], b_T)):
        np.testing.assert_allclose(part, mmx.forward(loaded, alone_T[None])[0], atol=1e-4)


def test_config_and_memory_count_the_new_kind(capsys):
    assert cli.main(["config", "new.py", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    loaded = mmx.load("one")
    created = sum(x.size for x in jax.tree.leaves(loaded.params))
    assert found["params_total"] == created == count_params(loaded.config).total and found["flops_per_token_companion"] is None
    assert cli.main(["config", "new.py"]) == 0
    assert "4 = 2 x LA" in capsys.readouterr().out
    assert cli.main(["memory", "--config", "new.py", "--lengths", "1k", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"]["model"]
    assert found["state"] == 2 * (2 * 8 * 8 + 2 * 8) * 4 and found["cache_per_token"] == 0


def test_conversion_is_refused_in_one_line(capsys):
    assert cli.main(["convert", "to-hf", "--checkpoint", "one", "--out", "hf"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and not Path("hf").exists()
    assert "layers of kind A (decayed average) have no released form and cannot be converted" in err


@pytest.mark.parametrize("command", [["train", "--workdir", "unknown"], ["memory"]])
def test_an_unknown_letter_is_refused_before_anything_is_written(command, capsys):
    before = sorted(Path().iterdir())
    assert cli.main([*command, "--config", "new.py", "--config.model.pattern=LX"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("mmx: model.pattern: 'X' is not a layer kind; known: L (lightning attention), S (softmax attention)")
    assert out == "" and err.count("\n") == 1 and sorted(Path().iterdir()) == before
