"""What chunks know of a row's documents: the span in which time passes, and the document that the state holds between them.

Documents only rise along a row, so the state's is the largest so far; the given state belongs to the first real one.
"""
import jax
import jax.numpy as jnp


def bounds(segments_BT):
    """The first real token of each row and one past its last, B x 2: time stands still outside. (0, 0) without one."""
    real_BT = segments_BT > 0
    end_B = jnp.max(jnp.where(real_BT, jnp.arange(1, real_BT.shape[1] + 1), 0), axis=1)
    return jnp.stack([jnp.argmax(real_BT, axis=1), end_B], 1).astype(jnp.int32)


def between(segments_BT, Q):
    """The state's document before every chunk of Q tokens, and after the last, B x (N + 1)."""
    first_B1 = jnp.min(jnp.where(segments_BT > 0, segments_BT, jnp.iinfo(jnp.int32).max), axis=1, keepdims=True)
    padded_BT = jnp.pad(segments_BT, ((0, 0), (0, -segments_BT.shape[1] % Q)))
    last_BN = jax.lax.cummax(padded_BT.reshape(len(padded_BT), -1, Q).max(2), axis=1)
    return jnp.maximum(jnp.pad(last_BN, ((0, 0), (1, 0))), first_B1)
