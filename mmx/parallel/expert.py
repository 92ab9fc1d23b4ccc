"""Mixture of experts whose result does not depend on the mesh (paper sections 2.1, 2.2.3, 3.1 and 4.2; model.md section 5).

A token's place in its expert's queue is counted over all devices, in the order (choice, row, time), and places past the
capacity are dropped: who is dropped, and the load-balancing statistics, are the same on every mesh. Then tokens travel
to their experts:

    slots [ep, room, D] --all-to-all over ep--> --all-gather over etp--> SwiGLU of E/ep experts with F/etp
                        <--all-to-all over ep-- <--reduce-scatter over etp--

Slots are sorted by expert, so that the counts, known everywhere, say what is in them. By ragged all-to-all (TPU and GPU)
assignments stand close behind each other, by peer and expert, and what travels is what is there:

    assignments [M J, D] --ragged over ep--> [room, D] --all-gather over etp--> ... --> and back

The router's weights travel ahead of the tokens and scale what is inside the experts: then nothing that comes back is needed
for any gradient, and a backward pass that recomputes the layer does not send it again. Inside `shard_map` every letter is a
local extent. Letters beyond `dims`: J choices, A = J M assignments, P peers over ep, X buffers that arrive, over etp and, of
slots, over ep, C places in one, R devices that one comes from (of slots 1, by ragged all-to-all P), I = X C.
"""
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from mmx.kernels import grouped
from mmx.parallel import sharding

EXPERT = ("etp", "ep")      # the axes that the experts' matrices are cut over
MATRICES = "EDF", "EDF", "EFD"
ARRIVED = "arrived"         # what experts were sent, for a policy of jax.checkpoint
FEW = 8     # assignments that are computed one by one (decode of a few rows)


class Stats(NamedTuple):
    """What a layer's router did, over all real tokens of the batch."""
    load_E: jax.Array           # share of the assignments, before drops; sums to 1
    prob_E: jax.Array           # mean router probability
    z: jax.Array                # mean logsumexp(logits)^2
    dropped: jax.Array          # share of the assignments that found no place with their expert
    overflow: jax.Array         # share that did, but no slot on the way


def moe(x_BTD, live_BT, router_DE, w1_EDF, w3_EDF, w2_EFD, *, top_k: int, capacity: float, transport: float = 0.0,
        token_groups: int = 1, ragged: bool = False):
    """Top-k experts of each token, weights renormalised over the choices. Returns y_BTD, router logits_BTE, Stats.

    `live_BT` is False for padding, which takes no place. `capacity` times tokens x top_k / experts is what an expert
    takes of the whole batch; 0 drops nothing. `transport` times a device's even share of assignments is the number of
    slots to each peer; 0 makes as many as could be needed. `token_groups` travel one after another, so that one's
    exchange runs under another's experts. `ragged`: they travel by ragged all-to-all, which CPUs do not have, and
    `transport` bounds the places for what comes from all peers together. Under a mesh (jax.set_mesh) arrays are cut by
    `parallel.sharding`, experts' matrices as they are kept; rows or time that do not split are computed everywhere, each
    device its experts' part.
    """
    mesh, weights = sharding.active_mesh(), (w1_EDF, w3_EDF, w2_EFD)
    local = functools.partial(_local, top_k=top_k, capacity=capacity, transport=transport, token_groups=token_groups,
                              ragged=ragged)
    if mesh is None:
        return local(x_BTD, live_BT, router_DE, *weights, rows=(), time=(), expert=(), kept=())
    (rows, time), expert = sharding.token_axes(mesh), sharding.nontrivial(mesh, EXPERT)
    kept = tuple(sharding.weight_spec(letters, w.shape, mesh) for letters, w in zip(MATRICES, weights))
    if not sharding.tokens_are_sharded(*live_BT.shape):     # no FSDP axis holds other tokens: the matrices are gathered outside
        rows, time, kept = (), (), tuple(map(sharding.without_fsdp, MATRICES, kept))
    tokens = P(rows, time)
    sharded = jax.shard_map(functools.partial(local, rows=rows, time=time, expert=expert, kept=kept),
                            in_specs=(tokens, tokens, P(), *kept), out_specs=(tokens, tokens, P()))
    return sharded(x_BTD, live_BT, router_DE, *weights)


def _local(x_BTD, live_BT, router_DE, *weights, top_k, capacity, transport, token_groups, ragged, rows, time, expert, kept):
    """Of the axes of more than one device, `rows` and `time` are those that tokens are cut over, `expert` experts."""
    B, T, D = x_BTD.shape
    M, E = B * T, router_DE.shape[1]
    x_MD, live_M = x_BTD.reshape(M, D), live_BT.reshape(M)
    axes = rows + time
    # the router computes in float32: its choices decide who is computed at all
    logits_ME = x_MD.astype(_wide(x_MD)) @ router_DE.astype(_wide(x_MD))
    prob_ME = jax.nn.softmax(logits_ME)
    top_MJ, expert_MJ = jax.lax.top_k(logits_ME, top_k)
    weight_MJ = jax.nn.softmax(top_MJ)

    with jax.named_scope("route"):
        place_BTJ, total_JE = places(expert_MJ.reshape(B, T, top_k), live_BT, E, rows, time)
        limit = most(capacity, M * top_k * _size(axes), E)
        keep_MJ = live_M[:, None] & (place_BTJ.reshape(M, top_k) < limit)
    with jax.named_scope("experts"):
        carried = jnp.sum(keep_MJ, dtype=jnp.int32)
        if not expert:
            y_MD = _on_the_spot(x_MD, weight_MJ, expert_MJ, keep_MJ, *_whole(weights, kept, axes))
        elif axes:
            y_MD, carried = _by_exchange(x_MD, weight_MJ, expert_MJ, keep_MJ, limit, expert, _whole(weights, kept, axes),
                                         transport, token_groups, ragged and "ep" in expert)
        else:
            y_MD = _each_its_own(x_MD, weight_MJ, expert_MJ, keep_MJ, expert, *_whole(weights, kept, expert))

    count_E = total_JE.sum(0)
    assigned = jnp.maximum(count_E.sum(), 1)
    live_M1 = live_M[:, None]
    sums = (jnp.sum(prob_ME * live_M1, 0), jnp.sum(live_M * jax.nn.logsumexp(logits_ME, 1) ** 2),
            jnp.sum(keep_MJ, dtype=jnp.int32), carried)
    prob_E, z, placed, carried = jax.lax.psum(sums, axes) if axes else sums
    real = assigned / top_k
    stats = Stats(count_E / assigned, prob_E / real, z / real, 1 - placed / assigned, (placed - carried) / assigned)
    return y_MD.reshape(B, T, D), logits_ME.reshape(B, T, E), stats


def places(expert_BTJ, live_BT, E: int, rows=(), time=()):
    """Each assignment's place in its expert's queue, and each choice's assignments to each expert [J, E]: over all devices
    that `rows` and `time` are cut over."""
    chosen_BTJE = jax.nn.one_hot(expert_BTJ, E, dtype=jnp.int32) * live_BT[..., None, None]
    before_BJE, total_JE = _counts_before(chosen_BTJE.sum(1), rows, time)
    earlier_JE = jnp.cumsum(total_JE, axis=0) - total_JE        # all tokens' first choices, then their second, ...
    place_BTJE = jnp.cumsum(chosen_BTJE, axis=1) - 1 + (before_BJE + earlier_JE)[:, None]
    return jnp.take_along_axis(place_BTJE, expert_BTJ[..., None], axis=3)[..., 0], total_JE


def most(capacity: float, assignments: int, E: int) -> int:
    """How many of the assignments an expert takes."""
    return -(-int(capacity * assignments * 1e6) // int(E * 1e6)) if capacity else assignments


def _on_the_spot(x_MD, weight_MJ, expert_MJ, keep_MJ, *weights):
    (M, J), E = expert_MJ.shape, len(weights[0])
    if M * J <= FEW:
        return grouped.expert_ffn_few(x_MD, weight_MJ * keep_MJ, expert_MJ, *weights)
    if E == J == 1:     # dense: nothing to sort
        h_MF = jax.nn.silu(x_MD @ weights[0][0]) * (x_MD @ weights[1][0])
        return ((weight_MJ * keep_MJ).astype(h_MF.dtype) * h_MF) @ weights[2][0]
    rank_A, count_E = _rank(_queue(expert_MJ), _queue(keep_MJ), E)
    block = block_size(M * J, E)
    plan = grouped.plan(expert_MJ, rank_A.reshape(J, M).T, keep_MJ, count_E, block)
    return grouped.expert_ffn(x_MD, weight_MJ, *weights, plan, block=block)


def _each_its_own(x_MD, weight_MJ, expert_MJ, keep_MJ, axes, *weights):
    """All tokens are everywhere: the sum over devices of what their experts and parts of F make."""
    E = len(weights[0])
    x_MD, weight_MJ, keep_MJ, own_MJ = jax.lax.pcast((x_MD, weight_MJ, keep_MJ, expert_MJ), axes, to="varying")
    if "ep" in axes:
        own_MJ -= jax.lax.axis_index("ep") * E
        keep_MJ &= (own_MJ >= 0) & (own_MJ < E)
    return jax.lax.psum(_on_the_spot(x_MD, weight_MJ, jnp.clip(own_MJ, 0, E - 1), keep_MJ, *weights), axes)


def _by_exchange(x_MD, weight_MJ, expert_MJ, keep_MJ, limit, axes, weights, transport, token_groups, ragged):
    """y_MD and the number of assignments that travelled."""
    (M, J), peers = expert_MJ.shape, _size("ep") if "ep" in axes else 1
    E = peers * len(weights[0])
    cuts = [M * n // token_groups for n in range(token_groups + 1)]
    groups = [slice(*cut) for cut in itertools.pairwise(cuts) if cut[0] < cut[1]]
    rooms = [room_for(g.stop - g.start, J, E // peers, limit, peers, transport, ragged) for g in groups]
    make = _assignments if ragged else _slots
    slots = [make(expert_MJ[g], keep_MJ[g], E, peers, room) for g, room in zip(groups, rooms)]
    # X P E: 4 bytes a count from every device that exchanges with this one
    sent_XNE = jax.lax.all_gather(jnp.stack([sent_E for *_, sent_E in slots]), axes)
    routes = [_route(sent_XNE[:, n], room, peers) if ragged else None for n, room in enumerate(rooms)]
    if "ep" in axes:
        sent_XNPE = sent_XNE.reshape(*sent_XNE.shape[:2], peers, E // peers)
        sent_XNE = jax.lax.dynamic_index_in_dim(sent_XNPE, jax.lax.axis_index("ep"), 2, keepdims=False)
    sent_XRNE = sent_XNE.reshape(-1, peers if ragged else 1, *sent_XNE.shape[1:])
    weights_PC = [_at_slots(weight_MJ[g], slot_MJ, token_PC) for g, (slot_MJ, token_PC, _) in zip(groups, slots)]
    with jax.named_scope("weights"):        # 4 bytes a slot
        if ragged:
            weights_XC = [_there(weight_PC[..., None], axes, route)[..., 0] for weight_PC, route in zip(weights_PC, routes)]
        else:
            ends = list(itertools.accumulate(weight_PC.shape[1] for weight_PC in weights_PC))
            weights_XC = jnp.split(_there(jnp.concatenate(weights_PC, 1), axes), ends[:-1], axis=1)
    y = [_travel(x_MD[g], weight_XC, slot_MJ, token_PC, sent_XRNE[:, :, n], axes, weights, route)
         for n, (g, weight_XC, (slot_MJ, token_PC, _), route) in enumerate(zip(groups, weights_XC, slots, routes))]
    return jnp.concatenate(y), sum(sent_E.sum() for *_, sent_E in slots)


def room_for(M, J, experts, limit, peers, transport, ragged=False):
    """Slots for each peer, or ragged places for all of them: all that could come, or `transport` times the even share where
    that is less."""
    senders = peers if ragged else 1
    all_there_are = min(senders * M * min(J, experts), limit * experts)
    return min(all_there_are, math.ceil(transport * M * J * senders / peers)) if transport else all_there_are


def _slots(expert_MJ, keep_MJ, E, peers, room):
    """Each assignment's slot (past the end where it has none), each slot's token (M: none), and what goes to each expert.

    A peer's slots go to the first choices first; then they are sorted by expert.
    """
    M, J = expert_MJ.shape
    expert_A, keep_A = _queue(expert_MJ), _queue(keep_MJ)
    peer_A = expert_A // (E // peers)
    if room < M * min(J, E // peers):
        keep_A &= _rank(peer_A, keep_A, peers)[0] < room
    rank_A, sent_E = _rank(expert_A, keep_A, E)
    sent_PE = sent_E.reshape(peers, E // peers)
    first_E = (jnp.cumsum(sent_PE, axis=1) - sent_PE).reshape(E)
    slot_A = jnp.where(keep_A, peer_A * room + first_E[expert_A] + rank_A, peers * room)
    token_A = jnp.tile(jnp.arange(M, dtype=jnp.int32), J)
    token_I = jnp.full(peers * room, M, jnp.int32).at[slot_A].set(token_A, mode="drop", unique_indices=True)
    return slot_A.reshape(J, M).T, token_I.reshape(peers, room), sent_E


def _assignments(expert_MJ, keep_MJ, E, peers, room):
    """The same for ragged all-to-all: one run of slots, by expert and so by peer. Where a peer has too little room, those of
    earlier devices go, and of a device the first choices."""
    (M, J), experts = expert_MJ.shape, E // peers
    if room < peers * M * min(J, experts):
        rank_A, want_P = _rank(_queue(expert_MJ) // experts, _queue(keep_MJ), peers)
        left_P = room - _earlier_and_all(want_P, ("ep",))[0]
        keep_MJ &= rank_A.reshape(J, M).T < left_P[expert_MJ // experts]
    return _slots(expert_MJ, keep_MJ, E, 1, M * J)


class Route(NamedTuple):
    """A ragged exchange over ep and its way back: the four last arguments of jax.lax.ragged_all_to_all."""
    room: int                   # places for what arrives
    there: tuple
    back: tuple


def _route(sent_XE, room, peers):
    """`sent_XE`: what each device over (etp, ep), or ep alone, sends each of all experts."""
    at, here = jax.lax.axis_index("ep"), len(sent_XE) // peers
    own = jax.lax.axis_index("etp") if here > 1 else 0
    sent_PE = jax.lax.dynamic_index_in_dim(sent_XE.reshape(here, peers, -1), own, 0, keepdims=False)
    sent_PP = sent_PE.reshape(peers, peers, -1).sum(2)          # from, to
    stood_PP, lands_PP = (jnp.cumsum(sent_PP, axis) - sent_PP for axis in (1, 0))
    return Route(room, (stood_PP[at], sent_PP[at], lands_PP[at], sent_PP[:, at]),
                 (lands_PP[:, at], sent_PP[:, at], stood_PP[:, at], sent_PP[at]))


def _ragged(x_ID, room, sizes):
    empty = jnp.full((room, *x_ID.shape[1:]), sizes[0][0] * 0, x_ID.dtype)      # varies over the mesh as the sizes do
    return jax.lax.ragged_all_to_all(x_ID, empty, *sizes, axis_name="ep")


def _at_slots(weight_MJ, slot_MJ, token_PC):
    slots = jnp.zeros(token_PC.size, weight_MJ.dtype).at[slot_MJ].set(weight_MJ, mode="drop", unique_indices=True)
    return slots.reshape(token_PC.shape)


def _there(slots_PC, axes, route=None):
    """Slots, and what is in them, at the devices they are for, from all that send there: [X, C, ...]."""
    if route:
        slots_PC = checkpoint_name(_ragged(slots_PC[0], route.room, route.there)[None], ARRIVED)
    elif "ep" in axes:
        slots_PC = checkpoint_name(jax.lax.all_to_all(slots_PC, "ep", 0, 0, tiled=True), ARRIVED)
    return jax.lax.all_gather(slots_PC, "etp").reshape(-1, *slots_PC.shape[1:]) if "etp" in axes else slots_PC


def _travel(x_MD, weight_XC, slot_MJ, token_PC, sent_XRE, axes, weights, route):
    """There, through the experts, and back. Bytes a device sends, each way: (ep-1)/ep I D over ep, then (etp-1) I D over
    etp, with I = ep x room slots; by ragged all-to-all what is kept, at most M J D, over ep, and I = room."""
    (X, room), D, E = weight_XC.shape, x_MD.shape[1], sent_XRE.shape[2]
    with jax.named_scope("dispatch"):
        x_ID = _there(grouped.take(x_MD, token_PC), axes, route).reshape(X * room, D)
    # place c of buffer x holds a token of the expert whose run in it c falls in
    sent_XA, slot_C = sent_XRE.reshape(X, -1), jnp.arange(room)
    end_XA = jnp.cumsum(sent_XA, axis=1)
    run_XC = jnp.sum(slot_C[:, None] >= end_XA[:, None], axis=2)
    full_XC = run_XC < sent_XA.shape[1]
    run_XC = jnp.minimum(run_XC, sent_XA.shape[1] - 1)
    # its run's start is left behind, the expert's runs of earlier devices come before
    until_XA = jnp.cumsum(sent_XRE.reshape(-1, E), axis=0).reshape(end_XA.shape)
    rank_XC = slot_C + jnp.take_along_axis(until_XA - end_XA, run_XC, axis=1)
    expert_I1, rank_I1, full_I1, weight_I1 = (a.reshape(-1, 1) for a in (run_XC % E, rank_XC, full_XC, weight_XC))
    block = block_size(slot_MJ.size * X // len(token_PC), E)
    plan = grouped.plan(expert_I1, rank_I1, full_I1, sent_XRE.sum((0, 1)), block)
    y_ID = grouped.expert_ffn(x_ID, weight_I1, *weights, plan, block=block)
    with jax.named_scope("combine"):
        y_XPCD = y_ID.reshape(X // len(token_PC), len(token_PC), room, D)
        y_PCD = jax.lax.psum_scatter(y_XPCD, "etp") if "etp" in axes else y_XPCD[0]
        if route:
            y_PCD = _ragged(y_PCD[0], token_PC.size, route.back)
        elif "ep" in axes:
            y_PCD = jax.lax.all_to_all(y_PCD, "ep", 0, 0, tiled=True)
    return grouped.take(y_PCD.reshape(-1, D), slot_MJ).sum(1)


def balance_loss(load_E, prob_E, top_k: int, form: str):
    """Load-balancing loss of one layer: "switch" E sum(f P), "paper" (1/E) sum(f P), "hf" the first times top_k.

    f sums to 1 and is a constant; balanced values are 1, 1/E^2 and top_k. For "hf", whose loss is that of all layers
    taken together, pass the means over the layers (model.md section 5).
    """
    E = len(load_E)
    scale = {"switch": E, "paper": 1 / E, "hf": E * top_k}[form]
    return scale * jnp.sum(jax.lax.stop_gradient(load_E) * prob_E)


def _counts_before(count_BJE, rows, time):
    """What stands before each row's tokens here, in earlier rows and earlier in the row, choice by choice; and in all.

    4 B J E bytes from each device with these rows, and 4 J E from those with others.
    """
    earlier_BJE, row_BJE = _earlier_and_all(count_BJE, time)
    before_JE, total_JE = _earlier_and_all(row_BJE.sum(0), rows)
    return before_JE + jnp.cumsum(row_BJE, axis=0) - row_BJE + earlier_BJE, total_JE


def _earlier_and_all(count, axes):
    """The sums over the devices before this one on the axes, and over all."""
    if not axes:
        return jnp.zeros_like(count), count
    counts = jax.lax.all_gather(count, axes)
    before = jnp.arange(len(counts)) < jax.lax.axis_index(axes)
    return jnp.tensordot(before.astype(count.dtype), counts, 1), jax.lax.psum(count, axes)


def _size(axes):
    return jax.lax.axis_size(axes) if axes else 1


def _queue(a_MJ):
    """Assignments in the order that experts take them: all first choices, then all second ones."""
    return a_MJ.T.reshape(-1)


def _rank(kind_A, keep_A, kinds):
    """Each one's number among the kept of its kind, and how many of each kind are kept."""
    kept_AK = jax.nn.one_hot(kind_A, kinds, dtype=jnp.int32) * keep_A[:, None]
    return jnp.take_along_axis(jnp.cumsum(kept_AK, axis=0) - 1, kind_A[:, None], axis=1)[:, 0], kept_AK.sum(0)


def _whole(weights, kept, axes):
    """The device's experts with all of D, which vary over all `axes` as its tokens do."""
    return [sharding.gather_weight(w, letters, spec, axes)
            for w, letters, spec in zip(weights, MATRICES, kept)] if axes else weights


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def block_size(assignments, experts):
    """Rows a block: about half of an expert's share, so that padding stays small; 128 at most, 8 at least."""
    share = max(assignments // (2 * experts), 1)
    return min(128, max(8, 1 << (share.bit_length() - 1)))
