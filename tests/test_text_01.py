"""experiments/text_01.py: every pod and stage builds and fits its mesh, has the paper's settings, and trains at toy size."""
import itertools
import math
from pathlib import Path

import pytest

from mmx import cli
from mmx import mesh as meshes
from mmx.launch import experiments
from mmx.training import metrics

FILE = str(Path(__file__).parents[1] / "experiments" / "text_01.py")
CHIPS = {"v5p-512": 8 * 8 * 8, "v5p-2048": 8 * 16 * 16, "v6e-256": 16 * 16, "h100-512": 64 * 8}
STAGES = {"8k": (8192, 1e4, 11.4e12), "128k": (131_072, 5e6, 300e9), "512k": (524_288, 1e7, 32e9),
          "1m": (1_048_576, 1e7, 26e9)}
MIX = {"128k": (30, 70, 0), "512k": (35, 35, 30), "1m": (30, 30, 40)}
TOY = {"model.vocab": 264, "model.dim": 16, "model.layers": 2, "model.pattern": "LS", "model.heads": 2, "model.kv_heads": 1,
       "model.head_dim": 8, "model.rotary_dim": 4, "model.experts": 4, "model.expert_dim": 16, "model.dtype": "float32",
       "model.remat": False, "model.token_groups": 1, "train.batch": 2, "train.length": 32, "train.loss_chunk": 64,
       "train.ramp": "()", "train.tensorboard": False, "data.tokenizer": "bytes", "data.shards": 2, "mesh.edp": 1,
       "mesh.ep": 1, "mesh.seq": 1}


@pytest.mark.parametrize("pod, stage", list(itertools.product(CHIPS, STAGES)))
def test_every_pod_and_stage(pod, stage):
    e = experiments.read(f"{FILE}:{pod},{stage}", [])
    t, sizes = e.train, vars(e.mesh)
    assert math.prod(sizes.values()) == CHIPS[pod] and meshes.mesh_error(e, sizes) is None
    length, base, tokens = STAGES[stage]
    assert (t.length, e.model.rope_theta) == (length, base)
    ends = [count * t.batch * length for _, count in t.ramp]
    assert ends == ([2**24, 2**25, 2**26, 2**27] if stage == "8k" else [2**27])
    if stage != "8k":
        assert 0 <= t.steps * 2**27 - tokens < 2**27
        (begin, _), (reached, mix), (questions, same), (end, last) = e.data.weights
        assert e.data.interpolate and mix == same == (*MIX[stage], 0) and (begin, questions) == (0, t.steps * 4 // 5)
        assert 0 < reached < questions < end < t.steps
        assert last == (*(pytest.approx(0.9 * share) for share in MIX[stage]), 10)
        assert e.data.lengths[:3] == ((0, 32_768), (32_768, 131_073), (131_073, 0))


def test_stages_start_from_the_previous_stage():
    found = {stage: experiments.read(f"{FILE}:{stage}", []) for stage in STAGES}
    assert experiments.read(FILE, []) == found["8k"] == experiments.read(f"{FILE}:v5p-2048,8k", [])
    assert [e.train.init_from for e in found.values()] == ["", "8k", "128k", "512k"]
    assert [found[stage].data.weights[0][1] for stage in MIX] == [(100, 0, 0, 0), (30, 70, 0, 0), (35, 35, 30, 0)]


@pytest.mark.parametrize("argument", ["v5p", "v5p-512,2m"])
def test_unknown_arguments_are_one_line(argument, capsys):
    assert cli.main(["config", f"{FILE}:{argument}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == (f"mmx: {FILE}: '{argument.split(',')[-1]}' is neither a pod "
                                 "(v5p-512, v5p-2048, v6e-256, h100-512) nor a stage (8k, 128k, 512k, 1m)\n")


def test_two_stages_at_toy_size(tmp_path, monkeypatch, capsys):
    """The second stage starts from the parameters of the first, at twice the length and another RoPE base, and resumes."""
    monkeypatch.chdir(tmp_path)
    for folder, sizes in {"corpus": (20, 80, 300), "questions": (40,)}.items():
        (tmp_path / folder).mkdir()
        for n, size in itertools.product(range(9), sizes):
            (tmp_path / folder / f"{size}-{n}.txt").write_text(("The state of the Union is strong. " * 9)[:size])

    def train(stage, workdir, **overrides):
        flags = [f"--config.{key}={value}" for key, value in (TOY | overrides).items()]
        return cli.main(["train", "--config", f"{FILE}:{stage}", "--workdir", workdir, *flags])

    assert train("v5p-512", "8k", **{"train.steps": 20, "train.warmup": 2, "train.lr": 0.01, "train.rates": "((0,0.01),)"}) == 0
    later = {"train.length": 64, "data.lengths": "((0,40),(40,100),(100,0),(0,0))", "train.warmup": 1,
             "data.weights": "((0,(100,0,0,0)),(2,(30,70,0,0)),(4,(27,63,0,10)))"}
    assert train("128k,v5p-512", "128k", **later, **{"train.steps": 3}) == 0
    first, second = (metrics.read(tmp_path / workdir) for workdir in ("8k", "128k"))
    assert second[0]["step"] == 1 and second[0]["lr"] == 3e-5
    assert second[0]["loss"] < (first[0]["loss"] + first[-1]["loss"]) / 2
    assert train("128k,v5p-512", "128k", **later, **{"train.steps": 5}) == 0
    assert [r["step"] for r in metrics.read(tmp_path / "128k")] == [1, 2, 3, 4, 5]
    assert '"rope_theta": 5000000.0' in (tmp_path / "128k" / "config.json").read_text()
