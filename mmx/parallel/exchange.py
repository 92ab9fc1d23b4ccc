"""Exchange of tokens over the expert axes of the mesh: tokens travel to their experts, and outputs travel back.

By default a device has a buffer of C slots for each of its peers, the devices of its ep group. The layout of tokens changes so:

    [p, C, D] --all-to-all over ep--> --all-gather over etp--> [b, C, D], SwiGLU of E/ep experts with F/etp hidden units
    [p, C, D] <--all-to-all over ep-- <--reduce-scatter over etp--

A ragged all-to-all (TPU and GPU) sends no empty slots. Each device packs its assignments by peer and expert:

    [a, D] --ragged all-to-all over ep--> [C, D] --all-gather over etp--> [b, C, D] and the same way back

In both cases assignments are sorted by expert, and all devices know the counts. The counts alone therefore determine which
expert each received slot belongs to.

Router weights are sent ahead of the tokens, and the experts' devices multiply by them. The gradients of router weights are then
computed on the experts' devices too. So no gradient needs the outputs on the tokens' devices, and a backward pass that
recomputes the layer does not send the outputs back again.

Upper-case letters are defined in `mmx.dims`, with local extents; E counts the experts of all devices. Lower-case letters:

    j choices of a token                    a assignments (see `parallel.routing`)
    p peers, the devices of an ep group     t devices of an etp group           d devices of both axes
    b received buffers                      s sources of one buffer             n token groups
    e experts of one device                 r received slots, r = b x C

With slots, each of the d devices fills one buffer: b = d, s = 1. In a ragged exchange all peers fill one buffer: b = t, s = p.
"""
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmx.kernels import grouped
from mmx.parallel.routing import Choices, Routing, earlier_and_total, queue_order, rank

ARRIVED = "arrived"         # name for jax.checkpoint policies: tokens and weights that arrived at their experts' devices


class RaggedRoute(NamedTuple):
    """A ragged all-to-all over ep, and its reverse: the last four arguments of jax.lax.ragged_all_to_all."""
    slots: int                  # of the buffer that receives
    dispatch: tuple
    combine: tuple


class Group(NamedTuple):
    """A group of this device's tokens, and the buffers that this device receives for the same group of all devices."""
    tokens: slice
    slot_Mj: jax.Array          # the slot of each assignment; an index past the end if it is not sent
    token_pC: jax.Array         # the token in each slot; M if the slot is empty
    sent: jax.Array             # how many assignments this device sends
    weight_bC: jax.Array        # the router weight of each received slot
    sent_bse: jax.Array         # how many assignments each received buffer has from each source for each local expert
    route: RaggedRoute | None   # None: not a ragged exchange


def make_groups(choices: Choices, axes, experts: int, capacity: int, routing: Routing) -> list[Group]:
    """Assigns slots to the assignments, group by group, and sends counts and router weights ahead of the tokens.

    Args:
      choices: the choices of this device's tokens.
      axes: the expert axes of the mesh that have more than one device, a part of ("etp", "ep").
      experts: experts of one device.
      capacity: assignments that one expert accepts from the whole batch.
    """
    (M, top_k), peers = choices.expert_Mj.shape, jax.lax.axis_size("ep") if "ep" in axes else 1
    ragged, E = routing.ragged and "ep" in axes, peers * experts
    ends = [M * n // routing.token_groups for n in range(routing.token_groups + 1)]
    tokens = [slice(*pair) for pair in itertools.pairwise(ends) if pair[0] < pair[1]]
    sizes = [buffer_slots(g.stop - g.start, top_k, experts, capacity, peers, routing.transport, ragged) for g in tokens]
    assign = _assign_ragged_slots if ragged else _assign_slots
    slots = [assign(choices.of(g), E, peers, size) for g, size in zip(tokens, sizes)]
    # 'n E -> d n E': 4 n E bytes from each other device
    sent_dnE = jax.lax.all_gather(jnp.stack([sent_E for *_, sent_E in slots]), axes)
    routes = [_ragged_route(sent_dnE[:, n], size, peers) if ragged else None for n, size in enumerate(sizes)]
    sent_bsne = _to_local_experts(sent_dnE, axes, peers, ragged)
    weight_pC = [_fill(choices.weight_Mj[g], slot_Mj, token_pC) for g, (slot_Mj, token_pC, _) in zip(tokens, slots)]
    weight_bC = _send_weights(weight_pC, axes, routes, ragged)
    return [Group(g, slot_Mj, token_pC, sent_E.sum(), weight_bC[n], sent_bsne[:, :, n], routes[n])
            for n, (g, (slot_Mj, token_pC, sent_E)) in enumerate(zip(tokens, slots))]


def dispatch(x_MD, group: Group, axes):
    """Sends a group's tokens to the devices of their experts; returns the received x_rD.

    A device receives (ep - 1) C D numbers over ep, then (etp - 1) ep C D over etp. With a ragged exchange it receives the
    tokens that are sent to it over ep, at most C D numbers, then (etp - 1) C D over etp. `combine` moves the same back.
    """
    with jax.named_scope("dispatch"):
        x_bCD = _send(grouped.take(x_MD, group.token_pC), axes, group.route)
        return x_bCD.reshape(-1, x_MD.shape[1])


def contents(group: Group):
    """What the received slots contain, derived from the counts alone.

    A buffer is a sequence of runs, one for each source and expert in this order, followed by empty slots.

    Returns:
      The received slots as Choices [r, 1], their ranks among all that their expert receives [r, 1], and that number [e].
    """
    (buffers, C), experts = group.weight_bC.shape, group.sent_bse.shape[2]
    size = group.sent_bse.reshape(buffers, -1)              # of each run, [b, s e]
    slot_C, end = jnp.arange(C), jnp.cumsum(size, axis=1)
    run_bC = jnp.sum(slot_C[:, None] >= end[:, None], axis=2)
    filled_bC = run_bC < size.shape[1]
    run_bC = jnp.minimum(run_bC, size.shape[1] - 1)
    # rank = (slot - the run's start) + the expert's earlier runs = slot + (the expert's runs up to this one) - the run's end
    until = jnp.cumsum(group.sent_bse.reshape(-1, experts), axis=0).reshape(end.shape)
    rank_bC = slot_C + jnp.take_along_axis(until - end, run_bC, axis=1)
    received = Choices(*(x.reshape(-1, 1) for x in (run_bC % experts, group.weight_bC, filled_bC)))
    return received, rank_bC.reshape(-1, 1), group.sent_bse.sum((0, 1))


def combine(y_rD, group: Group, axes):
    """Sends the experts' outputs back to the devices of their tokens; returns y_MD, the sum over each token's choices."""
    D, peers = y_rD.shape[1], len(group.token_pC)
    with jax.named_scope("combine"):
        y_tpCD = y_rD.reshape(-1, peers, group.weight_bC.shape[1], D)
        y_pCD = jax.lax.psum_scatter(y_tpCD, "etp") if "etp" in axes else y_tpCD[0]     # 't p C D -> p C D', summed
        if group.route:
            y_pCD = _ragged_all_to_all(y_pCD[0], group.token_pC.size, group.route.combine)
        elif "ep" in axes:
            y_pCD = jax.lax.all_to_all(y_pCD, "ep", 0, 0, tiled=True)
    return grouped.take(y_pCD.reshape(-1, D), group.slot_Mj).sum(1)


def buffer_slots(M, top_k, experts, capacity, peers, transport, ragged=False) -> int:
    """Returns the number of slots for each peer, or of a ragged exchange for all peers together.

    This is `transport` times an even share of the assignments, but at most what `M` tokens on each device can need.
    """
    senders = peers if ragged else 1
    needed = min(senders * M * min(top_k, experts), capacity * experts)
    return min(needed, math.ceil(transport * M * top_k * senders / peers)) if transport else needed


def _assign_slots(choices: Choices, E: int, peers: int, size: int):
    """Returns slot_Mj, token_pC (see `Group`) and sent_E, the number of assignments sent to each expert.

    `size`: slots for each peer. If more assignments choose a peer, first choices come before second choices. Within a buffer,
    assignments are sorted by expert.
    """
    M, top_k = choices.expert_Mj.shape
    expert_a, keep_a = queue_order(choices.expert_Mj), queue_order(choices.keep_Mj)
    peer_a = expert_a // (E // peers)
    if size < M * min(top_k, E // peers):
        keep_a &= rank(peer_a, keep_a, peers)[0] < size
    rank_a, sent_E = rank(expert_a, keep_a, E)
    sent_pe = sent_E.reshape(peers, E // peers)
    first_E = (jnp.cumsum(sent_pe, axis=1) - sent_pe).reshape(E)        # the first slot of each expert in its peer's buffer
    slot_a = jnp.where(keep_a, peer_a * size + first_E[expert_a] + rank_a, peers * size)
    token_a = jnp.tile(jnp.arange(M, dtype=jnp.int32), top_k)
    token = jnp.full(peers * size, M, jnp.int32).at[slot_a].set(token_a, mode="drop", unique_indices=True)
    return slot_a.reshape(top_k, M).T, token.reshape(peers, size), sent_E


def _assign_ragged_slots(choices: Choices, E: int, peers: int, size: int):
    """The same for a ragged exchange: a device sends from one buffer, which is sorted by expert and therefore by peer.

    `size`: slots that a device has for what all its peers send. If more assignments choose a device, those of earlier devices
    come first, and within a device first choices come before second choices.
    """
    (M, top_k), experts = choices.expert_Mj.shape, E // peers
    if size < peers * M * min(top_k, experts):
        rank_a, wanted_p = rank(queue_order(choices.expert_Mj) // experts, queue_order(choices.keep_Mj), peers)
        free_p = size - earlier_and_total(wanted_p, ("ep",))[0]
        fits_Mj = rank_a.reshape(top_k, M).T < free_p[choices.expert_Mj // experts]
        choices = choices._replace(keep_Mj=choices.keep_Mj & fits_Mj)
    return _assign_slots(choices, E, 1, M * top_k)


def _ragged_route(sent_dE, slots: int, peers: int) -> RaggedRoute:
    """The ragged exchange for the numbers of assignments that each device sends to each expert."""
    index, etp = jax.lax.axis_index("ep"), len(sent_dE) // peers
    etp_index = jax.lax.axis_index("etp") if etp > 1 else 0
    sent_pE = jax.lax.dynamic_index_in_dim(sent_dE.reshape(etp, peers, -1), etp_index, 0, keepdims=False)
    sent_pp = sent_pE.reshape(peers, peers, -1).sum(2)          # from, to
    # the offset of each pair's assignments in the sender's and in the receiver's buffer
    send_pp, receive_pp = (jnp.cumsum(sent_pp, axis) - sent_pp for axis in (1, 0))
    return RaggedRoute(slots, (send_pp[index], sent_pp[index], receive_pp[index], sent_pp[:, index]),
                  (receive_pp[:, index], sent_pp[:, index], send_pp[:, index], sent_pp[index]))


def _to_local_experts(sent_dnE, axes, peers, ragged):
    """The counts for this device's experts, by received buffer and source: sent_bsne."""
    if "ep" in axes:
        sent_dnpe = sent_dnE.reshape(*sent_dnE.shape[:2], peers, -1)
        sent_dnE = jax.lax.dynamic_index_in_dim(sent_dnpe, jax.lax.axis_index("ep"), 2, keepdims=False)
    return sent_dnE.reshape(-1, peers if ragged else 1, *sent_dnE.shape[1:])


def _fill(weight_Mj, slot_Mj, token_pC):
    """weight_pC: the router weight of each slot, 0 where the slot is empty."""
    weight = jnp.zeros(token_pC.size, weight_Mj.dtype).at[slot_Mj].set(weight_Mj, mode="drop", unique_indices=True)
    return weight.reshape(token_pC.shape)


def _send_weights(weight_pC: list, axes, routes, ragged) -> list:
    """Sends all groups' router weights, 4 bytes a slot; returns weight_bC of each group. Without `ragged` in one exchange."""
    with jax.named_scope("weights"):
        if ragged:
            return [_send(weight[..., None], axes, route)[..., 0] for weight, route in zip(weight_pC, routes)]
        ends = list(itertools.accumulate(weight.shape[1] for weight in weight_pC))
        return jnp.split(_send(jnp.concatenate(weight_pC, 1), axes), ends[:-1], axis=1)


def _send(x_pC, axes, route: RaggedRoute | None = None):
    """Sends slots to the experts' devices; returns the received buffers [b, C, ...]. Further axes stay as they are."""
    if route:
        x_pC = checkpoint_name(_ragged_all_to_all(x_pC[0], route.slots, route.dispatch)[None], ARRIVED)
    elif "ep" in axes:      # 'p C -> p C': (ep - 1) C slots from the peers
        x_pC = checkpoint_name(jax.lax.all_to_all(x_pC, "ep", 0, 0, tiled=True), ARRIVED)
    if "etp" not in axes:
        return x_pC
    return jax.lax.all_gather(x_pC, "etp").reshape(-1, *x_pC.shape[1:])     # 'p C -> t p C': (etp - 1) p C slots


def _ragged_all_to_all(x_aD, slots: int, offsets_and_sizes):
    """Returns the received slots; those that nobody sends are 0."""
    # The zero is computed from an offset: shard_map then knows that the result differs between devices as the offsets do.
    zero = offsets_and_sizes[0][0] * 0
    empty = jnp.full((slots, *x_aD.shape[1:]), zero, x_aD.dtype)
    return jax.lax.ragged_all_to_all(x_aD, empty, *offsets_and_sizes, axis_name="ep")
