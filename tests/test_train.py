"""The loop: a stopped run goes on to bit-equal parameters, and says each step once."""
import json

import jax
import numpy as np
import pytest

from mmx import cli, config, metrics, optim, train
from mmx.convert import load

TIMES = {"seconds", "tokens_per_s", "flops_per_s"}


@pytest.fixture
def experiment(tmp_path):
    (tmp_path / "text").mkdir()
    rng = np.random.default_rng(0)
    for name in "abcdefgh":
        words = rng.choice(["state ", "of ", "the ", "union ", "people "], 2000)
        (tmp_path / "text" / f"{name}.txt").write_text("".join(words))
    return config.build({
        "model": {"dim": 16, "layers": 2, "pattern": "LS", "heads": 2, "kv_heads": 1, "head_dim": 8, "rotary_dim": 4,
                  "experts": 4, "expert_dim": 16, "capacity": 1.0, "init": "fan_in", "embed_std": 1.0},
        "train": {"steps": 12, "batch": 4, "length": 32, "warmup": 2, "lr": 1e-2, "ramp": ((0, 1), (1024, 2))},
        "data": {"sources": (str(tmp_path / "text"),)}, "checkpoint": {"every": 5}, "mesh": {"edp": 2}})


def records(workdir):
    return [{k: v for k, v in r.items() if k not in TIMES} for r in metrics.read(workdir)]


def test_resumed_equals_uninterrupted(experiment, tmp_path, monkeypatch):
    train.run(experiment, tmp_path / "whole")
    whole = records(tmp_path / "whole")
    assert [r["step"] for r in whole] == list(range(1, 13))
    assert whole[-1]["loss"] < whole[0]["loss"]
    assert whole[-1]["tokens"] == optim.tokens_seen(experiment.train, 12)

    class CrashError(Exception):
        pass

    def crash(*args):
        if args[3] == 8:        # the record of step 8, past the checkpoint of step 5
            raise CrashError
        return report(*args)

    report = train._report
    monkeypatch.setattr(train, "_report", crash)
    with pytest.raises(CrashError):
        train.run(experiment, tmp_path / "parts")
    monkeypatch.setattr(train, "_report", report)
    assert records(tmp_path / "parts")[-1]["step"] == 7
    train.run(experiment, tmp_path / "parts")
    assert records(tmp_path / "parts") == whole
    a, b = (load(tmp_path / name).params for name in ("whole", "parts"))
    assert all((x == y).all() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize("override, message", [
    ("model.layrs=8", "did you mean model.layers"), ("model.layers=x", "model.layers=x"),
    ("model.pattern=LLLLS", "does not divide"), ("data.sources=('nowhere',)", "nowhere"), ("mesh.ep=2", "mesh.ep=2")])
def test_mistakes_are_one_line(override, message, tmp_path, capsys):
    code = cli.main(["train", "--config", "experiments/tiny.py", "--workdir", str(tmp_path / "w"), "--config.mesh.edp=2",
                     f"--config.{override}"])
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_published_counts(capsys):
    assert cli.main(["config", "experiments/text_01.py", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["params_total"] == 456_089_655_296
    assert counts["params_active"] == 45_944_920_064
    assert counts["params_active_all"] == 48_403_306_496
    assert counts["checkpoint_tensors"] == 8243
