"""Partial rotary embedding against float64, at positions up to 16M."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.kernels.rope import rope

POSITIONS = np.array([[0, 1, 2, 511, 4095, 4096], [65_537, 1_000_003, 4_000_000, 4_194_303, 10_239_999, 16_777_215]])


def exact(x, positions, rotary_dim, theta):
    x, half = np.asarray(x, np.float64), rotary_dim // 2
    angle = positions[:, None, :, None] * theta ** (-np.arange(half) / half)
    low, high = x[..., :half], x[..., half:rotary_dim]
    rotated = low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)
    return np.concatenate([*rotated, x[..., rotary_dim:]], -1)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 4e-3)])
@pytest.mark.parametrize("rotary_dim, theta", [(2, 1e4), (8, 1e4), (16, 1e7), (32, 1e7)])
def test_against_float64(rotary_dim, theta, dtype, tolerance):
    x = jax.random.normal(jax.random.key(0), (2, 3, 6, 32)).astype(dtype)
    y = jax.jit(rope, static_argnames=("rotary_dim", "theta"))(x, POSITIONS, rotary_dim=rotary_dim, theta=theta)
    assert y.dtype == x.dtype
    want = exact(x, POSITIONS, rotary_dim, theta)
    np.testing.assert_allclose(y.astype(jnp.float32), want, atol=tolerance * np.abs(want).max())
    np.testing.assert_array_equal(y[..., rotary_dim:], x[..., rotary_dim:])


def test_scores_depend_only_on_the_distance():
    """The score of a query and a key stays the same if both positions are shifted."""
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 1, 6, 16))
    positions = np.array([[3, 5, 8, 100, 101, 900]])

    def scores(shift):
        return jnp.einsum("BHTK,BHSK->BHTS", *(rope(x, positions + shift, rotary_dim=16, theta=1e7) for x in (q, k)))

    np.testing.assert_allclose(scores(4_000_000), scores(0), atol=1e-4)


def test_zero_dims_change_nothing():
    x = jnp.ones((1, 1, 6, 4))
    np.testing.assert_array_equal(rope(x, POSITIONS[:1], rotary_dim=0, theta=1e4), x)


@pytest.mark.parametrize("rotary_dim", [3, 6, -2])
def test_errors(rotary_dim):
    with pytest.raises(ValueError, match=f"rotary_dim={rotary_dim} must be even and between 0 and K=4"):
        rope(jnp.ones((1, 1, 6, 4)), POSITIONS[:1], rotary_dim=rotary_dim, theta=1e4)
