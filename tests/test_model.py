"""Invariants of the decoder: packing, chunks, causality, caches, remat, scan, padding, names and initial values."""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx import config
from mmx.analysis.counts import count_params
from mmx.layers.common import Context, extents, rms_norm
from mmx.layers.kinds import kind_of
from mmx.layers.lightning import log_decay
from mmx.layers.moe import MoE
from mmx.model import Group, Model, empty_cache
from mmx.model import _constants as layer_constants
from mmx.training.loss import loss

C = config.Model(vocab=40, dim=16, layers=4, pattern="LS", heads=4, kv_heads=2, head_dim=8, rotary_dim=4, experts=4,
                 expert_dim=12, z_weight=0.01, chunk=5)
QUICK = {"xla_backend_optimization_level": 0}      # these tests spend most of their time compiling
T = 16


def shape(pattern, kv_heads=2, rotary_dim=4):
    """C with another pattern: once if it has more than four layers, else twice."""
    return dataclasses.replace(C, pattern=pattern, layers=len(pattern) * (1 if len(pattern) > 4 else 2), kv_heads=kv_heads,
                               rotary_dim=rotary_dim)


SHAPES = [shape("L"), shape("S", 1, 8), shape("LS", 2, 4), shape("LLS", 4, 0), shape("LLLLLLLS", 1, 2),
          dataclasses.replace(shape("SW"), window=6)]
by_shape = pytest.mark.parametrize("c", SHAPES, ids=lambda c: f"{c.pattern}-{c.kv_heads}-{c.rotary_dim}")


def abstract(c):
    return jax.eval_shape(Model(c).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def parameters(c):
    """Random parameters, including the scales of norms, so that all layers and channels differ."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        noise = rng.standard_normal(shape.shape, np.float32)
        name = path[-1].key
        return jnp.asarray(1 + noise / 4 if name.startswith("norm") else noise if name == "embed_WD" else noise / 4)
    return jax.tree_util.tree_map_with_path(leaf, abstract(c)["params"])


def ids(B, T):
    return np.random.default_rng(B * T).integers(0, C.vocab, (B, T)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def forward(c, params, tokens_BT, segments_BT=None):
    x_BTD, cache, stats = Model(c).apply({"params": params}, tokens_BT, segments_BT, trace=True)
    assert cache is None
    return x_BTD, stats


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def loss_and_grads(c, params, batch):
    return jax.value_and_grad(lambda params: loss(Model(c), params, batch, 24), has_aux=True)(params)


def batch_of(rows):
    """A batch whose rows contain documents of these lengths. A document's tokens depend only on its length."""
    names = "tokens", "targets", "segments", "positions", "weights"
    batch = {name: np.zeros((len(rows), T), np.float32 if name == "weights" else np.int32) for name in names}
    batch["tokens"][:], batch["targets"][:] = ids(len(rows), T), 7
    for b, row in enumerate(rows):
        for segment, (begin, n) in enumerate(zip(np.cumsum((0, *row)), row), 1):
            text = np.random.default_rng(n).integers(0, C.vocab, n + 1)
            for name, value in zip(names, (text[:-1], text[1:], segment, np.arange(n), 1)):
                batch[name][b, begin:begin + n] = value
    return batch


PACKED = batch_of([(11, 5), (16,), (3, 1, 12), (), (), (), ()])
SEPARATE = batch_of([(12,), (), (5,), (16,), (3,), (11,), (1,)])


def assert_same(got, want, tolerance=1e-5):
    leaves = jax.tree_util.tree_leaves_with_path
    for (path, x), (_, y) in zip(leaves(got), leaves(want), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-7)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"


def test_packed_equals_separate():
    """Packing documents into rows does not change the loss, its metrics or any gradient."""
    params = parameters(C)
    assert_same(loss_and_grads(C, params, PACKED), loss_and_grads(C, params, SEPARATE))


@pytest.mark.parametrize("change", [{"chunk": 1}, {"chunk": 8, "remat": True}], ids=str)
def test_chunk_size_and_remat_change_nothing(change):
    params, other = parameters(C), dataclasses.replace(C, **change)
    assert_same(loss_and_grads(other, params, PACKED), loss_and_grads(C, params, PACKED))


def test_remat_recomputes_a_layer():
    params = abstract(C)["params"]
    for remat in (True, False):
        program = jax.make_jaxpr(functools.partial(forward.__wrapped__, dataclasses.replace(C, remat=remat)))(params, ids(1, T))
        assert ("remat" in str(program)) == remat


@pytest.mark.parametrize("pattern", ["L", "S", "LS"])
def test_causality_by_gradient(pattern):
    """A token depends only on itself and on earlier tokens of its document."""
    c = shape(pattern)
    params = parameters(c)
    tokens_BT = np.arange(16).reshape(2, 8)
    segments_BT = np.array([[1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0, 0]])
    out_TD = jax.random.normal(jax.random.key(0), (16, c.dim))

    @functools.partial(jax.jit, compiler_options=QUICK)
    @jax.jacrev
    def jacobian(embed_WD):
        x_BTD, _ = forward.__wrapped__(c, {**params, "embed_WD": embed_WD}, tokens_BT, segments_BT)
        return jnp.sum(x_BTD.reshape(16, -1) * out_TD, axis=1)

    t, real = np.arange(16), segments_BT.ravel() > 0
    document_T = 10 * (t // 8) + segments_BT.ravel()
    attends_TS = (document_T[:, None] == document_T) & (t[:, None] >= t)
    influence_TS = np.abs(jacobian(params["embed_WD"])[:, :16]).max(2)
    np.testing.assert_array_equal(influence_TS[real] > 0, attends_TS[real])


def test_a_window_by_gradient():
    """A token of one layer depends on itself and on the five tokens before it in its document."""
    c = dataclasses.replace(C, pattern="W", layers=1, window=6)
    params, tokens_BT = parameters(c), np.arange(T)[None].astype(np.int32)
    segments_BT = np.array([[1] * 10 + [2] * 4 + [0] * 2])

    @functools.partial(jax.jit, compiler_options=QUICK)
    @jax.jacrev
    def jacobian(embed_WD):
        return Model(c).apply({"params": params | {"embed_WD": embed_WD}}, tokens_BT, segments_BT)[0][0, :, 0]

    t, segments_T = np.arange(T), segments_BT[0]
    attends_TS = (t[:, None] >= t) & (t[:, None] - t < 6) & (segments_T[:, None] == segments_T)
    real = segments_T > 0
    np.testing.assert_array_equal(np.abs(jacobian(params["embed_WD"])[:, :T]).max(2)[real] > 0, attends_TS[real])


# numbers of tokens for each of three rows in successive calls; a call is padded on the right to 8 tokens, or to 1
SPLITS = [((8, 5, 3), (1, 1, 1), (0, 8, 2), (1, 0, 1), (8, 2, 8), (1, 1, 1)), ((1, 1, 1),) * 12, ((8, 8, 0), (8, 8, 8))]


@by_shape
def test_prefill_and_decode_equal_forward(c):
    params, tokens_BT = parameters(c), ids(3, 20)
    expected_BTD, _ = forward(c, params, tokens_BT)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(tokens_BT, segments_BT, cache):
        return Model(c).apply({"params": params}, tokens_BT, segments_BT, cache=cache)[:2]

    for split in SPLITS:
        cache, lengths = empty_cache(c, 3, 28), [0, 0, 0]
        for counts in split:
            width = 8 if max(counts) > 1 else 1
            chunk, mask = np.full((3, width), 7, np.int32), np.zeros((3, width), np.int32)
            for b, n in enumerate(counts):
                chunk[b, :n], mask[b, :n] = tokens_BT[b, lengths[b]:lengths[b] + n], 1
            x_BTD, cache = step(chunk, mask, cache)
            for b, n in enumerate(counts):
                np.testing.assert_allclose(x_BTD[b, :n], expected_BTD[b, lengths[b]:lengths[b] + n], atol=3e-5)
                lengths[b] += n
            assert cache["length_B"].tolist() == lengths


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def one_group(c, params, x_BTD, constants):
    context = Context(None, jnp.arange(x_BTD.shape[1])[None], None)
    x_BTD, (_, stats) = Group(c, True).apply({"params": params}, x_BTD, context, None, constants)
    return x_BTD, stats


@pytest.mark.parametrize("pattern", ["LS", "LLS"])
def test_scan_equals_a_loop_over_groups(pattern):
    c = next(c for c in SHAPES if c.pattern == pattern)
    params, tokens_BT = parameters(c), ids(3, 20)
    x_BTD, stats = params["embed_WD"][tokens_BT], []
    for group in range(c.groups):
        constants = jax.tree.map(lambda x: x[group], layer_constants(c))
        sliced = jax.tree.map(lambda w: w[group], params["groups"])
        x_BTD, group_stats = one_group(c, sliced, x_BTD, constants)
        stats.append(group_stats)
    x_BTD = x_BTD / np.sqrt(np.mean(x_BTD ** 2, axis=-1, keepdims=True) + c.norm_eps) * params["norm_D"]
    assert_same(forward(c, params, tokens_BT), (x_BTD, jax.tree.map(lambda *x: np.concatenate(x), *stats)))


def test_padding_on_either_side_changes_nothing():
    params, tokens_BT = parameters(C), ids(3, 20)
    plain_BTD, _ = forward(C, params, tokens_BT)
    padded_BT, mask_BT = np.full((3, 26), 7, np.int32), np.zeros((3, 26), np.int32)
    for b, left in enumerate((6, 0, 2)):
        padded_BT[b, left:left + 20], mask_BT[b, left:left + 20] = tokens_BT[b], 1
    padded_BTD, _ = forward(C, params, padded_BT, mask_BT)
    np.testing.assert_allclose(padded_BTD[mask_BT > 0], plain_BTD.reshape(60, -1), atol=3e-5)


def test_bfloat16_stays_near_float32():
    """All experts are chosen, because rounding may change the choice of the top-k."""
    c = dataclasses.replace(C, top_k=C.experts)
    params = parameters(c)
    want_BTD, _ = forward(c, params, ids(2, T))
    found_BTD, _ = forward(dataclasses.replace(c, dtype="bfloat16"), params, ids(2, T))
    assert found_BTD.dtype == jnp.bfloat16
    assert 1e-4 < np.linalg.norm(found_BTD - want_BTD) / np.linalg.norm(want_BTD) < 0.03


TEXT_01 = config.Model(vocab=200_064, dim=6144, layers=80, heads=64, kv_heads=8, head_dim=128, rotary_dim=64, experts=32,
                       expert_dim=9216)


@pytest.mark.parametrize("c", [*SHAPES, config.Model(), TEXT_01], ids=lambda c: f"{c.pattern}-{c.kv_heads}-{c.layers}")
def test_names_spell_their_axes(c):
    variables = abstract(c)
    assert set(variables) == {"params"}
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables)) == count_params(c).total
    size = extents(c) | {"L": c.groups}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        axes = "L" * (path[0].key == "groups") + path[-1].key.rpartition("_")[2]
        assert leaf.shape == tuple(size[axis] for axis in axes), path


@pytest.mark.parametrize("postnorm, alpha", [(True, (2 * 4) ** 0.25), (False, 1)])
def test_a_layer_matches_its_formula(postnorm, alpha):
    """y = alpha r + Mixer(norm x), x' = alpha r + MoE(norm y), where r is the norm's output (postnorm) or its input."""
    c = dataclasses.replace(shape("LS"), postnorm=postnorm, capacity=0.0, **dict.fromkeys(
        ("alpha_lightning", "alpha_softmax", "alpha_moe"), 0.0))
    params = parameters(c)
    last_BTD, stats = forward(c, params, ids(2, T))
    context = Context(None, jnp.arange(T)[None], None)

    @functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def layer(kind, p, log_decay_H, x_BTD):
        u_BTD = rms_norm(x_BTD, p["norm_mixer_D"], c.norm_eps)
        mixed_BTD, _ = kind_of(kind).mixer(c).apply({"params": p["mixer"]}, u_BTD, context, None, log_decay_H)
        y_BTD = alpha * (u_BTD if postnorm else x_BTD) + mixed_BTD
        v_BTD = rms_norm(y_BTD, p["norm_moe_D"], c.norm_eps)
        return alpha * (v_BTD if postnorm else y_BTD) + MoE(c).apply({"params": p["moe"]}, v_BTD, context)[0]

    for n, kind in enumerate(c.layer_kinds):
        p = jax.tree.map(lambda x: x[n // 2], params["groups"][f"layer_{n % 2}"])
        x_BTD = layer(kind, p, None if kind != "L" else jnp.array(log_decay(c, n), jnp.float32), stats["hidden_BTD"][n])
        if n + 1 < c.layers:
            np.testing.assert_allclose(stats["hidden_BTD"][n + 1], x_BTD, rtol=1e-4, atol=1e-4, err_msg=f"layer {n}")
    np.testing.assert_allclose(last_BTD, rms_norm(x_BTD, params["norm_D"], c.norm_eps), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init, scaled", [("deepnorm", (8 * 4) ** -0.25), ("xavier", 1)])
def test_initial_values(init, scaled):
    """Xavier's variance, and with DeepNorm beta = (8 layers)^(-1/4) on v, out and the experts (paper section 4.2)."""
    c = dataclasses.replace(C, init=init, embed_std=0.5)
    params = jax.jit(Model(c).init, compiler_options=QUICK)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    D, HK, GK, E, F, beta = c.dim, c.heads * c.head_dim, c.kv_heads * c.head_dim, c.experts, c.expert_dim, scaled
    xavier = lambda fan_in, fan_out: (2 / (fan_in + fan_out)) ** 0.5
    lightning = {"q_DHK": xavier(D, HK), "k_DHK": xavier(D, HK), "v_DHV": beta * xavier(D, HK),
                 "gate_DHV": xavier(D, HK), "out_HVD": beta * xavier(HK, D)}
    softmax = {"q_DHK": xavier(D, HK), "k_DGK": xavier(D, GK), "v_DGV": beta * xavier(D, GK), "out_HVD": beta * xavier(HK, D)}
    experts = {"router_DE": xavier(D, E)} | dict.fromkeys(("w1_EDF", "w3_EDF", "w2_EFD"), beta * xavier(D, F))
    top = {"embed_WD": 0.5, "head_WD": D ** -0.5}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, group = path[-1].key, [p.key for p in path]
        if name.startswith("norm"):
            assert (leaf == 1).all(), path
            continue
        table = top if len(path) == 1 else experts if "moe" in group else lightning if "layer_0" in group else softmax
        deviation = np.sqrt(np.mean(leaf ** 2)) / table[name]
        assert abs(deviation - 1) < 4 / np.sqrt(2 * leaf.size), f"{path}: {deviation} of the standard deviation"
        assert "groups" not in group or (leaf[0] != leaf[1]).all(), path
