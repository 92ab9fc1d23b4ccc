"""Softmax attention with the sequence cut across devices: ring attention over packed documents (paper section 3.3).

Device x of X keeps its T queries; keys, values and their documents go round the ring, unrepeated (G heads). Step i brings
those of device (x - i) mod X, and results over parts of the keys are joined in float32 by their log-sum-exp,

    lse = log(exp(lse_1) + exp(lse_2))      o = exp(lse_1 - lse) o_1 + exp(lse_2 - lse) o_2.

The backward pass sends k and v round once more: with the whole lse and o every pair's gradient stands by itself,

    p = exp(z - lse)    dz = p (do . v - o . do)        (kernels.attention.xla)

dq stays, dk and dv travel behind k and v and are home after X steps. Memory is linear in T; nothing of a step is kept.

Keys of later devices are seen by no query, so with the sequence cut in order device x works off x + 1/2 squares of T x T,
X / 2 on average, and the last one sets the pace. Balanced, the sequence is cut into 2 X blocks and device x holds blocks x and
2 X - 1 - x (`zigzag`). Every step is then half a square for every device, with no mask but the documents':

    keys of an earlier device:  all queries see its first block, none its second
    keys of a later device:     the queries of the second block see all, those of the first none
    its own:                    causal in the order they lie in

Whatever a step's queries cannot see, keys of the future or of documents that have ended, costs no product: the work is
inside a `lax.switch`, the exchange outside it, and the next keys are under way while these are met. A device receives
X - 1 times its own keys and values (with documents, 4 bytes a token more) in each pass, as if the sequence were gathered,
and in the backward pass X times their gradients in float32.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mmx.kernels.attention import softmax_attention as attention
from mmx.kernels.attention import xla


def softmax_attention(q_BHTK, k_BGTK, v_BGTV, *, axis, segments_BT=None, impl=None, balanced=False):
    """`kernels.attention.softmax_attention` of a sequence cut along the mesh axis `axis`, inside `jax.shard_map`.

    Args:
      q_BHTK, k_BGTK, v_BGTV: this device's tokens; the devices hold the sequence in order, or in that of `zigzag`.
      segments_BT: their documents, which count upwards over the whole sequence; 0 is padding. None: one document.
      impl: of a device's attention to its own keys (the libraries' kernels run where shard_map has check_vma=False). Keys
        of others are met in XLA blocks, which alone take them.
      balanced: whether the devices hold the order of `zigzag`.

    Returns o_BHTV in q's dtype; zero for a query that sees nothing.
    """
    if balanced and q_BHTK.shape[2] % 2:
        raise ValueError(f"T={q_BHTK.shape[2]} tokens a device are no two blocks; balanced=True needs an even number")
    return _ring(q_BHTK, k_BGTK, v_BGTV, segments_BT, axis, impl, balanced)


def zigzag(T: int, axis_size: int) -> np.ndarray:
    """The order of T tokens that gives device x, cut evenly, blocks x and 2 X - 1 - x: `x_BTD[:, zigzag(T, X)]`."""
    if T % (2 * axis_size):
        raise ValueError(f"T={T} does not split into 2 x {axis_size} blocks")
    blocks = np.arange(T).reshape(2 * axis_size, -1)
    return np.stack([blocks[:axis_size], blocks[:axis_size - 1:-1]], 1).reshape(-1)


def unzigzag(T: int, axis_size: int) -> np.ndarray:
    """The order that undoes `zigzag`."""
    return np.argsort(zigzag(T, axis_size))


def to_zigzag(x, axis, time: int):
    """The order of `zigzag`, from the sequence's, of an array that is cut along `time`; inside `jax.shard_map`.

    Lightning layers need the sequence in order: a hybrid changes the order of a softmax layer's inputs, and back.
    """
    blocks = [lax.ppermute(block, axis, there) for block, there in zip(jnp.split(x, 2, time), _moves(axis))]
    return _by_parity(blocks, axis, time)


def from_zigzag(x, axis, time: int):
    """The sequence's order, from that of `zigzag`."""
    even, odd = jnp.split(_by_parity(jnp.split(x, 2, time), axis, time), 2, time)
    back = [[(b, a) for a, b in there] for there in _moves(axis)]
    return jnp.concatenate([lax.ppermute(even, axis, back[0]), lax.ppermute(odd, axis, back[1])], time)


def _moves(axis):
    """From where to where the even blocks go, and the odd ones: one to each device."""
    X = lax.axis_size(axis)
    return [[(b // 2, min(b, 2 * X - 1 - b)) for b in range(parity, 2 * X, 2)] for parity in (0, 1)]


def _by_parity(blocks, axis, time):
    """A device's blocks, the even one first, in the order they lie in, or the other way round: one is even, one odd."""
    swap = lax.axis_index(axis) % 2 == 1
    return jnp.concatenate([jnp.where(swap, *blocks[::-1]), jnp.where(swap, *blocks)], time)


def bytes_per_device(B: int, G: int, T: int, K: int, V: int, axis_size: int, itemsize: int = 4, documents: bool = False,
                     backward: bool = False) -> int:
    """What a device of so many tokens receives in one pass; gathering the sequence's keys and values costs as much forward."""
    steps = (axis_size - 1) * (G * (K + V) * itemsize + 4 * documents)
    return B * T * (steps + (axis_size > 1) * backward * axis_size * G * (K + V) * 4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _ring(q_BHTK, k_BGTK, v_BGTV, segments_BT, axis, impl, balanced):
    return _forward(q_BHTK, k_BGTK, v_BGTV, segments_BT, axis, impl, balanced)[0]


def _forward(q_BHTK, k_BGTK, v_BGTV, segments_BT, axis, impl, balanced):
    def meet(step, keys, carry):
        o_BHTV, lse_BHT = carry

        def part(rows, cols):
            k_BGSK, v_BGSV, segments_BS = _cut(keys, cols)
            q_BHQK, segments_BQ, o_BHQV, lse_BHQ = _cut((q_BHTK, segments_BT, o_BHTV, lse_BHT), rows)
            new_BHQV, new_BHQ = attention(q_BHQK, k_BGSK, v_BGSV, segments_BT=segments_BQ, segments_BS=segments_BS,
                                          start_B=_all_before(k_BGSK), return_lse=True)
            top_BHQ = jnp.logaddexp(lse_BHQ, new_BHQ)
            whole_BHQ = jnp.where(jnp.isneginf(top_BHQ), 0, top_BHQ)        # where nothing is seen yet
            old_BHQ1, new_BHQ1 = (jnp.exp(x - whole_BHQ)[..., None] for x in (lse_BHQ, new_BHQ))
            return _put(o_BHTV, o_BHQV * old_BHQ1 + new_BHQV * new_BHQ1, rows), _put(lse_BHT, top_BHQ, rows)
        return _switch(step, part, lambda: carry, segments_BT, keys[2], q_BHTK.shape[2], axis, balanced)

    o_BHTV, lse_BHT = attention(q_BHTK, k_BGTK, v_BGTV, segments_BT=segments_BT, impl=impl, return_lse=True)
    o_BHTV, lse_BHT = _around((k_BGTK, v_BGTV, segments_BT), (o_BHTV.astype(lse_BHT.dtype), lse_BHT), meet, axis)
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
    mine = q_BHTK, segments_BT, o_BHTV, lse_BHT, do_BHTV

    def meet(step, keys, carry):
        dq_BHTK, *dkv = carry
        nothing = tuple(jnp.zeros_like(x) for x in dkv)

        def part(rows, cols):
            dq_BHQK, *new = gradients(_cut(mine, rows), _cut(keys, cols), _all_before(_cut(keys[0], cols)))
            return _put(dq_BHTK, _cut(dq_BHTK, rows) + dq_BHQK, rows), *(_put(x, dx, cols) for x, dx in zip(nothing, new))
        dq_BHTK, *new = _switch(step, part, lambda: (dq_BHTK, *nothing), segments_BT, keys[2], q_BHTK.shape[2], axis, balanced)
        # added here and not in `part`: the sums of the devices before are under way while it works
        return dq_BHTK, *(x + dx for x, dx in zip(home(dkv), new))

    def home(dkv):
        with jax.named_scope("ring_gradients"):     # 'B G T/axis (K V)', one device on: B G T (K + V) float32
            return _on(dkv, axis)

    own = k_BGTK, v_BGTV, segments_BT
    dq_BHTK, *dkv = _around(own, gradients(mine, own, None), meet, axis)
    grads = dq_BHTK, *home(dkv)
    return *(g.astype(x.dtype) for g, x in zip(grads, residuals)), None


_ring.defvjp(_forward, _backward)


def _around(keys, carry, meet, axis):
    """meet(step, keys, carry) -> carry with the keys of every other device, the next ones under way meanwhile."""
    X = lax.axis_size(axis)
    if X == 1:
        return carry

    def on(keys):
        with jax.named_scope("ring"):       # 'B G T/axis (K V)', one device on: B G T (K + V) in k's dtype, B T int32
            return _on(keys, axis)

    def met(i, keys, carry):
        # Tied to the keys: in a scan over layers JAX works off ahead what hangs on the step alone, a switch's choice and the
        # nothings of its branches, and keeps those of every step, each as large as the queries.
        i, _ = lax.optimization_barrier((i, keys[0][0, 0, 0, 0]))
        return meet(i, keys, carry)

    def step(i, both):
        keys, carry = both
        return on(keys), met(i, keys, carry)
    keys, carry = lax.fori_loop(1, X - 1, step, (on(keys), carry))
    return met(X - 1, keys, carry)


def _on(arrays, axis):
    X = lax.axis_size(axis)
    return jax.tree.map(lambda x: lax.ppermute(x, axis, [(y, (y + 1) % X) for y in range(X)]), arrays)


def _switch(step, part, nothing, segments_BT, segments_BS, T, axis, balanced):
    """The work of one step: `part` of the queries with part of the keys, or `nothing` where none sees any."""
    whole, front, back = slice(0, T), slice(0, T // 2), slice(T // 2, T)
    later = (step > lax.axis_index(axis)).astype(int)       # keys that came round past device 0
    parts = ((whole, front), (back, whole)) if balanced else ((whole, whole),)
    which = later if balanced else -later
    if segments_BT is not None:
        which = jnp.where(jnp.stack([_meet(_cut(segments_BT, rows), _cut(segments_BS, cols)) for rows, cols in parts])[which],
                          which, -1)
    return lax.switch(which + 1, [nothing, *(functools.partial(part, *p) for p in parts)])


def _meet(segments_BT, segments_BS):
    """Whether some row's keys reach into its queries' first document, so that not all of theirs ended before."""
    first_B = jnp.where(segments_BT > 0, segments_BT, jnp.iinfo(segments_BT.dtype).max).min(1)
    return (first_B <= segments_BS.max(1)).any()


def _all_before(k_BGSK):
    """Starts for queries that all the keys lie before."""
    return jnp.full(k_BGSK.shape[0], k_BGSK.shape[2])


def _cut(arrays, at):
    return jax.tree.map(lambda x: x[:, at] if x.ndim == 2 else x[:, :, at], arrays)


def _put(x_BHTK, x_BHQK, at):
    # no scatter: XLA of jaxlib 0.11.2 dies at one that replaces the whole of a device's part
    return lax.dynamic_update_slice_in_dim(x_BHTK, x_BHQK, at.start, 2)
