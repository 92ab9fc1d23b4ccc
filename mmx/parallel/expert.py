"""Mixture of experts whose result does not depend on the mesh (paper sections 2.1, 2.2.3 and 4.2; model.md section 5).

A token's place in its expert's queue is counted over all devices, first choices before second ones, and places past
the capacity are dropped: who is dropped, and the load-balancing statistics, are the same on every mesh. Inside
`shard_map` every letter is a local extent; experts are whole on every device of the `edp` axis.
"""
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mmx.kernels import grouped

TOKEN_AXES = ("edp",)
FEW = 8     # assignments that are computed one by one (decode of a few rows)


class Stats(NamedTuple):
    """What a layer's router did, over all real tokens of the batch."""
    load_E: jax.Array           # share of the assignments, before drops; sums to 1
    prob_E: jax.Array           # mean router probability
    z: jax.Array                # mean logsumexp(logits)^2
    dropped: jax.Array          # share of the assignments dropped


def moe(x_MD, live_M, router_DE, w1_EDF, w3_EDF, w2_EFD, *, top_k: int, capacity: float):
    """Top-k experts of each token, weights renormalised over the choices. Returns y_MD, router logits_ME, Stats.

    `live_M` is False for padding, which takes no place. `capacity` times tokens x top_k / experts is what an expert
    takes of the whole batch; 0 drops nothing. Under a mesh (jax.set_mesh) tokens are sharded over TOKEN_AXES.
    """
    local = functools.partial(_local, top_k=top_k, capacity=capacity)
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in TOKEN_AXES)
    if devices == 1 or len(x_MD) % devices:     # a few tokens (a sample's decode) are computed whole on every device
        return local(x_MD, live_M, router_DE, w1_EDF, w3_EDF, w2_EFD, axes=())
    # 'M/edp D, D E, E D F -> M/edp D': no bytes but two all-gathers and a psum of [J, E] and [E] counts
    sharded = jax.shard_map(functools.partial(local, axes=TOKEN_AXES),
                            in_specs=(P(TOKEN_AXES), P(TOKEN_AXES), P(), P(), P(), P()),
                            out_specs=(P(TOKEN_AXES), P(TOKEN_AXES), P()))
    return sharded(x_MD, live_M, router_DE, w1_EDF, w3_EDF, w2_EFD)


def _local(x_MD, live_M, router_DE, w1_EDF, w3_EDF, w2_EFD, *, top_k, capacity, axes):
    M, E = len(x_MD), router_DE.shape[1]
    # the router computes in float32: its choices decide who is computed at all
    logits_ME = x_MD.astype(_wide(x_MD)) @ router_DE.astype(_wide(x_MD))
    prob_ME = jax.nn.softmax(logits_ME)
    top_MJ, expert_MJ = jax.lax.top_k(logits_ME, top_k)
    weight_MJ = jax.nn.softmax(top_MJ)

    with jax.named_scope("route"):
        chosen_MJE = jax.nn.one_hot(expert_MJ, E, dtype=jnp.int32) * live_M[:, None, None]
        before_JE, total_JE = _counts_before(chosen_MJE.sum(0), axes)
        earlier_JE = jnp.cumsum(total_JE, axis=0) - total_JE        # all tokens' first choices, then their second, ...
        place_MJE = jnp.cumsum(chosen_MJE, axis=0) - 1 + before_JE + earlier_JE
        place_MJ = jnp.take_along_axis(place_MJE, expert_MJ[..., None], axis=2)[..., 0]
        tokens = M * _size(axes)
        limit = -(-int(capacity * tokens * top_k * 1e6) // int(E * 1e6)) if capacity else tokens * top_k
        keep_MJ = live_M[:, None] & (place_MJ < limit)

        kept_MJE = chosen_MJE * keep_MJ[..., None]
        kept_JE = kept_MJE.sum(0)
        rank_MJE = jnp.cumsum(kept_MJE, axis=0) - 1 + jnp.cumsum(kept_JE, axis=0) - kept_JE
        rank_MJ = jnp.take_along_axis(rank_MJE, expert_MJ[..., None], axis=2)[..., 0]
    with jax.named_scope("experts"):
        weights = [_vary(w, axes) for w in (w1_EDF, w3_EDF, w2_EFD)]
        if M * top_k <= FEW:
            y_MD = grouped.expert_ffn_few(x_MD, weight_MJ * keep_MJ, expert_MJ, *weights)
        else:
            block = _block_size(M * top_k, E)
            plan = grouped.plan(expert_MJ, rank_MJ, keep_MJ, kept_JE.sum(0), block)
            y_MD = grouped.expert_ffn(x_MD, weight_MJ, *weights, plan, block=block)

    count_E = total_JE.sum(0)
    assigned = jnp.maximum(count_E.sum(), 1)
    live_M1 = live_M[:, None]
    sums = (jnp.sum(prob_ME * live_M1, 0), jnp.sum(live_M * jax.nn.logsumexp(logits_ME, 1) ** 2), kept_JE.sum())
    prob_E, z, kept = jax.lax.psum(sums, axes) if axes else sums
    real = assigned / top_k
    return y_MD, logits_ME, Stats(count_E / assigned, prob_E / real, z / real, 1 - kept / assigned)


def balance_loss(load_E, prob_E, top_k: int, form: str):
    """Load-balancing loss of one layer: "switch" E sum(f P), "paper" (1/E) sum(f P), "hf" the first times top_k.

    f sums to 1 and is a constant; balanced values are 1, 1/E^2 and top_k. For "hf", whose loss is that of all layers
    taken together, pass the means over the layers (model.md section 5).
    """
    E = len(load_E)
    scale = {"switch": E, "paper": 1 / E, "hf": E * top_k}[form]
    return scale * jnp.sum(jax.lax.stop_gradient(load_E) * prob_E)


def _counts_before(count_JE, axes):
    """Counts on the devices before this one, and on all."""
    if not axes:
        return jnp.zeros_like(count_JE), count_JE
    count_XJE = jax.lax.all_gather(count_JE, axes)
    earlier_X = jnp.arange(len(count_XJE)) < jax.lax.axis_index(axes)
    return jnp.sum(count_XJE * earlier_X[:, None, None], 0), jax.lax.psum(count_JE, axes)


def _size(axes):
    return jax.lax.axis_size(axes) if axes else 1


def _vary(w, axes):
    return jax.lax.pcast(w, axes, to="varying") if axes else w


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _block_size(assignments, experts):
    """Rows a block: about half of an expert's share, so that padding stays small; 128 at most, 8 at least."""
    share = max(assignments // (2 * experts), 1)
    return min(128, max(8, 1 << (share.bit_length() - 1)))
