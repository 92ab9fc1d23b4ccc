"""Lightning attention with the sequence sharded over devices (LASP+, paper section 3.3); documents may span several devices.

The n devices of a mesh axis hold T consecutive tokens each. A state has K x V numbers however long the sequence is, so devices
exchange states and never tokens. Let start_i be the position of device i's first real token in the whole sequence, and end_i
the position after its last one:

    own_i   = sum_t exp(g (end_i - 1 - t)) k_t^T v_t            over the tokens t of device i's last document
    state_i = w(given, i) given + sum_{j < i} w(j, i) own_j     w(j, i) = exp(g (start_i - end_j)) if device j's last document
                                                                is device i's first document, else 0
    o       = the kernel over device i's tokens with the initial state state_i

The backward pass mirrors this: own_i = sum_t exp(g (t + 1 - start_i)) q_t^T do_t over the tokens of device i's first document,
w is transposed, and the received state is the gradient of the kernel's last state. Each pass costs one more product, 2 K V
FLOPs per token and head (a quarter of the kernel's FLOPs with chunks of K tokens), and one exchange.

The alternative is to run the kernel from a zero state and to add a_t q_t state_i to o. That product is as large, it reads and
writes o three times, rounds it twice, and its exchange waits for the whole kernel. The exchange here waits for k and v alone,
so it can overlap with the projections of q and the gate.

Each pass uses the cheaper of two exchanges of float32 states with B H K V numbers. A device receives this many states:

    all-gather                          n - 1
    prefix sum by ppermute, log steps   1 + ceil(log2(n - 1)), and 2 (n - 1) / n more for the state after the last token

All-gather is cheaper up to n = 6. With documents, the devices also exchange their boundaries once, 16 bytes a row and device,
and keep them for the backward pass. Letters are those of `mmx.dims` with local extents, and d for the devices of the mesh axis.
"""
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mmx.dims import check
from mmx.kernels import lightning
from mmx.kernels.dtypes import wide_dtype


class Kernel(NamedTuple):
    """Arguments of `kernels.lightning.lightning_attention` that select its implementation."""
    impl: str | None = None
    chunk: int | None = None


DEFAULT_KERNEL = Kernel()


class Boundary(NamedTuple):
    """Positions on the time axis and the documents there: [d, B] for all devices, [B] for one. B is 1 without documents."""
    position: jax.Array
    document: jax.Array

    def of(self, device):
        return Boundary(self.position[device], self.document[device])


def lightning_attention(q_BHTK, k_BHTK, v_BHTV, log_decay_H, *, axis, segments_BT=None, state_BHKV=None, kernel=DEFAULT_KERNEL):
    """`kernels.lightning.lightning_attention` of a sequence sharded over the mesh axis `axis`, inside `jax.shard_map`.

    Args:
      q_BHTK, k_BHTK, v_BHTV, log_decay_H: as for the kernel; each device has T tokens, in the order of the devices.
      axis: the mesh axis.
      segments_BT: documents of the tokens, numbered upwards over the whole sequence; 0 is padding. None: one document.
      state_BHKV: the state before the first token of the first device, the same on every device of `axis`. None: zeros.
      kernel: the kernel's implementation. Pallas kernels need shard_map's check_vma=False, XLA works with either value.
    Returns:
      o_BHTV, and the state after the last real token of all devices, the same on every device of `axis`.
    """
    (B, H, _, K), V = q_BHTK.shape, v_BHTV.shape[3]
    dtype = wide_dtype(q_BHTK.dtype)
    state_BHKV = jnp.zeros((B, H, K, V), dtype) if state_BHKV is None else state_BHKV.astype(dtype)
    check(state_BHKV, "BHKV", "state_BHKV", B=B, H=H, K=K, V=V)
    # Over other mesh axes (rows, heads) the state varies as the tokens do, and its gradient with it.
    others = _varying_axes(q_BHTK) - _varying_axes(state_BHKV) - {axis}
    state_BHKV = lax.pcast(state_BHKV, tuple(others), to="varying") if others else state_BHKV
    return _attention(q_BHTK, k_BHTK, v_BHTV, jnp.asarray(log_decay_H, dtype), segments_BT, state_BHKV, (axis, kernel))


def bytes_per_device(B: int, H: int, K: int, V: int, axis_size: int, last: bool = True) -> int:
    """Returns the bytes that a device receives in one exchange, which is one forward or one backward pass.

    The boundaries of documents are not included. `last`: whether the state after the last token is used (in the backward pass:
    the gradient of the initial state).
    """
    n = axis_size
    states = n - 1 if _use_all_gather(n) else 1 + _doublings(n) + last * 2 * (n - 1) / n
    return int(states * B * H * K * V * 4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, settings):
    return _forward(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, settings)[0]


def _forward(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, settings):
    axis, kernel = settings
    start, end = _boundaries(segments_BT, q_BHTK.shape[2], axis)
    with jax.named_scope("own_state"):
        own_BHKV = _own_state((k_BHTK, v_BHTV), log_decay_H, segments_BT, end, axis, backward=False)
    initial_BHKV, last_BHKV = _exchange(own_BHKV, state_BHKV, end, start, log_decay_H, axis)

    def attend(q_BHTK, k_BHTK, v_BHTV, state_BHKV):
        return lightning.lightning_attention(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT=segments_BT,
                                             state_BHKV=state_BHKV, impl=kernel.impl, chunk=kernel.chunk)
    (o_BHTV, _), pull = jax.vjp(attend, q_BHTK, k_BHTK, v_BHTV, initial_BHKV)
    return (o_BHTV, last_BHKV), (pull, q_BHTK, log_decay_H, segments_BT, start, end)


def _backward(settings, residuals, cotangents):
    axis, _ = settings
    pull, q_BHTK, log_decay_H, segments_BT, start, end = residuals
    do_BHTV, dlast_BHKV = cotangents
    tracked = axis in _varying_axes(q_BHTK)
    if not tracked:     # without check_vma each device has a part of the last state's gradient: sum them
        dlast_BHKV = lax.psum(dlast_BHKV, axis)     # 'B H K V -> B H K V', summed: 2 (n - 1) / n B H K V float32
    with jax.named_scope("own_state"):
        own_BHKV = _own_state((q_BHTK, do_BHTV), log_decay_H, segments_BT, start, axis, backward=True)
    dfinal_BHKV, dstate_BHKV = _exchange(own_BHKV, dlast_BHKV, start, end, log_decay_H, axis, reverse=True)
    if not tracked:     # shard_map sums the devices' results: return the gradient once
        dstate_BHKV = jnp.where(lax.axis_index(axis) == 0, dstate_BHKV, 0)
    dq_BHTK, dk_BHTK, dv_BHTV, _ = pull((do_BHTV, dfinal_BHKV))
    return dq_BHTK, dk_BHTK, dv_BHTV, jnp.zeros_like(log_decay_H), None, dstate_BHKV


_attention.defvjp(_forward, _backward)


def _boundaries(segments_BT, T, axis):
    """Returns the start and the end of every device's real tokens.

    A device with padding only starts and ends where the device before it ends. If there is no real token before it, it starts
    and ends at the first real token of the sequence.
    """
    n = lax.axis_size(axis)
    offset_d1 = jnp.arange(n)[:, None] * T
    if segments_BT is None:
        one = jnp.ones_like(offset_d1)
        return Boundary(offset_d1, one), Boundary(offset_d1 + T, one)
    real_BT = segments_BT > 0
    largest = jnp.iinfo(jnp.int32).max
    first_B = jnp.where(real_BT, segments_BT, largest).min(1)
    own_4B = jnp.stack([jnp.argmax(real_BT, 1), T - jnp.argmax(real_BT[:, ::-1], 1), first_B, segments_BT.max(1)])
    with jax.named_scope("documents"):      # '4 B -> d 4 B': 16 B (n - 1) bytes
        all_d4B = lax.all_gather(own_4B.astype(jnp.int32), axis, to="invarying")
    empty_dB = all_d4B[:, 3] == 0

    def fill(position_dB, document_dB, position, document):
        return jnp.where(empty_dB, position, position_dB), jnp.where(empty_dB, document, document_dB)
    start_dB, end_dB = all_d4B[:, 0] + offset_d1, all_d4B[:, 1] + offset_d1
    begin_B = jnp.where(empty_dB, largest, start_dB).min(0)
    end = Boundary(*(lax.cummax(x) for x in fill(end_dB, all_d4B[:, 3], begin_B, all_d4B[:, 2].min(0))))
    return Boundary(*fill(start_dB, all_d4B[:, 2], *end)), end


def _own_state(factors, log_decay_H, segments_BT, boundary, axis, backward):
    """Returns the decayed sum of x_t^T y_t for `factors` (x, y), over this device's tokens of the boundary's document.

    x and y are k and v, decayed up to the end; in the backward pass q and do, decayed down to the start.
    """
    x_BHTK, y_BHTV = factors
    T = x_BHTK.shape[2]
    own = boundary.of(lax.axis_index(axis))
    position_T = lax.axis_index(axis) * T + jnp.arange(T)
    age_BT = position_T + 1 - own.position[:, None] if backward else own.position[:, None] - 1 - position_T
    weight_BHT = jnp.exp(log_decay_H[:, None] * jnp.abs(age_BT)[:, None].astype(log_decay_H.dtype))
    if segments_BT is not None:
        weight_BHT = jnp.where((segments_BT == own.document[:, None])[:, None], weight_BHT, 0)
    y_BHTV = (y_BHTV * weight_BHT[..., None]).astype(y_BHTV.dtype)      # rounded as the kernels do
    precision = None if y_BHTV.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    return jnp.einsum("BHTK,BHTV->BHKV", x_BHTK, y_BHTV, precision=precision, preferred_element_type=log_decay_H.dtype)


def _exchange(own_BHKV, given_BHKV, sources, targets, log_decay_H, axis, reverse=False):
    """Returns the state that this device receives, and the state after the last device.

    Each device's own state decays from its boundary in `sources` to the receiver's boundary in `targets`. The given state
    decays from the first device's boundary in `targets`. States move to higher device indices, in reverse to lower ones.
    """
    n, index, direction = lax.axis_size(axis), lax.axis_index(axis), -1 if reverse else 1
    first, last = (n - 1, 0) if reverse else (0, n - 1)
    target = targets.of(index)
    received_BHKV = _decay(targets.of(first), target, log_decay_H) * given_BHKV
    if _use_all_gather(n):
        with jax.named_scope("states"):     # 'B H K V -> d B H K V': (n - 1) B H K V float32 received
            own_dBHKV = lax.all_gather(own_BHKV, axis, to="invarying")
        earlier_d = direction * jnp.arange(n) < direction * index
        weight_dBH11 = jnp.where(earlier_d[:, None, None, None, None], _decay(sources, target, log_decay_H), 0)
        received_BHKV += jnp.sum(weight_dBH11 * own_dBHKV, 0)
        last_BHKV = jnp.sum(_decay(sources, sources.of(last), log_decay_H) * own_dBHKV, 0)
        return received_BHKV, last_BHKV + _decay(targets.of(first), sources.of(last), log_decay_H) * given_BHKV

    def shift(state_BHKV, steps, boundaries):
        with jax.named_scope("states"):     # 'B H K V -> B H K V': B H K V float32 received
            pairs = [(i, i + direction * steps) for i in range(n) if 0 <= i + direction * steps < n]
            state_BHKV = lax.ppermute(state_BHKV, axis, pairs)
        return _decay(boundaries.of(jnp.clip(index - direction * steps, 0, n - 1)), target, log_decay_H) * state_BHKV
    sum_BHKV = shift(own_BHKV, 1, sources)
    for step in range(_doublings(n)):
        sum_BHKV += shift(sum_BHKV, 2 ** step, targets)
    received_BHKV += sum_BHKV
    last_BHKV = own_BHKV + _decay(target, sources.of(last), log_decay_H) * received_BHKV
    with jax.named_scope("last_state"):     # 'B H K V -> B H K V': 2 (n - 1) / n B H K V float32, nothing if unused
        return received_BHKV, lax.psum(jnp.where(index == last, last_BHKV, 0), axis)


def _decay(a: Boundary, b: Boundary, log_decay_H):
    """Returns the factor by which a state decays from one boundary to the other [..., B, H, 1, 1]; 0 in another document."""
    time_B1 = jnp.abs(a.position - b.position)[..., None].astype(log_decay_H.dtype)
    factor_BH = jnp.where((a.document == b.document)[..., None], jnp.exp(log_decay_H * time_B1), 0)
    return factor_BH[..., None, None]


def _use_all_gather(axis_size: int) -> bool:
    return axis_size - 1 <= 1 + _doublings(axis_size) + 2 * (axis_size - 1) / axis_size


def _doublings(axis_size: int) -> int:
    """The steps of the prefix sum after its first shift."""
    return math.ceil(math.log2(axis_size - 1)) if axis_size > 1 else 0


def _varying_axes(x) -> frozenset:
    """The mesh axes over which x may differ, as far as `shard_map` tracks it (check_vma)."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)
