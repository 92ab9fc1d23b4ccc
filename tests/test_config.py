"""Configs: what is counted agrees with what is built; mistakes are named."""
import dataclasses
import math
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from mmx import config
from mmx.checkpoints import hf_layout
from mmx.config import ConfigError, Model, build
from mmx.launch import experiments

EXPERIMENTS = sorted((Path(__file__).parent.parent / "experiments").glob("*.py"))
LADDER = str(Path(__file__).parent.parent / "experiments" / "ladder.py")
SHAPES = [Model(), Model(pattern="S", layers=3, heads=5, kv_heads=5, head_dim=6, rotary_dim=2, experts=3, expert_dim=7),
          Model(pattern="LLS", layers=6, dim=20, heads=6, kv_heads=1, experts=4, top_k=3, vocab=31),
          Model(pattern="LS", layers=2, dim=20, vision=config.Vision(2, 12, 3, 16, 28, 7, token=260))]


@pytest.mark.parametrize("model", SHAPES, ids=["default", "softmax", "mixed", "vision"])
def test_counts_are_those_of_the_leaves(model):
    leaves = hf_layout.leaves(model)
    sizes = {leaf.path: math.prod(leaf.shape) for leaf in leaves}
    text = {path: size for path, size in sizes.items() if path[0] != "vision"}
    assert model.params_total == sum(sizes.values()) == sum(text.values()) + model.params_vision
    idle = sum(size for path, size in sizes.items() if path[-1][:2] in ("w1", "w2", "w3"))
    assert model.params_active_all == sum(text.values()) - idle * (model.experts - model.top_k) // model.experts
    assert model.params_active == model.params_active_all - sizes[("embed_WD",)] - sizes[("head_WD",)]
    assert model.checkpoint_tensors == len({name for leaf in leaves for _, name in leaf.tensors()})


def test_flops_by_hand():
    m = Model(vocab=10, dim=4, layers=2, pattern="LS", heads=2, kv_heads=1, head_dim=3, rotary_dim=2, experts=3, top_k=2,
              expert_dim=5)
    lightning = 5 * 4 * 6 + 2 * (3 * 3 + 3 * 3)         # q, k, v, gate, out; the state's update and reading, two heads
    softmax = 2 * 4 * 6 + 2 * 4 * 3 + 2 * 2 * 3 * 4     # q, out; k, v; scores and values of the mean of 1..7 keys
    moe = 4 * 3 + 2 * 3 * 4 * 5
    assert m.flops_forward(7) == 2 * (lightning + softmax + 2 * moe + 4 * 10)
    assert m.flops_training(7) == 3 * m.flops_forward(7)


TEXT_01 = Model(vocab=200_064, dim=6_144, layers=80, heads=64, kv_heads=8, head_dim=128, rotary_dim=64, experts=32,
                expert_dim=9_216)


def test_flops_of_the_released_model_at_a_million_tokens():
    """Forward: scores of ten softmax layers 172 GF, of eighty 1,374 GF; matrices without the head 91.9 GF."""
    def scores(model):
        return model.flops_forward(1_048_576) - model.flops_forward(0)
    softmax_1, lightning = 10 * 2 * 8192, 70 * 4 * 8192 * 128
    rest = TEXT_01.flops_forward(0) - softmax_1 - lightning - 2 * TEXT_01.vocab * TEXT_01.dim
    assert (scores(TEXT_01), rest) == (pytest.approx(172e9, rel=0.01), pytest.approx(91.9e9, rel=0.01))
    assert scores(dataclasses.replace(TEXT_01, pattern="S")) == pytest.approx(1374e9, rel=0.01)


@pytest.mark.parametrize("length", [1, 6, 7, 100])
def test_a_window_costs_the_keys_that_are_seen(length):
    def flops(pattern):
        return config.Model(layers=1, pattern=pattern, window=6).flops_forward(length)
    def seen(most):
        return sum(min(t + 1, most) for t in range(length)) / length
    assert flops("S") - flops("W") == pytest.approx(4 * 8 * 32 * (seen(length) - seen(6)), abs=1e-3)


PRINTED = {     # PFLOPs of a step of 480 x 8,192 tokens: arXiv 2406.16690, Table 7, whose LLaMA and TNL are the paper's
    "softmax": (1.6, 5.6, 18.0, 40.4, 99.6, 202.7), "lightning": (0.5, 2.2, 7.9, 22.3, 66.6, 154.4)}


@pytest.mark.parametrize("arch", PRINTED)
def test_flops_as_the_companion_paper_prints_them(arch):
    sizes = ("70M", "160M", "410M", "1B", "3B", "7B")
    found = [experiments.read(f"{LADDER}:{arch},{size}", []).model.flops_companion(8192) * 480 * 8192 for size in sizes]
    assert tuple(round(flops / 1e15, 1) for flops in found) == PRINTED[arch]


def test_companion_flops_of_the_hybrid_and_of_experts():
    n, model = 8192, Model(layers=8, dim=512, heads=4, experts=1, top_k=1)
    table_1 = 72 * 8 * 512**2 * (1 + n / (48 * 512) + 7 / (16 * 4) + 5 / (18 * 512))       # the paper's hybrid row
    assert model.flops_companion(n) == pytest.approx(table_1, rel=1e-12)
    moe = dataclasses.replace(model, experts=4, top_k=2, expert_dim=512)
    more = 6 * 8 * (2 * 3 * 512**2 + 4 * 512 - 8 * 512**2)
    assert moe.flops_companion(n) - model.flops_companion(n) == pytest.approx(more, rel=1e-9)


@pytest.mark.parametrize("size, params", [("70M", 20.5), ("160M", 85.0), ("410M", 334.1), ("1B", 906.2), ("3B", 2775.8),
                                          ("7B", 6476.5)])
def test_the_published_ladder_has_the_published_parameters(size, params):
    found = experiments.read(f"{LADDER}:softmax,{size}", []).model.params_active / 1e6
    assert found == pytest.approx(params, abs=0.11)        # with a router row a layer, which the dense models there have not


def test_released_memory_horizons():
    """1 / slope, in tokens, of heads 0, 31 and 63."""
    for layer, horizons in ((0, (1.1, 16, 256)), (39, (2.2, 32, 506)), (70, (9.6, 140, 2247)), (78, (86, 1263, 20208))):
        assert [-1 / TEXT_01.log_decay[layer][head] for head in (0, 31, 63)] == pytest.approx(horizons, rel=0.03)
    assert TEXT_01.alpha_moe == 3.5565588200778455


def test_slopes_where_heads_are_no_power_of_two():
    assert config.alibi_slopes(4) == [2**-2, 2**-4, 2**-6, 2**-8]
    assert config.alibi_slopes(3) == [2**-4, 2**-8, 2**-2]
    assert config.alibi_slopes(6) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    first, last = Model(layers=2, pattern="L", heads=3).log_decay
    assert first == pytest.approx([-s * (1 + 1e-5) for s in (2**-4, 2**-8, 2**-2)])
    assert last == pytest.approx([-s * 1e-5 for s in (2**-4, 2**-8, 2**-2)])


def test_alphas_follow_the_layers_unless_they_are_given():
    found = build({"model": {"layers": 4, "pattern": "LS", "alpha_moe": 1.0}}).model
    assert (found.alpha_lightning, found.alpha_softmax, found.alpha_moe) == (8**0.25, 8**0.25, 1.0)
    assert config.default().model.alpha_moe == 0        # still open: an override of model.layers moves it


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_json_restores_each_experiment(path):
    experiment = experiments.read(str(path), [])
    assert config.from_json(config.to_json(experiment)) == experiment
    assert hash(experiment.model) == hash(dataclasses.replace(experiment.model))


def test_a_window_comes_back_and_one_that_is_the_default_is_not_told():
    for window in (256, 32):
        experiment = build({"model": {"layers": 8, "window": window}})
        assert config.from_json(config.to_json(experiment)) == experiment
        assert ("window" in config.sections(experiment)["model"]) == (window != 256)


def test_lengths():
    assert config.lengths("512,1k, 128K,1M,4m,1024") == [512, 1024, 131_072, 2 ** 20, 2 ** 22]


@pytest.mark.parametrize("text", ["", "0", "8k,", "1.5k", "4x", "-1", "8kk", "k"])
def test_lengths_that_are_none(text):
    with pytest.raises(ConfigError, match=f"--lengths {text!r} does not parse: give tokens with commas, as 512,1k,4M"):
        config.lengths(text)


def test_defaults_stand_in_one_place():
    assert build(config.default()) == build({}) == config.Experiment()


def test_vision_is_a_section_of_the_model():
    """What is not given is the released model's; a config of before there was any reads as one of text alone."""
    assert build({"model": {"vision": {"layers": 24}, "vocab": 200_064}}).model.vision == config.Vision(layers=24)
    assert build({"model": {"dim": 64}}).model == Model(dim=64) and not Model().vision.layers
    experiment = build({"model": {"vision": {"layers": 2, "grids": [[1, 2]], "token": 259}}})
    assert config.from_json(config.to_json(experiment)) == experiment and experiment.model.vision.grids == ((1, 2),)
    file = Path(__file__).parent.parent / "experiments" / "tiny.py"
    found = experiments.read(str(file), ["--config.model.vision.layers=3", "--config.model.vision.token=260"])
    assert (found.model.vision.layers, found.model.vision.token, found.model.vision.dim) == (3, 260, 1024)


def test_the_released_vision_by_hand():
    """303 M in the ViT, 44 M in the projector (model.md section 8)."""
    v = config.Vision(layers=24)
    layer = 4 * (1024 ** 2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    assert v.params == 24 * layer + 1024 * (3 * 14 * 14 + 577 + 1 + 2) == 303_505_408
    assert v.params_projector(6144) == 1024 * 6144 + 6144 + 6144 * 6144 + 6144 + 6144 and v.checkpoint_tensors == 394


def test_what_is_bent_and_what_is_not():
    found = build(ConfigDict({"train": {"lr": 1, "ramp": [[0, 1], [100, 2]]}})).train
    assert type(found.lr) is float and found.ramp == ((0, 1), (100, 2))


@pytest.mark.parametrize("section, values, message", [
    ("modle", {}, "did you mean model?"),
    ("model", {"head": 4}, "unknown config key model.head; did you mean heads?"),
    ("model", {"zzz": 4}, "unknown config key model.zzz; known: vocab, dim"),
    ("model", 3, "config.model must be a section, got 3"),
    ("model", {"dim": 64.0}, "config key model.dim needs int, got 64.0"),
    ("model", {"dim": True}, "config key model.dim needs int, got True"),
    ("model", {"dtype": None}, "config key model.dtype needs str, got None"),
    ("model", {"vision": 3}, "config.model.vision must be a section, got 3"),
    ("model", {"vision": {"layer": 3}}, "unknown config key model.vision.layer; did you mean layers?"),
    ("model", {"vision": {"layers": -1}}, "model.vision.layers=-1 must be positive, or 0 for text alone"),
    ("model", {"vision": {"layers": 1}}, "model.vision.token=200025 is no id of model.vocab=264"),
    ("model", {"vision": {"heads": 3}}, "model.vision.heads=3 does not divide model.vision.dim=1024"),
    ("model", {"vision": {"patch": 5}}, "model.vision.patch=5 does not divide model.vision.tile=336"),
    ("model", {"vision": {"grids": ((1, 2), 3)}}, "must be pairs of positive rows and columns"),
    ("train", {"lr": math.nan}, "needs a finite number"),
    ("model", {"dim": 0}, "model.dim=0 must be positive"),
    ("model", {"chunk": -1}, "model.chunk=-1 must be at least 1"),
    ("model", {"rope_theta": 0.0}, "model.rope_theta=0.0 must be positive"),
    ("train", {"seed": 2 ** 33}, "must be from 0 to"),
    ("train", {"beta1": 2.0}, "train.beta1=2.0 must be from 0 to below 1"),
    ("data", {"weights": (("a", (1,)),)}, "needs (step, one weight a source) pairs"),
    ("data", {"weights": ((0, ("a",)),)}, "needs (step, one weight a source) pairs"),
    *(("data", {"weights": ((0, (1,)), (3, (weight,)))}, "from step 3: weights are 0 or more, and not all 0")
      for weight in (0, -1, math.nan, math.inf)),
    ("train", {"contrastive": 0.5}, "train.contrastive=0.5 needs images: set model.vision.layers"),
    ("model", {"pattern": ""}, "only L (lightning), S (softmax) and W (softmax in a window)"),
    ("model", {"pattern": "LM"}, "only L (lightning), S (softmax) and W (softmax in a window)"),
    ("model", {"pattern": "LLS"}, "has 3 letters, which does not divide model.layers=8"),
    ("model", {"kv_heads": 3}, "model.kv_heads=3 does not divide model.heads=8"),
    ("model", {"rotary_dim": 34}, "must be even and at most model.head_dim=32"),
    ("model", {"rotary_dim": 3}, "must be even"),
    ("model", {"top_k": 9}, "model.top_k=9 is more than model.experts=8"),
    ("model", {"capacity": -1.0}, "must be 0 (no dropping) or positive"),
    ("model", {"aux": "none"}, "is none of 'switch', 'paper', 'hf'"),
    ("train", {"steps": 0}, "train.steps=0 must be positive"),
    ("train", {"schedule": "linear"}, "is none of 'wsd', 'cosine', 'stepwise'"),
    ("train", {"schedule": "stepwise"}, "needs train.rates"),
    ("train", {"ramp": ((5, 1),)}, "must start at 0 tokens and rise"),
    ("train", {"ramp": ((0, 1), (5, 2), (5, 4))}, "must start at 0 tokens and rise"),
    ("train", {"ramp": (0, 1)}, "pairs"),
    ("train", {"ramp": ((0, 0),)}, "pairs of tokens, a whole number, and a positive count"),
    ("train", {"ramp": ((0, 1.5),)}, "a positive count"),
    ("train", {"rates": ((0, -1e-3),)}, "a positive rate"),
    ("train", {"seconds": -1}, "train.seconds=-1.0 must be 0 or more"),
    ("train", {"warmup": -5}, "train.warmup=-5 must be 0 or more"),
    ("train", {"decay": 1.5}, "train.decay=1.5 is a share of the run"),
    ("train", {"tensorboard": 1}, "train.tensorboard needs bool, got 1"),
    ("data", {"sources": "sotu"}, "data.sources needs tuple, got 'sotu'"),
    ("model", {"dtype": "float16"}, "is none of 'float32', 'bfloat16', 'float64'"),
    ("train", {"ramp": ((0, 1), (5, 2)), "seconds": 9.0}, "train.seconds does not go with train.ramp"),
    ("data", {"sources": ()}, "name 'sotu' or a path"),
    ("data", {"sources": (5,)}, "data.sources=(5,) must be names"),
    ("data", {"weights": ((0, 1),)}, "one weight a source"),
    ("data", {"weights": ((0, (1, 2)),)}, "1 sources"),
    ("data", {"shards": 0}, "data.shards=0 must be positive"),
    ("data", {"lengths": ((0, 5), (5, 0))}, "at least and below (0: no end), for each of 1 sources"),
    ("data", {"lengths": ((5, 5),)}, "data.lengths=((5, 5),) needs a pair of tokens"),
    ("data", {"lengths": ((-1, 0),)}, "needs a pair of tokens"),
    ("checkpoint", {"every": 0}, "must be positive"),
    ("mesh", {"edp": 0}, "axes are positive"),
    ("mesh", {"edp": -1, "ep": -1}, "at most one is -1"),
])
def test_mistakes_are_one_line(section, values, message):
    with pytest.raises(ConfigError) as caught:
        build({section: values})
    assert message in str(caught.value) and "\n" not in str(caught.value)
