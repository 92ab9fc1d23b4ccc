"""Routing of tokens to experts: the router, the experts' queues, dropped assignments, statistics (docs/model.md section 5).

The router chooses `top_k` experts for each token. A choice of one token is an assignment. Each expert has one queue of
assignments for the whole batch: all tokens' first choices come before all second choices, and within a choice tokens follow in
the order of rows and time. Assignments beyond the expert's capacity are dropped. Positions in the queues are counted over all
devices, so the same assignments are dropped on every mesh (paper section 2.2.3).

Upper-case letters are defined in `mmx.dims`, with local extents. Lower-case letters are axes of routing and exchange:

    j choices of a token, the first is the best       a assignments in the order of the queues, a = j x M
"""
import dataclasses
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmx.kernels.dtypes import wide_dtype


@dataclasses.dataclass(frozen=True)
class Routing:
    """Settings of a mixture-of-experts layer; `expert.moe` explains them."""
    top_k: int
    capacity: float
    transport: float = 0.0
    token_groups: int = 1
    ragged: bool = False


class Choices(NamedTuple):
    """The router's choices for each token."""
    expert_Mj: jax.Array
    weight_Mj: jax.Array        # router probabilities, renormalised over the choices
    keep_Mj: jax.Array          # False where the token is padding or the expert's capacity is exceeded

    def of(self, tokens: slice) -> "Choices":
        """The choices of some of the tokens."""
        return Choices(*(x[tokens] for x in self))


class Stats(NamedTuple):
    """Statistics of one layer's router over all real tokens of the batch."""
    load_E: jax.Array           # share of the assignments that chose each expert, before drops; sums to 1
    prob_E: jax.Array           # mean router probability
    z: jax.Array                # mean logsumexp(logits)^2
    dropped: jax.Array          # share of all assignments that exceeded their expert's capacity
    overflow: jax.Array         # share of all assignments that were within capacity but got no slot in an exchange buffer


def choose(x_MD, router_DE, top_k: int):
    """Returns the router's logits_ME and probabilities prob_ME, and each token's experts and their weights [M, j].

    The router computes in float32: a rounding error could change the chosen experts.
    """
    wide = wide_dtype(x_MD.dtype)
    logits_ME = x_MD.astype(wide) @ router_DE.astype(wide)
    prob_ME = jax.nn.softmax(logits_ME)
    top_Mj, expert_Mj = jax.lax.top_k(logits_ME, top_k)
    return logits_ME, prob_ME, expert_Mj, jax.nn.softmax(top_Mj)


def expert_capacity(capacity: float, assignments, E: int):
    """Returns how many assignments one expert accepts: ceil(capacity x assignments / E), or all if `capacity` is 0.

    Args:
      assignments: number of assignments of the whole batch, without padding: an int or a traced int32 scalar.
    """
    if not capacity or capacity >= E:
        return assignments
    # The quotient is computed with integers below 2^31. As floats, 1.1 x 110 is 121.00000000000001, and its ceiling is 122.
    # The fraction capacity / E is exact for capacities with three decimals and capacity x E up to 1,000.
    most = int(min(2**30, (2**30 * E / capacity) ** 0.5))
    share = (Fraction(capacity).limit_denominator(10**6) / E).limit_denominator(most)
    whole, rest = divmod(assignments, share.denominator)
    return whole * share.numerator - -rest * share.numerator // share.denominator


def queue_positions(expert_BTj, live_BT, E: int, rows=(), time=()):
    """Returns each assignment's position in its expert's queue [B, T, j], and the number of assignments [j, E].

    Both count over all devices of the mesh axes `rows` and `time`, which shard B and T.
    """
    chosen_BTjE = jax.nn.one_hot(expert_BTj, E, dtype=jnp.int32) * live_BT[..., None, None]
    before_BjE, total_jE = _counts_before(chosen_BTjE.sum(1), rows, time)
    earlier_jE = jnp.cumsum(total_jE, axis=0) - total_jE        # all tokens' choices with a lower j
    position_BTjE = jnp.cumsum(chosen_BTjE, axis=1) - 1 + (before_BjE + earlier_jE)[:, None]
    return jnp.take_along_axis(position_BTjE, expert_BTj[..., None], axis=3)[..., 0], total_jE


def _counts_before(count_BjE, rows, time):
    """Counts assignments over the devices of the mesh axes `rows` and `time`.

    A device receives 4 B j E bytes from each device along `time` and 4 j E bytes from each device along `rows`.

    Args:
      count_BjE: for each row, choice and expert, the number of assignments of this device's tokens.
    Returns:
      before_BjE: the number of assignments of the same choice and expert that come before this device's tokens of the row.
      total_jE: the number of assignments of all rows and devices.
    """
    earlier_BjE, row_BjE = earlier_and_total(count_BjE, time)
    before_jE, total_jE = earlier_and_total(row_BjE.sum(0), rows)
    return before_jE + jnp.cumsum(row_BjE, axis=0) - row_BjE + earlier_BjE, total_jE


def earlier_and_total(count, axes):
    """Returns the sum of `count` over the devices with a lower index on the mesh axes, and the sum over all devices.

    A device receives the bytes of `count` from each other device.
    """
    if not axes:
        return jnp.zeros_like(count), count
    counts = jax.lax.all_gather(count, axes)        # [...] -> [devices, ...]
    before = jnp.arange(len(counts)) < jax.lax.axis_index(axes)
    return jnp.tensordot(before.astype(count.dtype), counts, 1), jax.lax.psum(count, axes)


def queue_order(x_Mj):
    """Returns x_a: values of assignments in the order of the queues, all first choices before all second choices."""
    return x_Mj.T.reshape(-1)


def rank(destination_a, keep_a, destinations: int):
    """Ranks the assignments to the same destination, which is an expert or a peer.

    Args:
      destination_a: the destination of each assignment, 0 to destinations - 1.
      keep_a: False for assignments that do not count.
    Returns:
      For each kept assignment, how many kept ones to the same destination come before it; and the number of kept assignments to
      each destination.
    """
    kept = jax.nn.one_hot(destination_a, destinations, dtype=jnp.int32) * keep_a[:, None]
    return jnp.take_along_axis(jnp.cumsum(kept, axis=0) - 1, destination_a[:, None], axis=1)[:, 0], kept.sum(0)


def statistics(logits_ME, prob_ME, live_M, count_jE, keep_Mj, sent, axes) -> Stats:
    """Returns the batch's statistics.

    Args:
      count_jE: number of assignments of all devices, before drops.
      keep_Mj: True for this device's assignments within capacity.
      sent: number of this device's assignments that reached their expert.
      axes: the mesh axes that shard the tokens. An all-reduce sums 4 (E + 3) bytes over them.
    """
    top_k = len(count_jE)
    count_E = count_jE.sum(0)
    assigned = jnp.maximum(count_E.sum(), 1)
    sums = (jnp.sum(prob_ME * live_M[:, None], 0), jnp.sum(live_M * jax.nn.logsumexp(logits_ME, 1) ** 2),
            jnp.sum(keep_Mj, dtype=jnp.int32), sent)
    prob_E, z, kept, sent = jax.lax.psum(sums, axes) if axes else sums
    tokens = assigned / top_k
    return Stats(count_E / assigned, prob_E / tokens, z / tokens, 1 - kept / assigned, (kept - sent) / assigned)


def balance_loss(load_E, prob_E, top_k: int, form: str):
    """Load-balancing loss of one layer; `load_E` is a constant for the gradient.

    form       loss                          value when balanced
    "switch"   E sum(load prob)              1
    "paper"    (1/E) sum(load prob)          1/E^2
    "hf"       top_k E sum(load prob)        top_k

    "hf" is the loss of transformers, which treats all layers as one: pass the means of `load_E` and `prob_E` over the layers
    (docs/model.md section 5).
    """
    E = len(load_E)
    scale = {"switch": E, "paper": 1 / E, "hf": E * top_k}[form]
    return scale * jnp.sum(jax.lax.stop_gradient(load_E) * prob_E)
