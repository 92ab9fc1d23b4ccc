"""Counts of parameters, FLOPs and bytes agree with the arrays, with counts by hand and with published figures."""
import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mmx import config
from mmx.analysis.counts import (
    CacheBytes,
    cache_bytes,
    count_params,
    flops_companion,
    flops_forward,
    flops_tile,
    flops_training,
)
from mmx.checkpoints import hf_layout
from mmx.config import Model
from mmx.launch import experiments
from mmx.layers.lightning import alibi_slopes, log_decay
from mmx.model import Model as Module
from mmx.model import abstract_params

LADDER = str(Path(__file__).parent.parent / "experiments" / "ladder.py")
SHAPES = [Model(), Model(pattern="S", layers=3, heads=5, kv_heads=5, head_dim=6, rotary_dim=2, experts=3, expert_dim=7),
          Model(pattern="LLS", layers=6, dim=20, heads=6, kv_heads=1, experts=4, top_k=3, vocab=31),
          Model(pattern="LS", layers=2, dim=20, vision=config.Vision(2, 12, 3, 16, 28, 7, token=260))]


@pytest.mark.parametrize("model", SHAPES, ids=["default", "softmax", "mixed", "vision"])
def test_counts_match_the_parameters(model):
    """Compares with counts of the arrays that `Model.init` creates."""
    created = jax.eval_shape(Module(model).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    sizes = {tuple(key.key for key in path): math.prod(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(created)}
    text = {path: size for path, size in sizes.items() if path[0] != "vision"}
    idle = sum(size for path, size in sizes.items() if path[-1][:2] in ("w1", "w2", "w3"))
    found = count_params(model)
    assert found.total == sum(sizes.values()) == sum(text.values()) + found.vision
    assert found.active_all == sum(text.values()) - idle * (model.experts - model.top_k) // model.experts
    assert found.active == found.active_all - sizes[("embed_WD",)] - sizes[("head_WD",)]
    norms = sum(size for path, size in text.items() if path[-1].startswith("norm"))
    assert found.active_matrices == found.active + sizes[("head_WD",)] - norms
    leaves = hf_layout.leaves(model)
    assert hf_layout.tensor_count(model) == len({name for leaf in leaves for _, name in leaf.tensors()})


@pytest.mark.parametrize("model", [*SHAPES, dataclasses.replace(
    SHAPES[2], pattern="LSW", impl="tpu", dtype="bfloat16", remat=True)])
def test_abstract_parameters_match_those_that_init_creates(model):
    """Covers a kernel and a dtype that this machine may not support."""
    portable = dataclasses.replace(model.portable(), dtype="float32")
    created = jax.eval_shape(Module(portable).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    found, wanted = (jax.tree.map(lambda x: (x.shape, x.dtype), params) for params in (abstract_params(model), created))
    assert found == wanted


def test_flops_by_hand():
    m = Model(vocab=10, dim=4, layers=2, pattern="LS", heads=2, kv_heads=1, head_dim=3, rotary_dim=2, experts=3, top_k=2,
              expert_dim=5)
    lightning = 5 * 4 * 6 + 2 * (3 * 3 + 3 * 3)         # q, k, v, gate, out; update and use of the state, two heads
    softmax = 2 * 4 * 6 + 2 * 4 * 3 + 2 * 2 * 3 * 4     # q, out; k, v; scores and values for 1 to 7 keys, 4 on average
    moe = 4 * 3 + 2 * 3 * 4 * 5
    assert flops_forward(m, 7) == 2 * (lightning + softmax + 2 * moe + 4 * 10)
    assert flops_training(m, 7) == 3 * flops_forward(m, 7)


TEXT_01 = Model(vocab=200_064, dim=6_144, layers=80, heads=64, kv_heads=8, head_dim=128, rotary_dim=64, experts=32,
                expert_dim=9_216)


def test_flops_of_the_released_model_at_a_million_tokens():
    """Forward pass per token: scores of 10 softmax layers 172 GFLOPs, of 80 layers 1,374; matrices except the head 91.9."""
    def scores(model):
        return flops_forward(model, 1_048_576) - flops_forward(model, 0)
    softmax_1, lightning = 10 * 2 * 8192, 70 * 4 * 8192 * 128
    rest = flops_forward(TEXT_01, 0) - softmax_1 - lightning - 2 * TEXT_01.vocab * TEXT_01.dim
    assert (scores(TEXT_01), rest) == (pytest.approx(172e9, rel=0.01), pytest.approx(91.9e9, rel=0.01))
    assert scores(dataclasses.replace(TEXT_01, pattern="S")) == pytest.approx(1374e9, rel=0.01)


@pytest.mark.parametrize("length", [1, 6, 7, 100])
def test_a_window_costs_only_the_keys_inside_it(length):
    def flops(pattern):
        return flops_forward(Model(layers=1, pattern=pattern, window=6), length)
    def mean_keys(window):
        return sum(min(t + 1, window) for t in range(length)) / length
    assert flops("S") - flops("W") == pytest.approx(4 * 8 * 32 * (mean_keys(length) - mean_keys(6)), abs=1e-3)


PUBLISHED = {   # PFLOPs of a step of 480 x 8,192 tokens: arXiv 2406.16690, Table 7, rows LLaMA and TNL
    "softmax": (1.6, 5.6, 18.0, 40.4, 99.6, 202.7), "lightning": (0.5, 2.2, 7.9, 22.3, 66.6, 154.4)}


@pytest.mark.parametrize("arch", PUBLISHED)
def test_flops_match_the_companion_paper(arch):
    sizes = ("70M", "160M", "410M", "1B", "3B", "7B")
    found = [flops_companion(experiments.read(f"{LADDER}:{arch},{size}", []).model, 8192) * 480 * 8192 for size in sizes]
    assert tuple(round(flops / 1e15, 1) for flops in found) == PUBLISHED[arch]


def test_companion_flops_of_the_hybrid_and_of_experts():
    n, model = 8192, Model(layers=8, dim=512, heads=4, experts=1, top_k=1)
    table_1 = 72 * 8 * 512**2 * (1 + n / (48 * 512) + 7 / (16 * 4) + 5 / (18 * 512))       # Table 1, hybrid
    assert flops_companion(model, n) == pytest.approx(table_1, rel=1e-12)
    moe = dataclasses.replace(model, experts=4, top_k=2, expert_dim=512)
    difference = 6 * 8 * (2 * 3 * 512**2 + 4 * 512 - 8 * 512**2)
    assert flops_companion(moe, n) - flops_companion(model, n) == pytest.approx(difference, rel=1e-9)


@pytest.mark.parametrize("size, params", [("70M", 20.5), ("160M", 85.0), ("410M", 334.1), ("1B", 906.2), ("3B", 2775.8),
                                          ("7B", 6476.5)])
def test_the_ladder_has_the_published_parameters(size, params):
    found = count_params(experiments.read(f"{LADDER}:softmax,{size}", []).model).active / 1e6
    assert found == pytest.approx(params, abs=0.11)        # ours add a router row to each dense layer


def test_released_decay_horizons():
    """A horizon is 1 / slope in tokens, here of heads 0, 31 and 63."""
    for layer, horizons in ((0, (1.1, 16, 256)), (39, (2.2, 32, 506)), (70, (9.6, 140, 2247)), (78, (86, 1263, 20208))):
        assert [-1 / log_decay(TEXT_01, layer)[head] for head in (0, 31, 63)] == pytest.approx(horizons, rel=0.03)
    assert TEXT_01.alpha_moe == 3.5565588200778455


def test_slopes_when_heads_are_not_a_power_of_two():
    assert alibi_slopes(4) == [2**-2, 2**-4, 2**-6, 2**-8]
    assert alibi_slopes(3) == [2**-4, 2**-8, 2**-2]
    assert alibi_slopes(6) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    first, last = (log_decay(Model(layers=2, pattern="L", heads=3), layer) for layer in (0, 1))
    assert first == pytest.approx([-s * (1 + 1e-5) for s in (2**-4, 2**-8, 2**-2)])
    assert last == pytest.approx([-s * 1e-5 for s in (2**-4, 2**-8, 2**-2)])


def test_released_vision_parameters_by_hand():
    """The ViT has 303 M parameters, the projector 44 M (docs/model.md section 8)."""
    layer = 4 * (1024 ** 2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    vit = 24 * layer + 1024 * (3 * 14 * 14 + 577 + 1 + 2)
    projector = 1024 * 6144 + 6144 + 6144 * 6144 + 6144 + 6144
    found = count_params(dataclasses.replace(TEXT_01, vision=config.Vision(layers=24)))
    assert vit == 303_505_408 and found.vision == vit + projector
    assert found.total == 456_089_655_296 + found.vision and count_params(TEXT_01).active == 45_944_920_064
    assert flops_tile(TEXT_01) == 0


def test_bytes_of_a_cache():
    lightning, softmax = 64 * 128 * 128 * 4, 2 * 8 * 128 * 4        # float32: bytes a layer, and a layer and token
    assert cache_bytes(TEXT_01) == CacheBytes(70 * lightning, 10 * softmax)
    assert cache_bytes(TEXT_01, "int8") == CacheBytes(70 * lightning, 10 * (2 * 8 * 128 + 2 * 8 * 4))
