"""Exchange of tokens over the expert axes of the mesh: tokens travel to their experts, and outputs travel back.

The mesh axis ep divides the experts, and the axis etp divides each expert's hidden units F. A device exchanges tokens with its
peers: the p devices along ep, including itself. The t devices along etp have different parts of the same experts.

There are two modes:

- Default: a device sends one buffer of C slots to each peer. Unused slots are empty.
- Ragged (TPU and GPU only): a ragged all-to-all sends no empty slots. A device sends all its assignments in one buffer, sorted
  by peer. It receives the assignments of all peers in one buffer of C slots.

    step                        default                     ragged
    1. all-to-all over ep       [p, C, D] -> [p, C, D]      [1, a, D] -> [1, C, D]
    2. all-gather over etp      [p, C, D] -> [t p, C, D]    [1, C, D] -> [t, C, D]
    3. SwiGLU of the device's experts, with its part of their hidden units
    4. reduce-scatter over etp  [t p, C, D] -> [p, C, D]    [t, C, D] -> [1, C, D]
    5. all-to-all over ep       [p, C, D] -> [p, C, D]      [1, C, D] -> [1, a, D]

The lower-case axes are the p peers, the t devices along etp, and

    j   choices of a token (see `parallel.routing`)
    a   assignments of the device's tokens, a = j x M
    n   token groups (see `TokenGroup`)
    o   sent (outgoing) buffers             p by default, 1 if ragged
    c   slots of a sent buffer              C by default, a if ragged
    b   buffers received after step 2       t x p by default, t if ragged
    s   sources that fill such a buffer     1 by default, p if ragged
    e   experts of one device
    r   received slots, r = b x C
    d   devices along both axes, d = t x p = b x s

Upper-case letters are defined in `mmx.dims`, with local extents, but E counts the experts of all devices. A comment such as
'o C -> t o C' at a collective gives the axes of its operand and of its result.

In both modes the assignments in a received buffer are sorted by source and expert, and all devices know the counts. The counts
alone therefore determine which expert each received slot belongs to.

Router weights are sent before the tokens, and the experts' devices multiply the outputs by them. The gradient of a router
weight needs the expert's output. If the backward pass recomputes the layer (model.remat), the expert's device has this output
again after step 3. The token's device would have to receive it again, by steps 4 and 5.
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


class Transfers(NamedTuple):
    """What one device sends and receives in a ragged all-to-all; the arguments of jax.lax.ragged_all_to_all, in its order."""
    input_offsets: jax.Array    # by receiver: where its slots start in this device's buffer
    send_sizes: jax.Array       # by receiver: how many slots it gets
    output_offsets: jax.Array   # by receiver: where these slots start in the receiver's buffer
    recv_sizes: jax.Array       # by sender: how many slots this device gets from it


class RaggedRoute(NamedTuple):
    """The ragged all-to-all of step 1 and that of step 5."""
    slots: int                  # C
    to_experts: Transfers
    to_tokens: Transfers


class TokenGroup(NamedTuple):
    """A token group: a part of this device's tokens, and the buffers that the device sends and receives in its exchange.

    Every device divides its tokens into n token groups. The first exchange handles the first group of every device, and so on.
    M and a below count the tokens and assignments of one group.
    """
    tokens: slice
    slot_Mj: jax.Array          # the slot of each assignment in the sent buffers; o x c if the assignment is not sent
    token_oc: jax.Array         # the token in each slot; M if the slot is empty
    sent: jax.Array             # how many assignments this device sends
    weight_bC: jax.Array        # the router weight of each received slot
    sent_bse: jax.Array         # number of assignments in each received buffer from each source for each expert of this device
    route: RaggedRoute | None   # None: default mode


def make_token_groups(choices: Choices, axes, experts: int, capacity: int, routing: Routing) -> list[TokenGroup]:
    """Assigns slots to the assignments of each token group, and exchanges the counts and router weights of all token groups.

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
    assigned = [assign(choices.of(g), E, peers, C) for g, C in zip(tokens, sizes)]
    # 'n E -> d n E': 4 n E bytes from each other device
    sent_dnE = jax.lax.all_gather(jnp.stack([sent_E for *_, sent_E in assigned]), axes)
    routes = [_ragged_route(sent_dnE[:, n], C, peers) if ragged else None for n, C in enumerate(sizes)]
    sent_bsne = _to_local_experts(sent_dnE, axes, peers, ragged)
    weight_oc = [_fill(choices.weight_Mj[g], slot_Mj, token_oc) for g, (slot_Mj, token_oc, _) in zip(tokens, assigned)]
    weight_bC = _send_weights(weight_oc, axes, routes, ragged)
    return [TokenGroup(g, slot_Mj, token_oc, sent_E.sum(), weight_bC[n], sent_bsne[:, :, n], routes[n])
            for n, (g, (slot_Mj, token_oc, sent_E)) in enumerate(zip(tokens, assigned))]


def dispatch(x_MD, group: TokenGroup, axes):
    """Sends a token group to the devices of its experts (steps 1 and 2). Returns the received x_rD.

    Number of array elements that a device receives; `combine` moves as many back:

                over ep                                 over etp
    default     (ep - 1) C D                            (etp - 1) ep C D
    ragged      D for each assignment, at most C D      (etp - 1) C D
    """
    with jax.named_scope("dispatch"):
        x_ocD = grouped.take(x_MD, group.token_oc)      # 0 in empty slots
        return _send(x_ocD, axes, group.route).reshape(-1, x_MD.shape[1])


def contents(group: TokenGroup):
    """Describes what the received slots contain, derived from the counts alone.

    A span of slots contains all assignments of one source for one expert. A buffer consists of spans, ordered by source and
    then by expert, followed by empty slots.

    Returns:
      choices [r, 1]: the expert and the router weight of each received slot; keep_r1 is False for an empty slot.
      rank_r1: how many assignments that this device received for the same expert come before the slot's.
      count_e: number of assignments that this device received for each of its experts.
    """
    (buffers, C), experts = group.weight_bC.shape, group.sent_bse.shape[2]
    size = group.sent_bse.reshape(buffers, -1)              # number of assignments in each span, [b, s e]
    slot_C, end = jnp.arange(C), jnp.cumsum(size, axis=1)
    span_bC = jnp.sum(slot_C[:, None] >= end[:, None], axis=2)
    filled_bC = span_bC < size.shape[1]
    span_bC = jnp.minimum(span_bC, size.shape[1] - 1)
    # rank = slot + total - end, as in this example of two sources and two experts, with spans of 2, 1, 3 and 1 slots:
    #     slot        0  1  2  3  4  5  6
    #     expert      0  0  1  0  0  0  1
    #     rank        0  1  0  2  3  4  1
    #     end         2  2  3  6  6  6  7      end of the slot's span
    #     total       2  2  1  5  5  5  2      assignments for the expert up to this end, in all buffers so far
    # Both end - slot and total - rank count the assignments from the slot to the end of its span.
    total = jnp.cumsum(group.sent_bse.reshape(-1, experts), axis=0).reshape(end.shape)
    rank_bC = slot_C + jnp.take_along_axis(total - end, span_bC, axis=1)
    received = Choices(*(x.reshape(-1, 1) for x in (span_bC % experts, group.weight_bC, filled_bC)))
    return received, rank_bC.reshape(-1, 1), group.sent_bse.sum((0, 1))


def combine(y_rD, group: TokenGroup, axes):
    """Sends the experts' outputs back to the devices of their tokens (steps 4 and 5).

    Returns y_MD, the sum over each token's choices.
    """
    D, sent_buffers = y_rD.shape[1], len(group.token_oc)
    with jax.named_scope("combine"):
        y_toCD = y_rD.reshape(-1, sent_buffers, group.weight_bC.shape[1], D)
        y_oCD = jax.lax.psum_scatter(y_toCD, "etp") if "etp" in axes else y_toCD[0]     # 't o C D -> o C D', summed
        if group.route:
            y_ocD = _ragged_all_to_all(y_oCD[0], group.token_oc.size, group.route.to_tokens)[None]
        elif "ep" in axes:
            y_ocD = jax.lax.all_to_all(y_oCD, "ep", 0, 0, tiled=True)
        else:
            y_ocD = y_oCD
    return grouped.take(y_ocD.reshape(-1, D), group.slot_Mj).sum(1)     # 0 for assignments that were not sent


def buffer_slots(M, top_k, experts, capacity, peers, transport, ragged=False) -> int:
    """Returns C, the slots of a buffer. One device fills the buffer; if `ragged`, all peers fill it together.

        needed = the most assignments that can ever be in the buffer, if each device has M tokens
        even   = the number of assignments in it if every peer gets the same number
        C      = min(needed, transport x even), or `needed` if `transport` is 0
    """
    senders = peers if ragged else 1
    needed = min(senders * M * min(top_k, experts), capacity * experts)
    return min(needed, math.ceil(transport * M * top_k * senders / peers)) if transport else needed


def _assign_slots(choices: Choices, E: int, buffers: int, slots: int):
    """Returns slot_Mj, token_oc (see `TokenGroup`) and sent_E, the number of assignments sent to each expert.

    A device sends `buffers` buffers of `slots` slots. If more than `slots` assignments need the same buffer, first choices get
    slots before second choices. Within a buffer, assignments are sorted by expert.
    """
    (M, top_k), experts = choices.expert_Mj.shape, E // buffers
    expert_a, keep_a = queue_order(choices.expert_Mj), queue_order(choices.keep_Mj)
    buffer_a = expert_a // experts
    if slots < M * min(top_k, experts):         # otherwise a buffer has a slot for each assignment that can need it
        keep_a &= rank(buffer_a, keep_a, buffers)[0] < slots
    rank_a, sent_E = rank(expert_a, keep_a, E)
    sent_oe = sent_E.reshape(buffers, experts)
    first_E = (jnp.cumsum(sent_oe, axis=1) - sent_oe).reshape(E)        # the first slot of each expert in its buffer
    slot_a = jnp.where(keep_a, buffer_a * slots + first_E[expert_a] + rank_a, buffers * slots)
    token_a = jnp.tile(jnp.arange(M, dtype=jnp.int32), top_k)
    token = jnp.full(buffers * slots, M, jnp.int32).at[slot_a].set(token_a, mode="drop", unique_indices=True)
    return slot_a.reshape(top_k, M).T, token.reshape(buffers, slots), sent_E


def _assign_ragged_slots(choices: Choices, E: int, peers: int, C: int):
    """Returns the same as `_assign_slots` for the ragged mode: one sent buffer, sorted by expert and therefore by peer.

    The sent buffer has a slot for every assignment, but a receiver has only C slots for all its peers together. If more than C
    assignments choose a receiver, devices with a lower index on ep get slots first, and within a device first choices get slots
    before second choices.
    """
    (M, top_k), experts = choices.expert_Mj.shape, E // peers
    if C < peers * M * min(top_k, experts):     # otherwise C is enough for any routing
        rank_a, wanted_p = rank(queue_order(choices.expert_Mj) // experts, queue_order(choices.keep_Mj), peers)
        # slots of each receiver that remain after the devices with a lower index; negative if they want more than C
        free_p = C - earlier_and_total(wanted_p, ("ep",))[0]
        fits_Mj = rank_a.reshape(top_k, M).T < free_p[choices.expert_Mj // experts]
        choices = choices._replace(keep_Mj=choices.keep_Mj & fits_Mj)
    return _assign_slots(choices, E, buffers=1, slots=M * top_k)


def _ragged_route(sent_dE, C: int, peers: int) -> RaggedRoute:
    """Returns the ragged exchange. `sent_dE` is the number of assignments that each device sends to each expert."""
    index, etp = jax.lax.axis_index("ep"), len(sent_dE) // peers
    etp_index = jax.lax.axis_index("etp") if etp > 1 else 0
    sent_pE = jax.lax.dynamic_index_in_dim(sent_dE.reshape(etp, peers, -1), etp_index, 0, keepdims=False)
    sent_pp = sent_pE.reshape(peers, peers, -1).sum(2)              # from peer (axis 0) to peer (axis 1)
    token_offset_pp = jnp.cumsum(sent_pp, axis=1) - sent_pp         # in the buffer of the tokens' device
    expert_offset_pp = jnp.cumsum(sent_pp, axis=0) - sent_pp        # in the buffer of the experts' device
    return RaggedRoute(
        slots=C,
        to_experts=Transfers(input_offsets=token_offset_pp[index], send_sizes=sent_pp[index],
                             output_offsets=expert_offset_pp[index], recv_sizes=sent_pp[:, index]),
        to_tokens=Transfers(input_offsets=expert_offset_pp[:, index], send_sizes=sent_pp[:, index],
                            output_offsets=token_offset_pp[:, index], recv_sizes=sent_pp[index]))


def _to_local_experts(sent_dnE, axes, peers, ragged):
    """Returns sent_bsne: the counts for this device's experts, by received buffer, source and token group."""
    if "ep" in axes:
        sent_dnpe = sent_dnE.reshape(*sent_dnE.shape[:2], peers, -1)
        sent_dne = jax.lax.dynamic_index_in_dim(sent_dnpe, jax.lax.axis_index("ep"), 2, keepdims=False)
    else:
        sent_dne = sent_dnE
    return sent_dne.reshape(-1, peers if ragged else 1, *sent_dne.shape[1:])


def _fill(weight_Mj, slot_Mj, token_oc):
    """Returns weight_oc: the router weight of each slot, 0 for an empty slot."""
    weight = jnp.zeros(token_oc.size, weight_Mj.dtype).at[slot_Mj].set(weight_Mj, mode="drop", unique_indices=True)
    return weight.reshape(token_oc.shape)


def _send_weights(weight_oc: list, axes, routes, ragged) -> list:
    """Sends the router weights of all token groups, 4 bytes per slot. Returns weight_bC of each token group.

    By default one exchange sends the weights of all token groups; if `ragged`, there is one exchange for each.
    """
    with jax.named_scope("weights"):
        if ragged:
            return [_send(weight[..., None], axes, route)[..., 0] for weight, route in zip(weight_oc, routes)]
        ends = list(itertools.accumulate(weight.shape[1] for weight in weight_oc))
        return jnp.split(_send(jnp.concatenate(weight_oc, 1), axes), ends[:-1], axis=1)


def _send(x_oc, axes, route: RaggedRoute | None = None):
    """Sends buffers [o, c, ...] to the experts' devices (steps 1 and 2). Returns the received buffers [b, C, ...]."""
    if route:
        x_oC = checkpoint_name(_ragged_all_to_all(x_oc[0], route.slots, route.to_experts)[None], ARRIVED)
    elif "ep" in axes:      # 'p C -> p C': (ep - 1) C slots from the peers
        x_oC = checkpoint_name(jax.lax.all_to_all(x_oc, "ep", 0, 0, tiled=True), ARRIVED)
    else:
        x_oC = x_oc
    if "etp" not in axes:
        return x_oC
    return jax.lax.all_gather(x_oC, "etp").reshape(-1, *x_oC.shape[1:])     # 'o C -> t o C': (etp - 1) o C slots


def _ragged_all_to_all(x, slots: int, transfers: Transfers):
    """Sends the buffer x [slots, ...]. Returns the received buffer, which has `slots` slots; unfilled slots are 0."""
    # Inside shard_map, an array's type includes the mesh axes over which its value varies. The empty buffer must have the same
    # axes as the transfers, and a constant has none, so the zero is computed from an offset.
    zero = transfers.input_offsets[0] * 0
    empty = jnp.full((slots, *x.shape[1:]), zero, x.dtype)
    return jax.lax.ragged_all_to_all(x, empty, *transfers, axis_name="ep")
