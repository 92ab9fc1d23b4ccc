"""The search for a mesh: the cost model compared with compiled programs, and the command."""
import json
from pathlib import Path

import pytest

from mmx import cli
from mmx.analysis.counts import flops_training
from mmx.chips import CHIPS
from mmx.compilers import aot, schedule, search
from mmx.launch import experiments

TEXT_01 = str(Path(__file__).parent.parent / "experiments" / "text_01.py")
needs_compiler = pytest.mark.skipif(bool(schedule.missing()), reason=schedule.missing())
FULL = ["--config.train.batch=512", "--config.model.transport=1.25", "--config.model.token_groups=8",
        "--config.train.loss_chunk=524288"]


@pytest.mark.parametrize("flags, peak, all_to_all", [([], 55.6, 98), (["--config.model.keep_arrived=True"], 84.3, 78)])
def test_the_full_size_as_it_was_compiled(flags, peak, all_to_all):
    """The cost model is near the figures of docs/scale.md: 456 B on 512 v5p."""
    sizes = {"slice": 1, "edp": 16, "ep": 32, "etp": 1, "seq": 1}
    e = experiments.read(TEXT_01, FULL + flags)
    found = search.estimate(e, sizes, "v5p", [8, 8, 8], "train")
    received = {(row["kind"], row["axes"]): row["bytes"] / 1e9 for row in found["exchanges"]}
    assert received["all-gather", "edp"] == pytest.approx(126, rel=0.02)
    assert received["reduce-scatter", "edp"] == pytest.approx(65, rel=0.02)
    assert received["all-to-all", "ep"] == pytest.approx(all_to_all, rel=0.02)
    model = flops_training(e.model, 8192) * 8192 / CHIPS["v5p"].peak
    assert found["compute_s"] / model == pytest.approx(1.474, rel=0.08)       # the compiled program, without splash attention
    assert 0.7 < found["peak"] / peak / 1e9 < 1
    assert found["seconds"] == found["compute_s"] + found["exposed_s"]


@pytest.mark.parametrize("mode, sizes, part, size", [
    # for each row the states of 70 layers in float32, and keys and values of 10 layers in bfloat16, also split by time
    ("prefill", {"edp": 4, "seq": 2}, "cache", 2 * (70 * 64 * 128 * 128 * 4 + 10 * 2 * 8 * 8192 // 2 * 128 * 2)),
    # 456,089,655,296 parameters in bfloat16; norms and routers are not sharded
    ("decode", {"ep": 8}, "state", 456_089_655_296 * 2 / 8)])
def test_memory_of_inference(mode, sizes, part, size):
    e = experiments.read(TEXT_01, ["--config.train.batch=8"])
    sizes = {"slice": 1, "edp": 1, "ep": 1, "etp": 1, "seq": 1} | sizes
    found = search.estimate(e, sizes, "v5p", [2, 2, 2], mode)["memory"]
    assert found[part] == pytest.approx(size, rel=1e-3)
    assert found["gradients"] == found["saved"] == 0


def test_prefill_reads_a_chunk_after_a_full_cache():
    """The cache grows with the length, temporary memory does not. The chunk is exchanged with all parts of the cache."""
    sizes = {"slice": 1, "edp": 1, "ep": 2, "etp": 4, "seq": 2}
    short, e = (experiments.read(TEXT_01, ["--config.train.batch=2", f"--config.train.length={length}"])
                for length in (8192, 1 << 20))
    short, long = (search.estimate(e, sizes, "v5p", [2, 2, 4], "prefill") for e in (short, e))
    keys = 2 * 10 * 2 * 8 * 128 * 2 / 16        # bytes per token on each of 16 devices, for two rows and ten layers
    assert long["memory"]["cache"] - short["memory"]["cache"] == keys * ((1 << 20) - 8192)
    assert long["memory"]["work"] == short["memory"]["work"] and long["compute_s"] > short["compute_s"]
    received = {(row["kind"], row["axes"]): row for row in long["exchanges"]}
    decode = search.estimate(e, sizes, "v5p", [2, 2, 4], "decode")["exchanges"]
    weights = sum(row["bytes"] for row in decode if (row["kind"], row["axes"]) == ("all-gather", "seq"))
    part = 10 * 2048 // 2 * 128                 # elements of one head and row in ten layers, on one of two devices along time
    assert received["all-gather", "seq"]["bytes"] - weights == part * (16 + 2 * 2) * 2
    assert received["reduce-scatter", "seq"]["bytes"] == part * 16 * 4
    assert received["all-to-all", "ep"]["overlapped"] == 0


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
SMALL = [f"--config.{key}" for key in ("model.dim=256", "model.expert_dim=512", "model.heads=2", "model.kv_heads=2",
                                       "train.length=1024")]


@pytest.fixture
def experiment(tmp_path):
    (tmp_path / "small.py").write_text(EXPERIMENT)
    return str(tmp_path / "small.py")


def test_estimates_rank_meshes_like_the_compiler(experiment):
    """`compiled`: GB at peak and ms per step (static estimate plus exchanges), by libtpu 0.0.42.1 for meshes of v5p:2x2x1."""
    compiled = {"ep=4": (0.436, 3.285), "ep=2,etp=2": (0.472, 4.079), "edp=2,ep=2": (0.447, 4.142),
                "ep=2,seq=2": (0.450, 4.355), "edp=2,etp=2": (0.475, 4.881), "etp=2,seq=2": (0.480, 4.973),
                "etp=4": (0.545, 5.049), "edp=4": (0.544, 5.170), "edp=2,seq=2": (0.492, 5.404), "seq=4": (0.554, 5.447)}
    e = experiments.read(experiment, [])
    found = {search.format_mesh(sizes): search.estimate(e, sizes, "v5p", [2, 2, 1], "train")
             for sizes in search.candidates(e, 4, 1)}
    assert sorted(found, key=lambda name: found[name]["seconds"]) == list(compiled)
    for name, (peak, _) in compiled.items():
        assert 0.85 < found[name]["peak"] / peak / 1e9 < 1.3, name


@needs_compiler
def test_the_best_mesh_is_compiled(experiment, tmp_path, capfd):
    assert cli.main(["aot", "--config", experiment, "--topology", "v5p:2x2x1", "--search", "--best", "1", "--json",
                     "--out", str(tmp_path), *SMALL]) == 0
    found = json.loads(capfd.readouterr().out)
    best, *others = found["meshes"]
    model, compiled = best["model"], best["compiled"]
    assert not any("compiled" in row for row in others) and compiled["fits"] and compiled["mesh"] == best["mesh"]
    assert 0.7 < model["peak"] / compiled["peak"] < 1.3
    assert model["compute_s"] == pytest.approx(compiled["flops"] / CHIPS["v5p"].peak, rel=0.1)
    sums = [sum(row["bytes"] for row in report["exchanges"]) for report in (model, compiled)]
    assert sums[0] == pytest.approx(sums[1], rel=0.05)
    assert compiled["total_s"] > compiled["static_s"]
    assert Path(found["plot"]).stat().st_size > 10_000


def test_meshes_that_do_not_compile_are_listed(monkeypatch, tmp_path, capsys):
    """One program needs too much memory; the compiler fails on the other."""
    results = iter([{"fits": False, "peak": 2e11}, RuntimeError("INTERNAL: a fault\nand where")])

    def run(*args):
        if isinstance(result := next(results), Exception):
            raise result
        return result
    monkeypatch.setattr(aot, "describe_pod", lambda topology, slices: aot.Pod(topology, slices, "v5p", [8, 8, 8],
                                                                             range(512 * slices)))
    monkeypatch.setattr(aot, "run", run)
    assert cli.main(["aot", "--config", TEXT_01, "--topology", "v5p:8x8x8", "--slices", "2", "--search", "--best", "2",
                     "--out", str(tmp_path), *FULL]) == 0
    out = capsys.readouterr().out
    assert "200.0 does not fit" in out and "INTERNAL: a fault" in out and "and where" not in out
    assert out.count("slice=2,") == search.TABLE_ROWS


@pytest.mark.parametrize("flags, message", [
    (["--mesh", "edp=4"], "--mesh edp=4 cannot be combined with --search, which chooses the mesh"),
    (["--best", "0"], "--best 0 must be at least 1"),
    (["--slices", "0"], "--slices 0 must be at least 1"),
    pytest.param(["--config.train.batch=3", "--config.train.length=11"],
                 "no mesh of 1 x 4 devices can shard the experiment. "
                 "For example edp=4: train.batch=3 must be divisible by mesh.edp=4",
                 marks=needs_compiler)])
def test_an_invalid_argument_is_explained_in_one_line(experiment, capfd, flags, message):
    assert cli.main(["aot", "--config", experiment, "--topology", "v5p:2x2x1", "--search", *flags]) == 2
    out, err = capfd.readouterr()
    assert out == "" and message in err.splitlines()[-1]
