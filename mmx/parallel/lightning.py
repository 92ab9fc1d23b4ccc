"""Lightning attention with the sequence cut across devices (LASP+, paper section 3.3), and documents cut anywhere.

Device x of X holds T tokens in a row; every letter here is a local extent. A state is K x V however long the sequence,
so states travel, never tokens. Let a shard's real tokens begin at place `enter` and end before place `leave`:

    own_x   = sum_t exp(g (leave_x - 1 - t)) k_t^T v_t          over the tokens t of its last document
    state_x = w(given, x) given + sum_{y < x} w(y, x) own_y     w(y, x) = exp(g (enter_x - leave_y)) where shard y's last
                                                                document is shard x's first, else 0
    o       = the kernel over x's tokens, beginning with state_x

The backward pass is its mirror: own_x = sum_t exp(g (t + 1 - enter_x)) q_t^T do_t over the tokens of x's first document,
w transposed, and the kernel's backward pass ending with what arrives. Each way costs one more product, 2 K V FLOPs per
token and head (a quarter of the kernel's with chunks of K tokens), and one exchange. The alternative, the kernel from a
zero state and o += a_t q_t state_x afterwards, has a product as large, moves o three times and rounds it twice, and its
exchange waits for the whole kernel; this one waits for k and v alone, so it can run under what makes q and the gate.

One exchange moves float32 states of B H K V numbers, either way, whichever is less (received by a device, in states):

    all-gather                          X - 1
    prefix in log steps (ppermute)      1 + ceil(log2(X - 1)), and 2 (X - 1) / X more for the state after the last token

which is the first up to X = 6. With documents their places go round too, once, and are kept: 16 bytes a row and device.
"""
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mmx.dims import check
from mmx.kernels import lightning


class Marks(NamedTuple):
    """Places on the time axis and whose documents they lie in: [X, B] of all shards, [B] of one; B is 1 without documents."""
    place: jax.Array
    document: jax.Array

    def of(self, x):
        return Marks(self.place[x], self.document[x])


def lightning_attention(q_BHTK, k_BHTK, v_BHTV, log_decay_H, *, axis, segments_BT=None, state_BHKV=None, impl=None,
                        chunk=None):
    """`kernels.lightning.lightning_attention` of a sequence cut along the mesh axis `axis`, inside `jax.shard_map`.

    Args are the kernel's, with T tokens of the sequence on each device in order; documents count upwards over the whole
    sequence. The state is given and returned whole on every device: that before the first device's first token and
    that after the last (real) token of all. Pallas kernels run where shard_map has check_vma=False, XLA either way.
    """
    (B, H, _, K), V = q_BHTK.shape, v_BHTV.shape[3]
    dtype = jnp.promote_types(q_BHTK.dtype, jnp.float32)
    state_BHKV = jnp.zeros((B, H, K, V), dtype) if state_BHKV is None else state_BHKV.astype(dtype)
    check(state_BHKV, "BHKV", "state_BHKV", B=B, H=H, K=K, V=V)
    # Over other mesh axes (rows, heads) the state varies as the tokens do, and its gradient with it.
    others = _varying(q_BHTK) - _varying(state_BHKV) - {axis}
    state_BHKV = lax.pcast(state_BHKV, tuple(others), to="varying") if others else state_BHKV
    return _attention(q_BHTK, k_BHTK, v_BHTV, jnp.asarray(log_decay_H, dtype), segments_BT, state_BHKV, axis, impl, chunk)


def bytes_per_device(B: int, H: int, K: int, V: int, axis_size: int, last: bool = True) -> int:
    """What a device receives in one exchange, so in the forward or in the backward pass; documents' places apart.

    `last`: whether the state after the last token is used (backward: the gradient of the given one).
    """
    X = axis_size
    states = X - 1 if _gathers(X) else 1 + _doublings(X) + last * 2 * (X - 1) / X
    return int(states * B * H * K * V * 4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attention(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, axis, impl, chunk):
    return _forward(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, axis, impl, chunk)[0]


def _forward(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, axis, impl, chunk):
    enter, leave = _marks(segments_BT, q_BHTK.shape[2], axis)
    with jax.named_scope("own_state"):
        own_BHKV = _own(k_BHTK, v_BHTV, log_decay_H, segments_BT, leave, axis, before=True)
    arriving_BHKV, last_BHKV = _exchange(own_BHKV, state_BHKV, leave, enter, log_decay_H, axis)

    def kernel(*args):
        return lightning.lightning_attention(*args[:3], log_decay_H, segments_BT=segments_BT, state_BHKV=args[3],
                                             impl=impl, chunk=chunk)
    (o_BHTV, _), pull = jax.vjp(kernel, q_BHTK, k_BHTK, v_BHTV, arriving_BHKV)
    return (o_BHTV, last_BHKV), (pull, q_BHTK, log_decay_H, segments_BT, enter, leave)


def _backward(axis, impl, chunk, residuals, cotangents):
    pull, q_BHTK, log_decay_H, segments_BT, enter, leave = residuals
    do_BHTV, dlast_BHKV = cotangents
    tracked = axis in _varying(q_BHTK)
    if not tracked:     # without check_vma every device has a share of the last state's gradient, and returns one
        dlast_BHKV = lax.psum(dlast_BHKV, axis)
    with jax.named_scope("own_state"):
        own_BHKV = _own(q_BHTK, do_BHTV, log_decay_H, segments_BT, enter, axis, before=False)
    arriving_BHKV, dstate_BHKV = _exchange(own_BHKV, dlast_BHKV, enter, leave, log_decay_H, axis, reverse=True)
    if not tracked:
        dstate_BHKV = jnp.where(lax.axis_index(axis) == 0, dstate_BHKV, 0)
    dq_BHTK, dk_BHTK, dv_BHTV, _ = pull((do_BHTV, arriving_BHKV))
    return dq_BHTK, dk_BHTK, dv_BHTV, jnp.zeros_like(log_decay_H), None, dstate_BHKV


_attention.defvjp(_forward, _backward)


def _marks(segments_BT, T, axis):
    """Where every shard's real tokens begin and end, and in which documents.

    A shard without any begins and ends where the one before it ends; the first ones, where the first real token is.
    """
    X = lax.axis_size(axis)
    place_X1 = jnp.arange(X)[:, None] * T
    if segments_BT is None:
        return Marks(place_X1, jnp.ones_like(place_X1)), Marks(place_X1 + T, jnp.ones_like(place_X1))
    real_BT = segments_BT > 0
    most = jnp.iinfo(jnp.int32).max
    first_B = jnp.where(real_BT, segments_BT, most).min(1)
    mine_4B = jnp.stack([jnp.argmax(real_BT, 1), T - jnp.argmax(real_BT[:, ::-1], 1), first_B, segments_BT.max(1)])
    with jax.named_scope("documents"):      # '4 B -> X 4 B': 16 B (X - 1) bytes
        marks_X4B = lax.all_gather(mine_4B.astype(jnp.int32), axis, to="invarying")
    empty_XB = marks_X4B[:, 3] == 0

    def filled(place_XB, document_XB, place, document):
        return jnp.where(empty_XB, place, place_XB), jnp.where(empty_XB, document, document_XB)
    start_XB, stop_XB = marks_X4B[:, 0] + place_X1, marks_X4B[:, 1] + place_X1
    begin_B = jnp.where(empty_XB, most, start_XB).min(0)
    leave = Marks(*(lax.cummax(x) for x in filled(stop_XB, marks_X4B[:, 3], begin_B, marks_X4B[:, 2].min(0))))
    return Marks(*filled(start_XB, marks_X4B[:, 2], *leave)), leave


def _own(x_BHTK, y_BHTV, log_decay_H, segments_BT, marks, axis, before):
    """The sum of decayed x_t^T y_t over the tokens of a mark's document, on this mark's side."""
    T = x_BHTK.shape[2]
    mark = marks.of(lax.axis_index(axis))
    place_T = lax.axis_index(axis) * T + jnp.arange(T)
    age_BT = mark.place[:, None] - 1 - place_T if before else place_T + 1 - mark.place[:, None]
    weight_BHT = jnp.exp(log_decay_H[:, None] * jnp.abs(age_BT)[:, None].astype(log_decay_H.dtype))
    if segments_BT is not None:
        weight_BHT = jnp.where((segments_BT == mark.document[:, None])[:, None], weight_BHT, 0)
    y_BHTV = (y_BHTV * weight_BHT[..., None]).astype(y_BHTV.dtype)      # rounded as the kernels do
    precision = None if y_BHTV.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    return jnp.einsum("BHTK,BHTV->BHKV", x_BHTK, y_BHTV, precision=precision, preferred_element_type=log_decay_H.dtype)


def _exchange(own_BHKV, given_BHKV, sources, targets, log_decay_H, axis, reverse=False):
    """What arrives at this device's target mark, and what comes out of the row of devices at its end.

    Every device's own state leaves from its source mark, the given one from the first target; forward they move to
    higher device numbers, in reverse to lower ones.
    """
    X, x, way = lax.axis_size(axis), lax.axis_index(axis), -1 if reverse else 1
    first, last = (X - 1, 0) if reverse else (0, X - 1)
    mine = targets.of(x)
    arriving_BHKV = _decay(targets.of(first), mine, log_decay_H) * given_BHKV
    if _gathers(X):
        with jax.named_scope("states"):     # 'B H K V -> X B H K V': (X - 1) B H K V float32 received
            own_XBHKV = lax.all_gather(own_BHKV, axis, to="invarying")
        behind_X = way * jnp.arange(X) < way * x
        weight_XBH11 = jnp.where(behind_X[:, None, None, None, None], _decay(sources, mine, log_decay_H), 0)
        arriving_BHKV += jnp.sum(weight_XBH11 * own_XBHKV, 0)
        last_BHKV = jnp.sum(_decay(sources, sources.of(last), log_decay_H) * own_XBHKV, 0)
        return arriving_BHKV, last_BHKV + _decay(targets.of(first), sources.of(last), log_decay_H) * given_BHKV

    def shift(state_BHKV, steps, marks):
        with jax.named_scope("states"):     # 'B H K V -> B H K V': B H K V float32 received
            state_BHKV = lax.ppermute(state_BHKV, axis, [(y, y + way * steps) for y in range(X) if 0 <= y + way * steps < X])
        return _decay(marks.of(jnp.clip(x - way * steps, 0, X - 1)), mine, log_decay_H) * state_BHKV
    sum_BHKV = shift(own_BHKV, 1, sources)
    for n in range(_doublings(X)):
        sum_BHKV += shift(sum_BHKV, 2 ** n, targets)
    arriving_BHKV += sum_BHKV
    last_BHKV = own_BHKV + _decay(mine, sources.of(last), log_decay_H) * arriving_BHKV
    with jax.named_scope("last_state"):     # 'B H K V -> B H K V': 2 (X - 1) / X of B H K V float32, nothing where unused
        return arriving_BHKV, lax.psum(jnp.where(x == last, last_BHKV, 0), axis)


def _decay(a: Marks, b: Marks, log_decay_H):
    """How much of a state at one mark is left at the other, by row and head: [..., B, H, 1, 1]; 0 in another document."""
    time_B1 = jnp.abs(a.place - b.place)[..., None].astype(log_decay_H.dtype)
    left_BH = jnp.where((a.document == b.document)[..., None], jnp.exp(log_decay_H * time_B1), 0)
    return left_BH[..., None, None]


def _gathers(X: int) -> bool:
    return X - 1 <= 1 + _doublings(X) + 2 * (X - 1) / X


def _doublings(X: int) -> int:
    return math.ceil(math.log2(X - 1)) if X > 1 else 0


def _varying(x) -> frozenset:
    """The mesh axes over which x may differ, as far as `shard_map` tracks it (check_vma)."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)
