"""The decoder's invariants: packing, causality, caches, chunks, remat, scan, padding, meshes, names."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from mmx import config
from mmx.layers.common import Context, extents
from mmx.loss import loss
from mmx.model import Group, Model, empty_cache, logits

C = config.Model(vocab=32, dim=16, layers=4, pattern="LS", heads=2, kv_heads=1, head_dim=8, rotary_dim=4, experts=4,
                 expert_dim=16, init="fan_in", embed_std=1.0)


def build(c=C, seed=0):
    model = Model(c)
    return model, jax.jit(lambda: model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"])()


def ids(B, T, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, C.vocab, (B, T)), jnp.int32)


def run(model, params, *args, **kwargs):
    return jax.jit(lambda p: logits(p, model.apply({"params": p}, *args, **kwargs)[0]))(params)


def batch_of(rows):
    """A training batch of [(documents' lengths), ...]."""
    B, T = len(rows), sum(rows[0])
    batch = {"tokens": ids(B, T), "targets": ids(B, T, 1), "weights": jnp.ones((B, T)),
             "segments": jnp.asarray([np.repeat(np.arange(1, len(r) + 1), r) for r in rows], jnp.int32),
             "positions": jnp.asarray([np.concatenate([np.arange(n) for n in r]) for r in rows], jnp.int32)}
    return batch


def value_and_grad(model, params, batch):
    return jax.jit(jax.value_and_grad(lambda p: loss(model, p, batch, 64)[0]))(params)


def assert_trees_close(a, b, rtol):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-12)
        assert error <= rtol, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"


def test_packed_equals_separate():
    """Mean losses over documents of equal weight: the packed row's gradient is that of the documents on their own."""
    model, params = build(dataclasses.replace(C, aux_weight=0.0))
    packed = batch_of([(20, 9, 11)])
    value, grads = value_and_grad(model, params, packed)
    values, parts = 0.0, []
    for begin, end in ((0, 20), (20, 29), (29, 40)):
        alone = {k: v[:, begin:end] for k, v in packed.items()} | {"segments": jnp.ones((1, end - begin), jnp.int32)}
        v, g = value_and_grad(model, params, alone)
        values += v * (end - begin) / 40
        parts.append(jax.tree.map(lambda x: x * (end - begin) / 40, g))
    np.testing.assert_allclose(value, values, rtol=1e-6)
    assert_trees_close(grads, jax.tree.map(lambda *x: sum(x), *parts), 1e-5)


def test_chunk_size_and_remat_change_nothing():
    model, params = build()
    batch = batch_of([(30, 10), (7, 33)])
    value, grads = value_and_grad(model, params, batch)
    for change in ({"chunk": 7}, {"remat": True}):
        v, g = value_and_grad(Model(dataclasses.replace(C, **change)), params, batch)
        np.testing.assert_allclose(v, value, rtol=1e-6)
        assert_trees_close(g, grads, 1e-5)


def test_scan_equals_a_loop_over_groups():
    model, params = build()
    tokens_BT = ids(2, 12)
    x_BTD, _, _ = model.apply({"params": params}, tokens_BT)
    h_BTD = params["embed_WD"][tokens_BT]
    decay_LPH = jnp.array(C.log_decay).reshape(C.groups, 2, C.heads)
    for l in range(C.groups):
        sliced = jax.tree.map(lambda w: w[l], params["groups"])
        h_BTD, _ = Group(C, False).apply({"params": sliced}, h_BTD, Context(None, jnp.arange(12)[None], None), None,
                                         decay_LPH[l])
    rms = jnp.sqrt(jnp.mean(h_BTD ** 2, -1, keepdims=True) + C.norm_eps)
    np.testing.assert_allclose(x_BTD, h_BTD / rms * params["norm_D"], atol=1e-5)


@pytest.mark.parametrize("pattern", ["L", "S", "LS"])
def test_causality_by_gradient(pattern):
    model, params = build(dataclasses.replace(C, pattern=pattern))
    x_BTD = params["embed_WD"][ids(1, 12)]

    def at(x_BTD, t):
        embedded = {**params, "embed_WD": x_BTD[0]}
        return logits(embedded, model.apply({"params": embedded}, jnp.arange(12)[None])[0])[0, t].sum()
    model = Model(dataclasses.replace(C, pattern=pattern, vocab=12))
    params = {**params, "head_WD": params["head_WD"][:12]}
    grad_TD = jax.jit(jax.grad(at))(x_BTD, 6)[0]
    assert (grad_TD[7:] == 0).all()
    assert (jnp.abs(grad_TD[:7]).sum(1) > 0).all()


@pytest.mark.parametrize("pattern, kv_heads, rotary_dim", [("L", 1, 0), ("S", 2, 8), ("LLS", 1, 2), ("LLLLLLLS", 2, 4)])
def test_prefill_and_decode_equal_forward(pattern, kv_heads, rotary_dim):
    c = dataclasses.replace(C, layers=len(pattern) * (2 if len(pattern) < 8 else 1), pattern=pattern, kv_heads=kv_heads,
                            rotary_dim=rotary_dim)
    model, params = build(c)
    assert sum(x.size for x in jax.tree.leaves(params)) == c.params_total
    tokens_BT = ids(2, 20)
    whole = run(model, params, tokens_BT)
    step = jax.jit(lambda t, m, cache: model.apply({"params": params}, t, m, cache=cache)[:2])
    cache, lengths = empty_cache(c, 2, 32), [0, 0]
    for counts in ((8, 5), (1, 1), (0, 8), (1, 1), (8, 3)):     # ragged: each row takes its own number, padded to 8
        width = max(counts)
        chunk, mask = np.zeros((2, width), np.int32), np.zeros((2, width), np.int32)
        for b, n in enumerate(counts):
            chunk[b, :n], mask[b, :n] = tokens_BT[b, lengths[b]:lengths[b] + n], 1
        x_BTD, cache = step(chunk, mask, cache)
        for b, n in enumerate(counts):
            np.testing.assert_allclose(logits(params, x_BTD)[b, :n], whole[b, lengths[b]:lengths[b] + n], atol=2e-5)
            lengths[b] += n
    assert cache["length_B"].tolist() == lengths == [18, 18]


def test_padding_on_either_side_changes_nothing():
    model, params = build()
    tokens_BT = ids(1, 10)
    plain = run(model, params, tokens_BT)
    for left, right in ((4, 0), (0, 4)):
        pad = ((0, 0), (left, right))
        padded = run(model, params, jnp.pad(tokens_BT, pad), jnp.pad(jnp.ones((1, 10), jnp.int32), pad))
        np.testing.assert_allclose(padded[:, left:left + 10], plain, atol=2e-5)


def test_names_spell_their_axes():
    variables = Model(C).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    assert set(variables) == {"params"}
    size = extents(C)
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        axes = ("L" if path[0].key == "groups" else "") + path[-1].key.rpartition("_")[2]
        assert leaf.shape == tuple((size | {"L": C.groups})[a] for a in axes), path


def test_bfloat16_stays_near_float32():
    model, params = build()
    tokens_BT = ids(2, 16)
    near = run(Model(dataclasses.replace(C, dtype="bfloat16")), params, tokens_BT)
    want = run(model, params, tokens_BT)
    assert np.linalg.norm(near - want) / np.linalg.norm(want) < 0.1


@pytest.mark.parametrize("capacity", [0.0, 1.0])
def test_mesh_changes_nothing(capacity):
    model, params = build(dataclasses.replace(C, capacity=capacity))
    batch = batch_of([(30, 10), (7, 33), (40,), (1, 39)])
    one, grads = value_and_grad(model, params, batch)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(4, 1, 1, 1), ("edp", "ep", "etp", "seq"), axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        many, others = value_and_grad(model, params, jax.device_put(batch, jax.NamedSharding(mesh, jax.P("edp"))))
    np.testing.assert_allclose(many, one, rtol=1e-6)
    assert_trees_close(others, grads, 1e-5)
