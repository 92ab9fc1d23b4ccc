"""Chunked lightning attention against the token recurrence: values, every gradient, the state."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from mmx.kernels.lightning import lightning_attention, reference

TOLERANCE = {"float32": 3e-6, "bfloat16": 6e-3}
NAMES = ("o", "state", "dq", "dk", "dv", "dstate")


def segments(kind, B, T):
    """Documents, or padding, by kind; every row differs."""
    if kind == "one":
        return None
    rows = np.ones((B, T), np.int32)
    for b in range(B):
        if kind == "edges":             # documents that begin on chunk edges
            rows[b] = 1 + np.arange(T) // 16
        elif kind == "many":            # documents of 1, 2, 3, ... tokens
            rows[b] = 1 + np.searchsorted(np.cumsum(np.arange(1, T + 1)), np.arange(T) + b, side="right")
        elif kind == "left":
            rows[b, :T * (b + 1) // 5] = 0
        elif kind == "right":           # row 2 is all padding
            rows[b, 0 if b == 2 else T - T * (b + 1) // 5:] = 0
        elif kind == "holes":           # padding inside documents and between them
            rows[b] = (1 + np.arange(T) // 23) * (np.arange(T) % (5 + b) != 2)
    return jnp.asarray(rows)


def inputs(B, H, T, K, V, dtype, slopes):
    keys = jax.random.split(jax.random.key(T * K + V), 6)
    shapes = [(B, H, T, K), (B, H, T, K), (B, H, T, V), (B, H, K, V), (B, H, T, V), (B, H, K, V)]
    q, k, v, state, do, dstate = (jax.random.normal(key, s) for key, s in zip(keys, shapes))
    q, k, v, do = (x.astype(dtype) for x in (q, k, v, do))
    return (q, k, v, state), (do, dstate), -jnp.asarray(np.geomspace(*slopes, H) if slopes else np.zeros(H), jnp.float32)


@jax.jit
def oracle(args, cotangents, log_decay_H, segments_BT):
    args = jax.tree.map(lambda x: x.astype(jnp.float32), args)
    out, pull = jax.vjp(lambda q, k, v, s: reference.lightning_attention(q, k, v, log_decay_H, segments_BT, s), *args)
    return out + pull(jax.tree.map(lambda x: x.astype(jnp.float32), cotangents))


def assert_close(got, want, dtype):
    for name, x, y in zip(NAMES, got, want):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)
        assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("T, kind", [(1, "one"), (17, "many"), (128, "edges"), (150, "one"), (150, "many"),
                                     (150, "left"), (150, "right"), (150, "holes")])
def test_against_recurrence(T, kind, dtype):
    args, cotangents, log_decay_H = inputs(3, 4, T, 8, 12, dtype, (1.0, 4e-8))
    seg = segments(kind, 3, T)
    want = oracle(args, cotangents, log_decay_H, jnp.ones((3, T), jnp.int32) if seg is None else seg)
    for chunk in (16, 64):
        @jax.jit
        def run(args, cotangents, seg):
            out, pull = jax.vjp(lambda q, k, v, s: lightning_attention(
                q, k, v, log_decay_H, segments_BT=seg, state_BHKV=s, chunk=chunk), *args)
            return out + pull(cotangents)
        assert_close(run(args, cotangents, seg), want, dtype)


def test_no_decay_and_no_state_are_a_running_sum():
    (q, k, v, _), _, log_decay_H = inputs(1, 2, 33, 4, 4, "float32", None)
    o, state = lightning_attention(q, k, v, log_decay_H, chunk=8)
    sums = jnp.cumsum(k[..., None] * v[..., None, :], axis=2)
    np.testing.assert_allclose(o, jnp.einsum("BHTK,BHTKV->BHTV", q, sums), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state, sums[:, :, -1], rtol=1e-4, atol=1e-4)


def test_state_carries_a_split_sequence():
    (q, k, v, state), _, log_decay_H = inputs(2, 3, 60, 8, 8, "float32", (0.5, 1e-3))
    seg = segments("many", 2, 60)
    whole = lightning_attention(q, k, v, log_decay_H, segments_BT=seg, state_BHKV=state)
    first = lightning_attention(q[:, :, :29], k[:, :, :29], v[:, :, :29], log_decay_H, segments_BT=seg[:, :29],
                                state_BHKV=state)
    # the state belongs to the first token's document, so cut where a document runs on in every row
    assert (seg[:, 28] == seg[:, 29]).all()
    second = lightning_attention(q[:, :, 29:], k[:, :, 29:], v[:, :, 29:], log_decay_H, segments_BT=seg[:, 29:],
                                 state_BHKV=first[1])
    np.testing.assert_allclose(jnp.concatenate([first[0], second[0]], 2), whole[0], atol=1e-5)
    np.testing.assert_allclose(second[1], whole[1], atol=1e-5)


def test_long_sequence_against_float64():
    """Past the decay's horizon (1,000 tokens here) the error stays where it is, however long the sequence."""
    (q, k, v, state), _, log_decay_H = inputs(1, 2, 8192, 8, 8, "float32", (0.1, 1e-3))
    o, _ = jax.jit(lambda *a: lightning_attention(*a, log_decay_H, state_BHKV=state))(q, k, v)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in (q, k, v, log_decay_H)]
        want, _ = reference.lightning_attention(*wide, jnp.ones((1, 8192), jnp.int32),
                                                jnp.asarray(np.asarray(state), jnp.float64))
        error = np.linalg.norm(np.asarray(o) - want, axis=(1, 3)) / np.linalg.norm(want, axis=(1, 3))
    assert error[0, -2048:].mean() <= 1.5 * error[0, 2048:4096].mean()
    assert error[0].mean() <= TOLERANCE["float32"]


def test_memory_is_linear_in_length():
    def temporaries(T):
        args, _, log_decay_H = inputs(1, 2, T, 16, 16, "float32", (0.5, 1e-3))
        loss = lambda q, k, v, s: lightning_attention(q, k, v, log_decay_H, state_BHKV=s)[0].sum()
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args).compile().memory_analysis().temp_size_in_bytes
    small, large = temporaries(1024), temporaries(8192)
    assert large <= 8.5 * small


def test_bad_arguments_say_what_would_work():
    (q, k, v, state), _, log_decay_H = inputs(1, 2, 8, 4, 4, "float32", (0.5, 1e-3))
    with pytest.raises(ValueError, match="k_BHTK has T=7"):
        lightning_attention(q, k[:, :, :7], v, log_decay_H)
    with pytest.raises(ValueError, match="must not be positive"):
        lightning_attention(q, k, v, -log_decay_H)
    with pytest.raises(ValueError, match="state_BHKV needs 4 axes"):
        lightning_attention(q, k, v, log_decay_H, state_BHKV=state[0])
    with pytest.raises(NotImplementedError, match="impl='cuda'"):
        lightning_attention(q, k, v, log_decay_H, impl="cuda")
    for impl in ("tpu", "gpu"):
        with pytest.raises(NotImplementedError, match=f"impl='{impl}': this computation is for cpu"):
            lightning_attention(q, k, v, log_decay_H, impl=impl)
    with pytest.raises(ValueError, match="one floating dtype"):
        lightning_attention(q, k, v.astype("bfloat16"), log_decay_H)
    with pytest.raises(ValueError, match="segments_BT needs integers"):
        lightning_attention(q, k, v, log_decay_H, segments_BT=jnp.ones((1, 8)))


def test_documents_that_go_back_are_an_error():
    (q, k, v, _), _, log_decay_H = inputs(1, 2, 8, 4, 4, "float32", (0.5, 1e-3))
    good, back = (jnp.asarray([row]) for row in ([0, 1, 1, 0, 1, 2, 2, 0], [1, 1, 2, 2, 0, 1, 1, 1]))
    attend = lambda seg: lightning_attention(q, k, v, log_decay_H, segments_BT=seg)[0]
    attend(good)
    with pytest.raises(ValueError, match="segments_BT must count documents upwards"):
        attend(back)
    checked = jax.jit(checkify.checkify(jax.jit(attend)))
    assert checked(good)[0].get() is None
    assert "segments_BT must count documents upwards" in checked(back)[0].get()


def test_second_derivatives_are_refused():
    (q, k, v, _), _, log_decay_H = inputs(1, 2, 8, 4, 4, "float32", (0.5, 1e-3))
    slope = jax.grad(lambda q: lightning_attention(q, k, v, log_decay_H)[0].sum() ** 2)
    for second in (jax.grad(lambda q: slope(q).sum()), jax.jit(jax.grad(lambda q: slope(q).sum()))):
        with pytest.raises(NotImplementedError, match="no second derivatives"):
            second(q)
