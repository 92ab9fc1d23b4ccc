"""Mixture of experts; the result does not depend on the mesh (docs/model.md section 5; paper sections 2.1, 2.2.3, 3.1, 4.2).

`_local` performs these steps in this order:

    1. The router chooses the token's experts.                                      routing.choose
    2. Each choice enters its expert's queue; choices beyond capacity are dropped.  routing.queue_positions
    3. The token is sent to the devices of its experts.                             exchange.dispatch
    4. The experts compute their SwiGLU.                                            kernels.grouped
    5. The outputs are sent back and summed.                                        exchange.combine

A single device skips steps 3 and 5. If the mesh does not shard the tokens (decoding a few rows), every device has all tokens:
each device computes the outputs of its experts, and an all-reduce sums the outputs. Lower-case axes: see `parallel.routing` and
`parallel.exchange`.
"""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mmx.kernels import grouped
from mmx.parallel import exchange, sharding
from mmx.parallel.routing import Choices, Routing, choose, expert_capacity, queue_order, queue_positions, rank, statistics

EXPERT_AXES = ("etp", "ep")             # mesh axes that shard the experts' weights
WEIGHT_AXES = ("EDF", "EDF", "EFD")    # axes of the experts' weights w1, w3, w2
FEW = 8                                 # at most this many assignments (decoding) are computed one by one


class Axes(NamedTuple):
    """The mesh axes with more than one device, by what they shard. All are empty on one device."""
    rows: tuple = ()
    time: tuple = ()
    experts: tuple = ()

    @property
    def tokens(self):
        return self.rows + self.time


def moe(x_BTD, live_BT, router_DE, weights, routing: Routing):
    """Routes each token to its top-k experts and sums their outputs, weighted by the renormalised router probabilities.

    Under a mesh (jax.set_mesh) the arrays are sharded as `parallel.sharding` says. If the mesh axes of rows and time do not
    divide B and T, every device gets all tokens and computes the outputs of its experts.

    Args:
      x_BTD: tokens.
      live_BT: True for real tokens. Padding is not routed and does not count towards capacity.
      router_DE: the router's weights.
      weights: the experts' w1_EDF, w3_EDF and w2_EFD.
      routing: settings.
        top_k: experts of a token.
        capacity: capacity factor. Each expert accepts at most capacity * tokens * top_k / experts assignments of the whole
          batch; later ones are dropped. 0: no dropping.
        transport: buffer factor of the all-to-all over the mesh axis ep. A device sends at most transport * (its assignments /
          ep) assignments to each of the ep devices; 0: enough for any routing. Buffers have a fixed size, for which padding
          counts as tokens: a batch with padding drops fewer assignments.
        token_groups: number of groups that a device's tokens are exchanged in. The exchange of one group overlaps with the
          computation of another.
        ragged: use a ragged all-to-all, which CPUs do not have, instead of the default mode (see `parallel.exchange`).
          `transport` then limits what a device receives from all ep devices together.
    Returns:
      y_BTD, the router logits_BTE, and the routing statistics (`routing.Stats`).
    """
    mesh, local = sharding.active_mesh(), functools.partial(_local, routing=routing)
    if mesh is None:
        return local(x_BTD, live_BT, router_DE, *weights, axes=Axes(), specs=())
    axes = Axes(*sharding.token_axes(mesh), sharding.nontrivial(mesh, EXPERT_AXES))
    specs = tuple(sharding.weight_spec(letters, w.shape, mesh) for letters, w in zip(WEIGHT_AXES, weights))
    if not sharding.tokens_are_sharded(*live_BT.shape):
        # every device has all tokens, and XLA gathers FSDP's shards of the weights before shard_map
        axes, specs = Axes(experts=axes.experts), tuple(map(sharding.without_fsdp, WEIGHT_AXES, specs))
    tokens = P(axes.rows, axes.time)
    sharded = jax.shard_map(functools.partial(local, axes=axes, specs=specs), in_specs=(tokens, tokens, P(), *specs),
                            out_specs=(tokens, tokens, P()))
    return sharded(x_BTD, live_BT, router_DE, *weights)


def _local(x_BTD, live_BT, router_DE, *weights, routing: Routing, axes: Axes, specs):
    """The layer on one device's tokens, inside `shard_map` if there is a mesh."""
    B, T, D = x_BTD.shape
    M, E = B * T, router_DE.shape[1]
    x_MD, live_M = x_BTD.reshape(M, D), live_BT.reshape(M)
    logits_ME, prob_ME, expert_Mj, weight_Mj = choose(x_MD, router_DE, routing.top_k)
    with jax.named_scope("route"):
        position_BTj, count_jE = queue_positions(expert_Mj.reshape(B, T, -1), live_BT, E, axes.rows, axes.time)
        devices = jax.lax.axis_size(axes.tokens) if axes.tokens else 1
        most_capacity = expert_capacity(routing.capacity, M * routing.top_k * devices, E)        # without padding
        capacity = expert_capacity(routing.capacity, count_jE.sum(), E) if routing.capacity else most_capacity
        keep_Mj = live_M[:, None] & (position_BTj.reshape(M, -1) < capacity)
        choices = Choices(expert_Mj, weight_Mj, keep_Mj)
    with jax.named_scope("experts"):
        sent = jnp.sum(keep_Mj, dtype=jnp.int32)
        if not axes.experts:
            y_MD = _compute(x_MD, choices, _gathered(weights, specs, axes.tokens))
        elif axes.tokens:
            y_MD, sent = _exchange(x_MD, choices, most_capacity, axes.experts, _gathered(weights, specs, axes.tokens), routing)
        else:
            y_MD = _compute_replicated(x_MD, choices, axes.experts, _gathered(weights, specs, axes.experts))
    stats = statistics(logits_ME, prob_ME, live_M, count_jE, keep_Mj, sent, axes.tokens)
    return y_MD.reshape(B, T, D), logits_ME.reshape(B, T, E), stats


def _exchange(x_MD, choices: Choices, capacity: int, axes, weights, routing: Routing):
    """Sends the tokens to their experts' devices and the outputs back. Returns y_MD and the number of assignments sent."""
    groups = exchange.make_token_groups(choices, axes, len(weights[0]), capacity, routing)
    etp = jax.lax.axis_size("etp") if "etp" in axes else 1
    y_MD = []
    for group in groups:
        x_rD = exchange.dispatch(x_MD[group.tokens], group, axes)
        received, rank_r1, count_e = exchange.contents(group)
        # with even routing, each device receives as many assignments over ep as it sends; the gather over etp adds a factor
        block = block_size(group.slot_Mj.size * etp, len(count_e))
        y_rD = _compute_sorted(x_rD, received, rank_r1, count_e, weights, block)
        y_MD.append(exchange.combine(y_rD, group, axes))
    return jnp.concatenate(y_MD), sum(group.sent for group in groups)


def _compute(x_MD, choices: Choices, weights):
    """y_MD of experts that are all on this device."""
    expert_Mj, weight_Mj, keep_Mj = choices
    (M, top_k), experts = expert_Mj.shape, len(weights[0])
    if M * top_k <= FEW:
        return grouped.expert_ffn_unrolled(x_MD, weight_Mj * keep_Mj, expert_Mj, *weights)
    if experts == top_k == 1:   # a dense layer: there is nothing to sort
        h_MF = jax.nn.silu(x_MD @ weights[0][0]) * (x_MD @ weights[1][0])
        return ((weight_Mj * keep_Mj).astype(h_MF.dtype) * h_MF) @ weights[2][0]
    rank_a, count_e = rank(queue_order(expert_Mj), queue_order(keep_Mj), experts)
    return _compute_sorted(x_MD, choices, rank_a.reshape(top_k, M).T, count_e, weights, block_size(M * top_k, experts))


def _compute_replicated(x_MD, choices: Choices, axes, weights):
    """y_MD of tokens that every device has.

    Each device computes its experts (ep) with its part of their hidden units F (etp). The outputs are summed over `axes`.
    """
    experts = len(weights[0])       # of this device
    x_MD, choices = jax.lax.pcast((x_MD, choices), axes, to="varying")
    if "ep" in axes:
        local_Mj = choices.expert_Mj - jax.lax.axis_index("ep") * experts
        is_local_Mj = (local_Mj >= 0) & (local_Mj < experts)
        choices = Choices(jnp.clip(local_Mj, 0, experts - 1), choices.weight_Mj, choices.keep_Mj & is_local_Mj)
    return jax.lax.psum(_compute(x_MD, choices, weights), axes)


def _compute_sorted(x_MD, choices: Choices, rank_Mj, count_e, weights, block: int):
    """y_MD, computed by `kernels.grouped` on rows sorted by expert, in blocks of `block` rows."""
    plan = grouped.plan(choices.expert_Mj, rank_Mj, choices.keep_Mj, count_e, block)
    return grouped.expert_ffn(x_MD, choices.weight_Mj, *weights, plan, block=block)


def _gathered(weights, specs, axes):
    """The complete weights of this device's experts, gathered from FSDP's shards.

    `axes` are the token axes, or the expert axes if the mesh does not shard the tokens. The backward pass sums the weights'
    gradients over them (see `sharding.gather_weight`).
    """
    return [sharding.gather_weight(*args, axes) for args in zip(weights, WEIGHT_AXES, specs)] if axes else weights


def block_size(assignments: int, experts: int) -> int:
    """Returns rows per block: half of an expert's even share, rounded down to a power of two; at least 8 and at most 128."""
    half = max(assignments // (2 * experts), 1)
    return min(128, max(8, 1 << (half.bit_length() - 1)))
