"""Exchange of tokens over the expert axes of the mesh: tokens travel to their experts, and outputs travel back.

Upper-case letters are defined in `mmx.dims`, with local extents; E counts the experts of all devices. Lower-case letters:

    j choices of a token                    a assignments (see `parallel.routing`)
    p peers: the devices of an ep group     t devices of an etp group           d devices of both axes, d = t x p
    b received buffers                      s sources that fill one buffer      n token groups
    e experts of one device                 r received slots, r = b x C

By default, a device sends one buffer of C slots to each of its peers; unused slots are empty. It receives b = d buffers, each
from s = 1 source:

    1. all-to-all over ep           [p, C, D] -> [p, C, D]
    2. all-gather over etp          [p, C, D] -> [b, C, D]
    3. SwiGLU of the device's E / ep experts, each with F / etp hidden units
    4. reduce-scatter over etp      [b, C, D] -> [p, C, D]
    5. all-to-all over ep           [p, C, D] -> [p, C, D]

A ragged all-to-all (TPU and GPU only) sends no empty slots. A device sends its a assignments sorted by peer, and all its peers
together fill one buffer. It receives b = t buffers, each from s = p sources. Steps 1 and 5 change:

    1. ragged all-to-all over ep    [a, D] -> [1, C, D]
    5. ragged all-to-all over ep    [1, C, D] -> [a, D]

Arrays with an axis p then have one buffer on this axis: token_pC is [1, a] before step 1, and x_pC is [1, C] after it.

In both cases the assignments in a buffer are sorted by source and expert, and all devices know the counts. The counts alone
therefore determine which expert each received slot belongs to.

Router weights are sent before the tokens, and the experts' devices multiply the outputs by them. This saves communication if
the backward pass recomputes the layer (model.remat):

    - The gradient of a router weight needs the expert's output. It is computed on the expert's device, which has that output.
    - So no gradient needs the outputs that step 5 sent to the tokens' devices.
    - The backward pass therefore does not repeat steps 4 and 5.
"""
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmx.kernels import grouped
from mmx.parallel.routing import Choices, Routing, earlier_and_total, queue_order, rank

ARRIVED = "arrived"         # name, for jax.checkpoint policies, of the tokens and router weights that a device received over ep


class RaggedRoute(NamedTuple):
    """The arguments of a ragged all-to-all over ep and of the one that sends the results back."""
    slots: int                  # slots of the receiving buffer
    dispatch: tuple             # offsets and sizes, the last four arguments of jax.lax.ragged_all_to_all, to send tokens
    combine: tuple              # the same, to send outputs back


class Group(NamedTuple):
    """One of the n token groups: this device's tokens of the group, and the buffers that it receives for the group.

    Every device divides its tokens into n groups; one exchange handles the same group of all devices.
    """
    tokens: slice
    slot_Mj: jax.Array          # the slot of each assignment; an index past the end if the assignment is not sent
    token_pC: jax.Array         # the token in each slot; M if the slot is empty
    sent: jax.Array             # how many assignments this device sends
    weight_bC: jax.Array        # the router weight of each received slot
    sent_bse: jax.Array         # number of assignments in each received buffer from each source for each expert of this device
    route: RaggedRoute | None   # None: not a ragged exchange


def make_groups(choices: Choices, axes, experts: int, capacity: int, routing: Routing) -> list[Group]:
    """Assigns slots to the assignments of each token group, and exchanges the counts and router weights of all groups.

    Args:
      choices: the choices of this device's tokens.
      axes: the axes among "etp" and "ep" that have more than one device.
      experts: number of experts of one device.
      capacity: number of assignments that one expert accepts from the whole batch.
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
    """Sends a group's tokens to the devices of their experts (steps 1 and 2). Returns the received x_rD.

    Numbers that a device receives; `combine` moves the same numbers back:

                over ep                                 over etp
    default     (ep - 1) C D                            (etp - 1) ep C D
    ragged      D for each assignment, at most C D      (etp - 1) C D
    """
    with jax.named_scope("dispatch"):
        x_bCD = _send(grouped.take(x_MD, group.token_pC), axes, group.route)
        return x_bCD.reshape(-1, x_MD.shape[1])


def contents(group: Group):
    """Describes what the received slots contain, derived from the counts alone.

    A run is a range of slots with all assignments of one source for one expert. A buffer consists of runs, ordered by source
    and then by expert, followed by empty slots.

    Returns:
      choices [r, 1]: `Choices` with the expert, the router weight and "not empty" of each received slot.
      rank_r1: how many assignments that this device received for the same expert come before the slot's.
      count_e: number of assignments that this device received for each of its experts.
    """
    (buffers, C), experts = group.weight_bC.shape, group.sent_bse.shape[2]
    size = group.sent_bse.reshape(buffers, -1)              # number of assignments in each run, [b, s e]
    slot_C, end = jnp.arange(C), jnp.cumsum(size, axis=1)
    run_bC = jnp.sum(slot_C[:, None] >= end[:, None], axis=2)
    filled_bC = run_bC < size.shape[1]
    run_bC = jnp.minimum(run_bC, size.shape[1] - 1)
    # In buffer order, let `total` be the number of assignments in a run and in all earlier runs of the same expert. Then
    #     rank = (assignments in the expert's earlier runs) + (position in the run)
    #          = (total - size of the run)                  + (slot - (end of the run - size of the run))
    #          = slot + total - end of the run
    total = jnp.cumsum(group.sent_bse.reshape(-1, experts), axis=0).reshape(end.shape)
    rank_bC = slot_C + jnp.take_along_axis(total - end, run_bC, axis=1)
    received = Choices(*(x.reshape(-1, 1) for x in (run_bC % experts, group.weight_bC, filled_bC)))
    return received, rank_bC.reshape(-1, 1), group.sent_bse.sum((0, 1))


def combine(y_rD, group: Group, axes):
    """Sends the experts' outputs back to the devices of their tokens (steps 4 and 5).

    Returns y_MD, the sum over each token's choices.
    """
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
    """Returns C: the slots of the buffer for one peer or, if `ragged`, of the buffer that all peers fill together.

    C is `transport` times the number of assignments in a buffer under even routing, but at most the largest number that M
    tokens on each device can need. With transport=0 it is that largest number.
    """
    senders = peers if ragged else 1
    needed = min(senders * M * min(top_k, experts), capacity * experts)
    return min(needed, math.ceil(transport * M * top_k * senders / peers)) if transport else needed


def _assign_slots(choices: Choices, E: int, peers: int, size: int):
    """Returns slot_Mj, token_pC (see `Group`) and sent_E, the number of assignments sent to each expert.

    `size` is the number of slots for each peer. If more than `size` assignments choose a peer, first choices get slots before
    second choices. Within a buffer, assignments are sorted by expert.
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

    `size` is the number of slots in which a device receives the assignments of all its peers. If more than `size` assignments
    choose a device, the assignments of peers with a lower index get slots first, and within a peer first choices get slots
    before second choices.
    """
    (M, top_k), experts = choices.expert_Mj.shape, E // peers
    if size < peers * M * min(top_k, experts):
        rank_a, wanted_p = rank(queue_order(choices.expert_Mj) // experts, queue_order(choices.keep_Mj), peers)
        free_p = size - earlier_and_total(wanted_p, ("ep",))[0]
        fits_Mj = rank_a.reshape(top_k, M).T < free_p[choices.expert_Mj // experts]
        choices = choices._replace(keep_Mj=choices.keep_Mj & fits_Mj)
    return _assign_slots(choices, E, 1, M * top_k)


def _ragged_route(sent_dE, slots: int, peers: int) -> RaggedRoute:
    """Returns the ragged exchange. `sent_dE` is the number of assignments that each device sends to each expert."""
    index, etp = jax.lax.axis_index("ep"), len(sent_dE) // peers
    etp_index = jax.lax.axis_index("etp") if etp > 1 else 0
    sent_pE = jax.lax.dynamic_index_in_dim(sent_dE.reshape(etp, peers, -1), etp_index, 0, keepdims=False)
    sent_pp = sent_pE.reshape(peers, peers, -1).sum(2)          # axes: sender, receiver
    # for each sender and receiver: the offset of the assignments in the sender's buffer, and in the receiver's buffer
    send_pp, receive_pp = (jnp.cumsum(sent_pp, axis) - sent_pp for axis in (1, 0))
    return RaggedRoute(slots, (send_pp[index], sent_pp[index], receive_pp[index], sent_pp[:, index]),
                  (receive_pp[:, index], sent_pp[:, index], send_pp[:, index], sent_pp[index]))


def _to_local_experts(sent_dnE, axes, peers, ragged):
    """Returns sent_bsne: the counts for this device's experts, by received buffer, source and token group."""
    if "ep" in axes:
        sent_dnpe = sent_dnE.reshape(*sent_dnE.shape[:2], peers, -1)
        sent_dnE = jax.lax.dynamic_index_in_dim(sent_dnpe, jax.lax.axis_index("ep"), 2, keepdims=False)
    return sent_dnE.reshape(-1, peers if ragged else 1, *sent_dnE.shape[1:])


def _fill(weight_Mj, slot_Mj, token_pC):
    """Returns weight_pC: the router weight of each slot, 0 for an empty slot."""
    weight = jnp.zeros(token_pC.size, weight_Mj.dtype).at[slot_Mj].set(weight_Mj, mode="drop", unique_indices=True)
    return weight.reshape(token_pC.shape)


def _send_weights(weight_pC: list, axes, routes, ragged) -> list:
    """Sends the router weights of all groups, 4 bytes per slot. Returns weight_bC of each group.

    By default one exchange sends the weights of all groups; if `ragged`, there is one exchange for each group.
    """
    with jax.named_scope("weights"):
        if ragged:
            return [_send(weight[..., None], axes, route)[..., 0] for weight, route in zip(weight_pC, routes)]
        ends = list(itertools.accumulate(weight.shape[1] for weight in weight_pC))
        return jnp.split(_send(jnp.concatenate(weight_pC, 1), axes), ends[:-1], axis=1)


def _send(x_pC, axes, route: RaggedRoute | None = None):
    """Sends buffers x_pC [p, C, ...] to the experts' devices (steps 1 and 2). Returns the received buffers [b, C, ...]."""
    if route:
        x_pC = checkpoint_name(_ragged_all_to_all(x_pC[0], route.slots, route.dispatch)[None], ARRIVED)
    elif "ep" in axes:      # 'p C -> p C': (ep - 1) C slots from the peers
        x_pC = checkpoint_name(jax.lax.all_to_all(x_pC, "ep", 0, 0, tiled=True), ARRIVED)
    if "etp" not in axes:
        return x_pC
    return jax.lax.all_gather(x_pC, "etp").reshape(-1, *x_pC.shape[1:])     # 'p C -> t p C': (etp - 1) p C slots


def _ragged_all_to_all(x_aD, slots: int, offsets_and_sizes):
    """Returns the received slots. Slots that no device fills are 0."""
    # The zero is computed from an offset, so that shard_map knows that the result differs between devices like the offsets.
    zero = offsets_and_sizes[0][0] * 0
    empty = jnp.full((slots, *x_aD.shape[1:]), zero, x_aD.dtype)
    return jax.lax.ragged_all_to_all(x_aD, empty, *offsets_and_sizes, axis_name="ep")
