"""Ring attention: softmax attention with the sequence sharded over devices, for packed documents (paper section 3.3).

Each of the n devices of a mesh axis keeps its T queries, while keys, values and their documents travel around the ring, with
G heads (not repeated to H). In step i, device x receives those of device (x - i) mod n. Results over parts of the keys are
combined in float32 by their log-sum-exp:

    lse = log(exp(lse_1) + exp(lse_2))      o = exp(lse_1 - lse) o_1 + exp(lse_2 - lse) o_2

The backward pass sends k and v around once more. With the final lse and o, the gradient of each pair of query and key is
independent of the other pairs (kernels.attention.xla):

    p = exp(z - lse)    dz = p (do . v - o . do)

dq stays on its device. dk and dv travel with k and v and are back on their device after n steps. Memory is linear in T: no
step saves anything for the backward pass.

Balance: no query attends to keys of later devices. With the sequence sharded in order, device x therefore computes x + 1/2
squares of T x T scores, n / 2 on average, and the last device determines the time. With `balanced`, the sequence is split into
2 n blocks, and device x has blocks x and 2 n - 1 - x (`zigzag`). Then every device computes half a square in every step, and
needs no mask except the documents' mask:

    keys of an earlier device       all queries attend to its first block, none to its second
    keys of a later device          the second block's queries attend to all keys, the first block's to none
    the device's own keys           causal attention in the order in which they are stored

Keys that no query of a step can attend to (later keys, or keys of documents that have ended) cost no product: the products are
inside a `lax.switch`. The exchange is outside of it, and the next keys are received while the current ones are used.

A device receives n - 1 times its own keys and values in each pass (with documents, 4 more bytes a token), as many bytes as
gathering the sequence would take. In the backward pass it also receives n times their gradients in float32.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mmx.kernels.attention import softmax_attention as attention
from mmx.kernels.attention import xla


def softmax_attention(q_BHTK, k_BGTK, v_BGTV, *, axis, segments_BT=None, impl=None, balanced=False):
    """`kernels.attention.softmax_attention` of a sequence sharded over the mesh axis `axis`, inside `jax.shard_map`.

    Args:
      q_BHTK, k_BGTK, v_BGTV: this device's tokens. The devices have the sequence in order, or in the order of `zigzag`.
      axis: the mesh axis.
      segments_BT: documents of the tokens, numbered upwards over the whole sequence; 0 is padding. None: one document.
      impl: implementation of a device's attention to its own keys (library kernels need shard_map's check_vma=False).
        Attention to other devices' keys always uses XLA.
      balanced: whether the devices have the order of `zigzag`.
    Returns:
      o_BHTV in q's dtype; zero for a query that attends to nothing.
    """
    if balanced and q_BHTK.shape[2] % 2:
        raise ValueError(f"balanced=True needs an even number of tokens a device (two blocks), not T={q_BHTK.shape[2]}")
    return _ring(q_BHTK, k_BGTK, v_BGTV, segments_BT, axis, impl, balanced)


def zigzag(T: int, axis_size: int) -> np.ndarray:
    """Returns the order of T tokens that gives device x of n blocks x and 2 n - 1 - x: `x_BTD[:, zigzag(T, n)]`."""
    if T % (2 * axis_size):
        raise ValueError(f"T={T} must be divisible by the number of blocks, 2 x {axis_size}")
    blocks = np.arange(T).reshape(2 * axis_size, -1)
    return np.stack([blocks[:axis_size], blocks[:axis_size - 1:-1]], 1).reshape(-1)


def unzigzag(T: int, axis_size: int) -> np.ndarray:
    """Returns the order that undoes `zigzag`."""
    return np.argsort(zigzag(T, axis_size))


def to_zigzag(x, axis, time: int):
    """Reorders an array that is sharded along its axis `time` from the sequence's order to `zigzag`; inside `jax.shard_map`.

    Lightning layers need the sequence in order, so a hybrid reorders the inputs and outputs of each softmax layer.
    """
    # 'T/n -> T/n': a device receives its whole part once
    blocks = [lax.ppermute(block, axis, pairs) for block, pairs in zip(jnp.split(x, 2, time), _block_moves(axis))]
    return _swap_on_odd_devices(blocks, axis, time)


def from_zigzag(x, axis, time: int):
    """Reorders from `zigzag` back to the sequence's order."""
    even, odd = jnp.split(_swap_on_odd_devices(jnp.split(x, 2, time), axis, time), 2, time)
    back = [[(target, source) for source, target in pairs] for pairs in _block_moves(axis)]
    return jnp.concatenate([lax.ppermute(even, axis, back[0]), lax.ppermute(odd, axis, back[1])], time)


def _block_moves(axis):
    """The (source, target) devices of the even blocks, and those of the odd ones: each device receives one of both."""
    n = lax.axis_size(axis)
    return [[(b // 2, min(b, 2 * n - 1 - b)) for b in range(parity, 2 * n, 2)] for parity in (0, 1)]


def _swap_on_odd_devices(blocks, axis, time):
    """Concatenates a device's even and odd block as in `zigzag`, or reverses that: odd devices have the odd one first."""
    swap = lax.axis_index(axis) % 2 == 1
    return jnp.concatenate([jnp.where(swap, *blocks[::-1]), jnp.where(swap, *blocks)], time)


def bytes_per_device(tokens: int, width: int, axis_size: int, itemsize: int = 4, documents: bool = False,
                     backward: bool = False) -> int:
    """Returns the bytes that a device receives in one pass.

    The forward pass receives as many as gathering the sequence's keys and values would.

    Args:
      tokens: tokens of one device, B T.
      width: numbers in the keys and values of one token, G (K + V).
      axis_size: devices of the ring.
      itemsize: bytes of one of these numbers.
      documents: whether the sequence has documents.
      backward: whether the pass is the backward pass.
    """
    steps = (axis_size - 1) * (width * itemsize + 4 * documents)
    return tokens * (steps + (axis_size > 1) * backward * axis_size * width * 4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _ring(q_BHTK, k_BGTK, v_BGTV, segments_BT, axis, impl, balanced):
    return _forward(q_BHTK, k_BGTK, v_BGTV, segments_BT, axis, impl, balanced)[0]


def _forward(q_BHTK, k_BGTK, v_BGTV, segments_BT, axis, impl, balanced):
    def attend(step, keys, carry):
        o_BHTV, lse_BHT = carry

        def part(rows, cols):
            k_BGSK, v_BGSV, segments_BS = _slice(keys, cols)
            q_BHQK, segments_BQ, o_BHQV, lse_BHQ = _slice((q_BHTK, segments_BT, o_BHTV, lse_BHT), rows)
            new_BHQV, new_BHQ = attention(q_BHQK, k_BGSK, v_BGSV, segments_BT=segments_BQ, segments_BS=segments_BS,
                                          start_B=_after_all(k_BGSK), return_lse=True)
            sum_BHQ = jnp.logaddexp(lse_BHQ, new_BHQ)
            finite_BHQ = jnp.where(jnp.isneginf(sum_BHQ), 0, sum_BHQ)       # -inf: this query has attended to nothing yet
            old_BHQ1, new_BHQ1 = (jnp.exp(x - finite_BHQ)[..., None] for x in (lse_BHQ, new_BHQ))
            return _update(o_BHTV, o_BHQV * old_BHQ1 + new_BHQV * new_BHQ1, rows), _update(lse_BHT, sum_BHQ, rows)
        return _switch(step, part, lambda: carry, (segments_BT, keys[2]), q_BHTK.shape[2], axis, balanced)

    o_BHTV, lse_BHT = attention(q_BHTK, k_BGTK, v_BGTV, segments_BT=segments_BT, impl=impl, return_lse=True)
    o_BHTV, lse_BHT = _around((k_BGTK, v_BGTV, segments_BT), (o_BHTV.astype(lse_BHT.dtype), lse_BHT), attend, axis)
    o_BHTV = o_BHTV.astype(q_BHTK.dtype)
    return o_BHTV, (q_BHTK, k_BGTK, v_BGTV, segments_BT, o_BHTV, lse_BHT)


def _backward(axis, impl, balanced, residuals, do_BHTV):
    q_BHTK, k_BGTK, v_BGTV, segments_BT, o_BHTV, lse_BHT = residuals
    wide = functools.partial(jax.tree.map, lambda x: x.astype(lse_BHT.dtype))

    def gradients(queries, keys, start_B):
        q_BHQK, segments_BQ, o_BHQV, lse_BHQ, do_BHQV = queries
        k_BGSK, v_BGSV, segments_BS = keys
        blocks = xla.block_sizes(q_BHQK.shape[2], k_BGSK.shape[2])
        inputs = q_BHQK, k_BGSK, v_BGSV, segments_BQ, segments_BS, start_B, o_BHQV, lse_BHQ
        return wide(xla.backward(*blocks, 0, inputs, (do_BHQV, jnp.zeros_like(lse_BHQ)))[:3])
    own_queries = q_BHTK, segments_BT, o_BHTV, lse_BHT, do_BHTV

    def attend(step, keys, carry):
        dq_BHTK, *dkv = carry
        zeros = tuple(jnp.zeros_like(x) for x in dkv)

        def part(rows, cols):
            dq_BHQK, *new = gradients(_slice(own_queries, rows), _slice(keys, cols), _after_all(_slice(keys[0], cols)))
            return (_update(dq_BHTK, _slice(dq_BHTK, rows) + dq_BHQK, rows),
                    *(_update(x, dx, cols) for x, dx in zip(zeros, new)))
        dq_BHTK, *new = _switch(step, part, lambda: (dq_BHTK, *zeros), (segments_BT, keys[2]), q_BHTK.shape[2], axis, balanced)
        # Added here and not in `part`: the earlier devices' sums are received while `part` computes.
        return dq_BHTK, *(x + dx for x, dx in zip(shift(dkv), new))

    def shift(dkv):
        with jax.named_scope("ring_gradients"):     # 'B G T/n (K V)' to the next device: B G T (K + V) float32
            return _to_next(dkv, axis)

    own_keys = k_BGTK, v_BGTV, segments_BT
    dq_BHTK, *dkv = _around(own_keys, gradients(own_queries, own_keys, None), attend, axis)
    grads = dq_BHTK, *shift(dkv)
    return *(g.astype(x.dtype) for g, x in zip(grads, residuals)), None


_ring.defvjp(_forward, _backward)


def _around(keys, carry, attend, axis):
    """Applies attend(step, keys, carry) -> carry to every other device's keys, and receives the next ones at the same time."""
    n = lax.axis_size(axis)
    if n == 1:
        return carry

    def shift(keys):
        with jax.named_scope("ring"):       # 'B G T/n (K V)' to the next device: B G T (K + V) in k's dtype, B T int32
            return _to_next(keys, axis)

    def attend_now(i, keys, carry):
        # The barrier makes the step number depend on the keys. Without it, in a scan over layers, JAX computes in advance
        # whatever depends on the step number alone (the switch's index, the zeros of its branches) and stores it for every
        # step; each of these arrays is as large as the queries.
        i, _ = lax.optimization_barrier((i, keys[0][0, 0, 0, 0]))
        return attend(i, keys, carry)

    def step(i, state):
        keys, carry = state
        return shift(keys), attend_now(i, keys, carry)
    keys, carry = lax.fori_loop(1, n - 1, step, (shift(keys), carry))
    return attend_now(n - 1, keys, carry)


def _to_next(arrays, axis):
    n = lax.axis_size(axis)
    return jax.tree.map(lambda x: lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)]), arrays)


def _switch(step, part, unchanged, segments, T, axis, balanced):
    """Computes one step: part(rows, cols) for slices of the queries and keys, or unchanged() if no query attends to a key.

    `segments`: the queries' segments_BT and the keys' segments_BS, or None.
    """
    everything, front, back = slice(0, T), slice(0, T // 2), slice(T // 2, T)
    later = (step > lax.axis_index(axis)).astype(int)       # 1: keys of a later device, which have passed the ring's end
    parts = ((everything, front), (back, everything)) if balanced else ((everything, everything),)
    index = later if balanced else -later
    segments_BT, segments_BS = segments
    if segments_BT is not None:
        attends = jnp.stack([_attends(_slice(segments_BT, rows), _slice(segments_BS, cols)) for rows, cols in parts])
        index = jnp.where(attends[index], index, -1)
    return lax.switch(index + 1, [unchanged, *(functools.partial(part, *p) for p in parts)])


def _attends(segments_BT, segments_BS):
    """Whether in some row the keys' last document is not before the queries' first one. If not, those documents have ended."""
    first_B = jnp.where(segments_BT > 0, segments_BT, jnp.iinfo(segments_BT.dtype).max).min(1)
    return (first_B <= segments_BS.max(1)).any()


def _after_all(k_BGSK):
    """start_B of queries that come after all the keys."""
    return jnp.full(k_BGSK.shape[0], k_BGSK.shape[2])


def _slice(arrays, at):
    """Slices time, which is axis 1 of segments and axis 2 of all other arrays."""
    return jax.tree.map(lambda x: x[:, at] if x.ndim == 2 else x[:, :, at], arrays)


def _update(x_BHTK, x_BHQK, at):
    # no scatter: XLA of jaxlib 0.11.2 crashes on a scatter that replaces a device's whole part
    return lax.dynamic_update_slice_in_dim(x_BHTK, x_BHQK, at.start, 2)
