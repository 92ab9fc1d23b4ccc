"""Configs: defaults, conversion to and from JSON, messages for mistakes, and the generated page."""
import dataclasses
import math
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from mmx import config
from mmx.config import ConfigError, build, reference
from mmx.launch import experiments

EXPERIMENTS = sorted((Path(__file__).parent.parent / "experiments").glob("*.py"))


def test_alphas_follow_from_the_layers_unless_given():
    found = build({"model": {"layers": 4, "pattern": "LS", "alpha_moe": 1.0}}).model
    assert (found.alpha_lightning, found.alpha_softmax, found.alpha_moe) == (8**0.25, 8**0.25, 1.0)
    assert config.default().model.alpha_moe == 0        # not derived yet, so an override of model.layers changes it


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_json_restores_each_experiment(path):
    experiment = experiments.read(str(path), [])
    assert config.from_json(config.to_json(experiment)) == experiment
    assert hash(experiment.model) == hash(dataclasses.replace(experiment.model))


def test_json_restores_a_window_and_omits_the_default():
    for window in (256, 32):
        experiment = build({"model": {"layers": 8, "window": window}})
        assert config.from_json(config.to_json(experiment)) == experiment
        assert ("window" in config.sections(experiment)["model"]) == (window != 256)


def test_parse_lengths():
    assert config.parse_lengths("512,1k, 128K,1M,4m,1024") == [512, 1024, 131_072, 2 ** 20, 2 ** 22]


@pytest.mark.parametrize("text", ["", "0", "8k,", "1.5k", "4x", "-1", "8kk", "k"])
def test_invalid_lengths(text):
    with pytest.raises(ConfigError, match=f"--lengths {text!r} must be numbers of tokens with commas, such as 512,1k,4M"):
        config.parse_lengths(text)


def test_default_equals_an_empty_config():
    assert build(config.default()) == build({}) == config.Experiment()


def test_vision_is_a_section_of_the_model():
    """Missing keys get the released model's values. A config without the section describes a text model."""
    assert build({"model": {"vision": {"layers": 24}, "vocab": 200_064}}).model.vision == config.Vision(layers=24)
    assert build({"model": {"dim": 64}}).model == config.Model(dim=64) and not config.Model().vision.layers
    experiment = build({"model": {"vision": {"layers": 2, "grids": [[1, 2]], "token": 259}}})
    assert config.from_json(config.to_json(experiment)) == experiment and experiment.model.vision.grids == ((1, 2),)
    file = Path(__file__).parent.parent / "experiments" / "tiny.py"
    found = experiments.read(str(file), ["--config.model.vision.layers=3", "--config.model.vision.token=260"])
    assert (found.model.vision.layers, found.model.vision.token, found.model.vision.dim) == (3, 260, 1024)


def test_integers_become_floats_and_lists_become_tuples():
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
    ("model", {"vision": {"layers": -1}}, "model.vision.layers=-1 must be positive, or 0 for a text model"),
    ("model", {"vision": {"layers": 1}}, "model.vision.token=200025 must be a token id, from 0 to below model.vocab=264"),
    ("model", {"vision": {"heads": 3}}, "model.vision.dim=1024 must be divisible by model.vision.heads=3"),
    ("model", {"vision": {"patch": 5}}, "model.vision.tile=336 must be divisible by model.vision.patch=5"),
    ("model", {"vision": {"grids": ((1, 2), 3)}}, "must be pairs of positive rows and columns"),
    ("train", {"lr": math.nan}, "needs a finite number"),
    ("model", {"dim": 0}, "model.dim=0 must be positive"),
    ("model", {"chunk": -1}, "model.chunk=-1 must be positive"),
    ("model", {"rope_theta": 0.0}, "model.rope_theta=0.0 must be positive"),
    ("train", {"seed": 2 ** 33}, "must be from 0 to"),
    ("train", {"eps": 0.0}, "train.eps=0.0 must be at least 1e-37: a gradient of 0 would be divided by 0"),
    ("train", {"eps": 1e-45}, "must be at least 1e-37"),
    ("train", {"beta1": 2.0}, "train.beta1=2.0 must be from 0 to below 1"),
    ("data", {"weights": (("a", (1,)),)}, "needs (step, (weight of each source))"),
    ("data", {"weights": ((0, ("a",)),)}, "needs (step, (weight of each source))"),
    *(("data", {"weights": ((0, (1,)), (3, (weight,)))}, "from step 3: weights must be 0 or more, and not all 0")
      for weight in (0, -1, math.nan, math.inf)),
    ("train", {"contrastive": 0.5}, "train.contrastive=0.5 needs a model that reads images: set model.vision.layers"),
    ("model", {"pattern": ""}, "model.pattern='' must be letters, one for each layer"),
    ("model", {"pattern": "L1"}, "must be letters, one for each layer"),
    ("model", {"pattern": "LLS"}, "model.layers=8 must be divisible by the 3 letters of model.pattern='LLS'"),
    ("model", {"kv_heads": 3}, "model.heads=8 must be divisible by model.kv_heads=3"),
    ("model", {"rotary_dim": 34}, "must be even and at most model.head_dim=32"),
    ("model", {"rotary_dim": 3}, "must be even"),
    ("model", {"top_k": 9}, "model.top_k=9 must be at most model.experts=8"),
    ("model", {"capacity": -1.0}, "must be positive, or 0 for no dropping"),
    ("model", {"aux": "none"}, "must be one of 'switch', 'paper', 'hf'"),
    ("train", {"steps": 0}, "train.steps=0 must be positive"),
    ("train", {"schedule": "linear"}, "must be one of 'wsd', 'cosine', 'stepwise'"),
    ("train", {"schedule": "stepwise"}, "needs train.rates"),
    ("train", {"ramp": ((5, 1),)}, "must start at 0 tokens, with the tokens increasing"),
    ("train", {"ramp": ((0, 1), (5, 2), (5, 4))}, "must start at 0 tokens, with the tokens increasing"),
    ("train", {"ramp": (0, 1)}, "pairs"),
    ("train", {"ramp": ((0, 0),)}, "pairs of tokens, a whole number, and a positive count"),
    ("train", {"ramp": ((0, 1.5),)}, "a positive count"),
    ("train", {"rates": ((0, -1e-3),)}, "a positive rate"),
    ("train", {"seconds": -1}, "train.seconds=-1.0 must be 0 or more"),
    ("train", {"warmup": -5}, "train.warmup=-5 must be 0 or more"),
    ("train", {"decay": 1.5}, "train.decay=1.5 must be a share of the run"),
    ("train", {"tensorboard": 1}, "train.tensorboard needs bool, got 1"),
    ("data", {"sources": "sotu"}, "data.sources needs tuple, got 'sotu'"),
    ("model", {"dtype": "float16"}, "must be one of 'float32', 'bfloat16', 'float64'"),
    ("train", {"ramp": ((0, 1), (5, 2)), "seconds": 9.0}, "train.seconds and train.ramp cannot be combined"),
    ("data", {"sources": ()}, "name 'sotu' or a path"),
    ("data", {"sources": (5,)}, "data.sources=(5,) must be names"),
    ("data", {"weights": ((0, 1),)}, "(weight of each source)"),
    ("data", {"weights": ((0, (1, 2)),)}, "1 sources"),
    ("data", {"shards": 0}, "data.shards=0 must be positive"),
    ("data", {"lengths": ((0, 5), (5, 0))}, "at least and below (0: no limit), for each of 1 sources"),
    ("data", {"lengths": ((5, 5),)}, "data.lengths=((5, 5),) needs a pair of tokens"),
    ("data", {"lengths": ((-1, 0),)}, "needs a pair of tokens"),
    ("checkpoint", {"every": 0}, "must be positive"),
    ("mesh", {"edp": 0}, "sizes must be positive"),
    ("mesh", {"edp": -1, "ep": -1}, "at most one may be -1"),
])
def test_mistakes_are_one_line(section, values, message):
    with pytest.raises(ConfigError) as caught:
        build({section: values})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_configuration_page_has_every_key():
    """Generated by `python -m mmx.config.reference > docs/configuration.md`."""
    text = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text()
    assert text == reference.page(), "run python -m mmx.config.reference > docs/configuration.md"
    assert set(re.findall(r"^\| `([\w.]+)` \|", text, re.M)) == experiments.key_types().keys()
    for key, _, _, _, meaning in reference.rows(config.Model, "model."):
        assert len(meaning) > 3, key
