"""The loss: cross-entropy in chunks against the whole, its memory, the routers' losses, what weights of zero leave out."""
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
def whole(x_BTD, head_WD, targets_BT, weights_BT):
    p_BTW = jax.nn.softmax(jnp.einsum("BTD,WD->BTW", x_BTD, head_WD))
    return -jnp.sum(weights_BT * jnp.log(jnp.take_along_axis(p_BTW, targets_BT[..., None], axis=2)[..., 0]), axis=1)


@pytest.mark.parametrize("chunk", [1, B, 7, 4 * B, B * T, 1000])
def test_chunks_equal_the_whole(chunk):
    rows = jnp.arange(1.0, B + 1)
    graded = [jax.jit(jax.value_and_grad(lambda *a: (f(*a) @ rows, f(*a)), (0, 1, 3), has_aux=True))(*inputs())
              for f in (lambda *a: loss.cross_entropy(*a, chunk), whole)]
    names = "nats", "nats_B", "dx_BTD", "dhead_WD", "dweights_BT"
    for name, x, y in zip(names, *map(jax.tree.leaves, graded)):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=name)


def test_bfloat16_hidden_states_make_float32_logits():
    x_BTD, head_WD, *rest = inputs(jnp.bfloat16)
    rounded = [a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x_BTD, head_WD)]
    np.testing.assert_allclose(loss.cross_entropy(x_BTD, head_WD, *rest, 8), whole(*rounded, *rest), rtol=1e-5)


def test_logits_are_never_whole():
    """Temporaries of forward and backward: two chunks' rows, a copy of the head and its gradient, not [B, T, W]."""
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


@pytest.mark.parametrize("form", config.AUX_FORMS)
def test_router_losses(form):
    """A mean over the layers; Hugging Face's form counts all top_k slots and takes all layers' tokens together."""
    f_LE, p_LE = STATS["load_E"], STATS["prob_E"]
    balance, z = loss.router_losses(STATS, config.Model(experts=4, top_k=2, aux=form))
    want = {"switch": 4 * np.mean(np.sum(f_LE * p_LE, axis=1)), "paper": np.mean(np.sum(f_LE * p_LE, axis=1)) / 4,
            "hf": 4 * np.sum(2 * f_LE.mean(0) * p_LE.mean(0))}[form]
    np.testing.assert_allclose((balance, z), (want, 4.0), rtol=1e-6)


def fixed(x_BTD, **kwargs):
    """A model that gives these hidden states and STATS."""
    return types.SimpleNamespace(config=config.Model(experts=4, **kwargs), apply=lambda *_: (x_BTD, None, STATS))


def batch_of(targets_BT, weights_BT):
    return {"targets": targets_BT, "weights": weights_BT} | dict.fromkeys(("tokens", "segments", "positions"))


def test_loss_is_the_mean_over_weights_and_the_router_losses():
    x_BTD, head_WD, targets_BT, weights_BT = inputs()
    model = fixed(x_BTD, aux_weight=0.3, z_weight=0.01)
    value, metrics = loss.loss(model, {"head_WD": head_WD}, batch_of(targets_BT, weights_BT), 8)
    balance, z = loss.router_losses(STATS, model.config)
    cross = whole(*inputs()).sum() / weights_BT.sum()
    np.testing.assert_allclose(value, cross + 0.3 * balance + 0.01 * z, rtol=1e-5)
    want = {"loss": cross, "aux_loss": balance, "z_loss": z, "targets": weights_BT.sum(), "load_E": STATS["load_E"],
            "dropped": STATS["dropped"], "overflow": STATS["overflow"]}
    assert metrics.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(metrics[name], want[name], rtol=1e-5, err_msg=name)


def test_weights_of_zero_take_no_part():
    x_BTD, head_WD, targets_BT, weights_BT = inputs()
    step = jax.jit(jax.value_and_grad(lambda x_BTD, targets_BT, weights_BT: loss.loss(
        fixed(x_BTD), {"head_WD": head_WD}, batch_of(targets_BT, weights_BT), 8)[0]))
    value, dx_BTD = step(x_BTD, targets_BT, weights_BT)
    out = weights_BT == 0
    assert out.any() and (dx_BTD[out] == 0).all() and (dx_BTD[~out] != 0).all()
    others = step(jnp.where(out[..., None], 9.0, x_BTD), jnp.where(out, 0, targets_BT), weights_BT)
    np.testing.assert_array_equal(others[0], value)
    nothing, dx_BTD = step(x_BTD, targets_BT, jnp.zeros((B, T)))
    aux = config.Model().aux_weight * loss.router_losses(STATS, config.Model(experts=4))[0]
    np.testing.assert_allclose(nothing, aux, rtol=1e-6)
    assert (dx_BTD == 0).all()
