"""The training loss: cross-entropy in chunks, its memory, the router losses, and targets of weight 0."""
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx import config
from mmx.training import loss

B, T, D, W = 3, 10, 6, 17


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    x_BTD, head_WD = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (W, D))
    targets_BT = jax.random.randint(keys[2], (B, T), 0, W)
    weights_BT = jax.random.uniform(keys[3], (B, T)) * (jnp.arange(T) % 4 != 1)
    return x_BTD.astype(dtype), head_WD, targets_BT, weights_BT


@jax.jit
def reference(x_BTD, head_WD, targets_BT, weights_BT):
    p_BTW = jax.nn.softmax(jnp.einsum("BTD,WD->BTW", x_BTD, head_WD))
    return -jnp.sum(weights_BT * jnp.log(jnp.take_along_axis(p_BTW, targets_BT[..., None], axis=2)[..., 0]), axis=1)


@pytest.mark.parametrize("chunk", [1, B, 7, 4 * B, B * T, 1000])
def test_chunks_equal_the_reference(chunk):
    rows = jnp.arange(1.0, B + 1)
    results = [jax.jit(jax.value_and_grad(lambda *a: (f(*a) @ rows, f(*a)), (0, 1, 3), has_aux=True))(*inputs())
              for f in (lambda *a: loss.cross_entropy(*a, chunk), reference)]
    names = "nats", "nats_B", "dx_BTD", "dhead_WD", "dweights_BT"
    for name, x, y in zip(names, *map(jax.tree.leaves, results)):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=name)


def test_bfloat16_hidden_states_give_float32_logits():
    x_BTD, head_WD, *rest = inputs(jnp.bfloat16)
    rounded = [a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x_BTD, head_WD)]
    np.testing.assert_allclose(loss.cross_entropy(x_BTD, head_WD, *rest, 8), reference(*rounded, *rest), rtol=1e-5)


def test_logits_exist_in_chunks_only():
    """The temporaries of forward and backward are two chunks of logits, a copy of the head and its gradient."""
    B, T, W, D = 2, 512, 8192, 8
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((B, T, D), float), ((W, D), float), ((B, T), int), ((B, T), float))]

    def temporaries(chunk):
        step = jax.jit(jax.grad(lambda *a: loss.cross_entropy(*a, chunk).sum(), (0, 1)))
        return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert temporaries(64) < B * T * W * 4 / 5
    assert temporaries(B * T) >= B * T * W * 4


STATS = {"load_E": np.array([[0.5, 0.25, 0.25, 0], [0.1, 0.2, 0.3, 0.4]], np.float32),
         "prob_E": np.array([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]], np.float32),
         "z": np.array([3.0, 5.0], np.float32), "dropped": np.array([0.0, 0.5], np.float32),
         "overflow": np.array([0.25, 0.0], np.float32)}


@pytest.mark.parametrize("form", config.schema.AUX_FORMS)
def test_router_losses(form):
    """Means over the layers. "hf", as in transformers, counts all top_k slots and averages the statistics of the layers."""
    f_LE, p_LE = STATS["load_E"], STATS["prob_E"]
    balance, z = loss.router_losses(STATS, config.Model(experts=4, top_k=2, aux=form))
    expected = {"switch": 4 * np.mean(np.sum(f_LE * p_LE, axis=1)), "paper": np.mean(np.sum(f_LE * p_LE, axis=1)) / 4,
            "hf": 4 * np.sum(2 * f_LE.mean(0) * p_LE.mean(0))}[form]
    np.testing.assert_allclose((balance, z), (expected, 4.0), rtol=1e-6)


def fixed(x_BTD, **kwargs):
    """A model that always returns these hidden states and STATS."""
    return types.SimpleNamespace(config=config.Model(experts=4, **kwargs), apply=lambda *_: (x_BTD, None, STATS))


def batch_of(targets_BT, weights_BT):
    return {"targets": targets_BT, "weights": weights_BT} | dict.fromkeys(("tokens", "segments", "positions"))


def test_loss_is_the_mean_over_weights_and_the_router_losses():
    x_BTD, head_WD, targets_BT, weights_BT = inputs()
    model = fixed(x_BTD, aux_weight=0.3, z_weight=0.01)
    value, metrics = loss.loss(model, {"head_WD": head_WD}, batch_of(targets_BT, weights_BT), 8)
    balance, z = loss.router_losses(STATS, model.config)
    cross = reference(*inputs()).sum() / weights_BT.sum()
    np.testing.assert_allclose(value, cross + 0.3 * balance + 0.01 * z, rtol=1e-5)
    expected = {"loss": cross, "aux_loss": balance, "z_loss": z, "target_count": weights_BT.sum(), "load_E": STATS["load_E"],
            "dropped": STATS["dropped"], "overflow": STATS["overflow"]}
    assert metrics.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)


def test_targets_of_weight_0_do_not_count():
    x_BTD, head_WD, targets_BT, weights_BT = inputs()
    step = jax.jit(jax.value_and_grad(lambda x_BTD, targets_BT, weights_BT: loss.loss(
        fixed(x_BTD), {"head_WD": head_WD}, batch_of(targets_BT, weights_BT), 8)[0]))
    value, dx_BTD = step(x_BTD, targets_BT, weights_BT)
    ignored = weights_BT == 0
    assert ignored.any() and (dx_BTD[ignored] == 0).all() and (dx_BTD[~ignored] != 0).all()
    changed = step(jnp.where(ignored[..., None], 9.0, x_BTD), jnp.where(ignored, 0, targets_BT), weights_BT)
    np.testing.assert_array_equal(changed[0], value)
    all_ignored, dx_BTD = step(x_BTD, targets_BT, jnp.zeros((B, T)))
    aux = config.Model().aux_weight * loss.router_losses(STATS, config.Model(experts=4))[0]
    np.testing.assert_allclose(all_ignored, aux, rtol=1e-6)
    assert (dx_BTD == 0).all()
