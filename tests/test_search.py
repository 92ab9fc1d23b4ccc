"""The search for a mesh: the model against what the compiler said, and the command."""
import json
from pathlib import Path

import pytest

from mmx import aot, cli, search
from mmx.compilers import schedule

TEXT_01 = str(Path(__file__).parent.parent / "experiments" / "text_01.py")
FULL = ["--config.train.batch=512", "--config.model.transport=1.25", "--config.model.token_groups=8",
        "--config.train.loss_chunk=524288"]


@pytest.mark.parametrize("more, peak, all_to_all", [([], 55.6, 98), (["--config.model.keep_arrived=True"], 84.3, 78)])
def test_the_full_size_as_it_was_compiled(more, peak, all_to_all):
    """docs/scale.md: 456 B on 512 v5p."""
    sizes = {"slice": 1, "edp": 16, "ep": 32, "etp": 1, "seq": 1}
    e = cli.read_experiment(TEXT_01, FULL + more)
    found = search.estimate(e, sizes, "v5p", [8, 8, 8], "train")
    received = {(row["kind"], row["axes"]): row["bytes"] / 1e9 for row in found["exchanges"]}
    assert received["all-gather", "edp"] == pytest.approx(126, rel=0.02)
    assert received["reduce-scatter", "edp"] == pytest.approx(65, rel=0.03)
    assert received["all-to-all", "ep"] == pytest.approx(all_to_all, rel=0.02)
    model = e.model.flops_training(8192) * 8192 / aot.CHIPS["v5p"].peak
    assert found["compute_s"] / model == pytest.approx(1.474, rel=0.05)
    assert found["peak"] == pytest.approx(peak * 1e9, rel=0.25)
    assert found["seconds"] == found["compute_s"] + found["rest_s"]


EXPERIMENT = """\
from mmx.config import default

def get_config():
    config = default()
    model, train = config.model, config.train
    model.vocab, model.dim, model.layers, model.pattern = 4096, 1024, 1, "L"
    model.heads, model.kv_heads, model.head_dim, model.rotary_dim = 8, 4, 128, 64
    model.experts, model.expert_dim, model.capacity, model.transport = 8, 2048, 1.25, 1.25
    model.dtype, model.remat = "bfloat16", True
    train.batch, train.length = 4, 2048
    return config
"""


@pytest.fixture
def experiment(tmp_path):
    (tmp_path / "small.py").write_text(EXPERIMENT)
    return str(tmp_path / "small.py")


@pytest.mark.skipif(bool(schedule.missing()), reason=schedule.missing())
def test_the_compiler_agrees(experiment, tmp_path, capfd):
    """The order of memory and of time, and memory to a fifth."""
    assert cli.main(["aot", "--config", experiment, "--topology", "v5p:2x2x1", "--search", "--best", "3", "--json",
                     "--out", str(tmp_path)]) == 0
    found = json.loads(capfd.readouterr().out)
    rows = [row for row in found["meshes"] if "compiled" in row]
    assert rows == found["meshes"][:3] and all(row["compiled"]["fits"] for row in rows)
    model, compiled = ([row[who] for row in rows] for who in ("model", "compiled"))
    for m, c in zip(model, compiled):
        assert m["peak"] == pytest.approx(c["peak"], rel=0.2)
    assert_same_order([m["peak"] for m in model], [c["peak"] for c in compiled])
    assert_same_order([m["seconds"] for m in model], [c["total_s"] for c in compiled])
    assert Path(found["plot"]).stat().st_size > 10_000


def assert_same_order(a, b):
    assert sorted(range(len(a)), key=a.__getitem__) == sorted(range(len(b)), key=b.__getitem__), (a, b)


@pytest.mark.parametrize("more, message", [
    (["--mesh", "edp=4"], "--mesh edp=4 names the mesh that --search looks for: give one of them"),
    (["--best", "0"], "--best 0 compiles nothing: it must be at least 1"),
    pytest.param(["--config.train.batch=3", "--config.train.length=11", "--config.model.heads=6"],
                 "no mesh of 1 x 4 devices splits the experiment, say edp=4: train.batch=3 does not split over mesh.edp=4",
                 marks=pytest.mark.skipif(bool(schedule.missing()), reason=schedule.missing()))])
def test_what_cannot_be_is_one_line(experiment, capfd, more, message):
    assert cli.main(["aot", "--config", experiment, "--topology", "v5p:2x2x1", "--search", *more]) == 2
    out, err = capfd.readouterr()
    assert out == "" and message in err.splitlines()[-1]
