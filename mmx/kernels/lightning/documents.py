"""Where the documents of a row begin and end, in the form that the kernels need.

Document numbers never decrease along a row, and 0 is padding. So after some tokens, the state belongs to the document with the
largest number so far. The initial state belongs to the first real document.
"""
import jax
import jax.numpy as jnp


def real_bounds(segments_BT):
    """Returns begin and end of each row, int32 B x 2; (0, 0) if all tokens are padding.

    begin is the index of the first real token, and end - 1 that of the last one. The state decays only between these bounds.
    """
    real_BT = segments_BT > 0
    end_B = jnp.max(jnp.where(real_BT, jnp.arange(1, real_BT.shape[1] + 1), 0), axis=1)
    return jnp.stack([jnp.argmax(real_BT, axis=1), end_B], 1).astype(jnp.int32)


def state_documents(segments_BT, Q):
    """Returns the document that the state belongs to before each chunk of Q tokens and after the last chunk, B x (N + 1).

    Example with Q = 2: the segments 0 0 0 3 3 5 give 3 3 3 5. Before the first real token, the state belongs to that token's
    document. If all tokens of a row are padding, the result is the largest int32.
    """
    first_B1 = jnp.min(jnp.where(segments_BT > 0, segments_BT, jnp.iinfo(jnp.int32).max), axis=1, keepdims=True)
    padded_BT = jnp.pad(segments_BT, ((0, 0), (0, -segments_BT.shape[1] % Q)))
    last_BN = jax.lax.cummax(padded_BT.reshape(len(padded_BT), -1, Q).max(2), axis=1)
    return jnp.maximum(jnp.pad(last_BN, ((0, 0), (1, 0))), first_B1)
