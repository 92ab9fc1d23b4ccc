"""Attention on a mesh: rows over the data axes, heads over etp, sequences over seq, by LASP+ and ring attention.

Behind a cache, states go on as in LASP+, while keys and values stay where they are: each device of seq has a part of the
cache's places, all of the new queries meet it there, and results over parts, and over the new keys themselves, are joined
by their log-sum-exp. Where rows or time do not split it is the kernels' plain call, which XLA splits as it can.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mmx.kernels.attention import softmax_attention
from mmx.kernels.lightning import lightning_attention
from mmx.parallel import lightning as lasp
from mmx.parallel import ring, sharding


def lightning(q_BHTK, k_BHTK, v_BHTV, log_decay_H, *, segments_BT, state_BHKV, impl, chunk):
    """`kernels.lightning_attention`. Returns o_BHTV and the state behind the last token (None without a given one)."""
    args, how = (q_BHTK, k_BHTK, v_BHTV, log_decay_H), {"impl": impl, "chunk": chunk}
    if not _split(q_BHTK):
        return lightning_attention(*args, segments_BT=segments_BT, state_BHKV=state_BHKV, **how)
    function = functools.partial(lasp.lightning_attention, axis="seq") if _cut() else lightning_attention

    def local(*args):
        *args, segments_BT, state_BHKV = args
        o_BHTV, last_BHKV = function(*args, segments_BT=segments_BT, state_BHKV=state_BHKV, **how)
        return o_BHTV, None if state_BHKV is None else last_BHKV
    return _sharded(local, ("BHSK", "BHSK", "BHSV", "H", "BS", "BHKV"), (*args, segments_BT, state_BHKV), (0, 5))


def softmax(q_BHTK, k_BGTK, v_BGTV, *, segments_BT, window=0):
    """`kernels.softmax_attention` of whole sequences; with a window time is not cut. KV heads are repeated just enough to be
    cut over etp."""
    if not _split(q_BHTK):
        return softmax_attention(q_BHTK, k_BGTK, v_BGTV, segments_BT=segments_BT, segments_BS=segments_BT, window=window)
    G, etp = k_BGTK.shape[1], sharding.active_mesh().shape["etp"]
    k_BGTK, v_BGTV = (jnp.repeat(x, math.lcm(G, etp) // G, axis=1) for x in (k_BGTK, v_BGTV))
    function = _ring if _cut() else functools.partial(softmax_attention, window=window)

    def local(q_BHTK, k_BGTK, v_BGTV, segments_BT):
        return function(q_BHTK, k_BGTK, v_BGTV, segments_BT=segments_BT),
    return _sharded(local, ("BHSK", "BGSK", "BGSV", "BS"), (q_BHTK, k_BGTK, v_BGTV, segments_BT), (0,))[0]


def softmax_with_cache(q_BHTK, k_BGTK, v_BGTV, cache, start_B, window=0):
    """o_BHTV of T new tokens: softmax attention to row b's first start_b places of a cache, and to one another.

    The cache is only read: to put the new ones in where others still read would copy it (`parallel.cache.put` does it
    behind the last layer). What is padding stands on the right of a row, where no real token sees it.
    """
    keys, scales = (cache["k_BGSK"], cache["v_BGSV"]), tuple(cache[name] for name in cache if "scale" in name)
    (G, S), mesh = cache["k_BGSK"].shape[1:3], sharding.active_mesh()
    args = (q_BHTK, k_BGTK, v_BGTV, start_B, *keys, *scales)
    if mesh is None or G % mesh.shape["etp"] or S % mesh.shape["seq"]:
        before = _before(q_BHTK, start_B, *keys, scales, window)
        new = softmax_attention(q_BHTK, k_BGTK, v_BGTV, window=window, return_lse=True)
        return _joined(*before, *new)[0].astype(q_BHTK.dtype)
    letters = ("BHSK", "BGSK", "BGSV", "B", "BGSK", "BGSV", "BGS", "BGS")[:len(args)]
    parts = functools.partial(_parts, cut=q_BHTK.shape[2] % mesh.shape["seq"] == 0, window=window)
    return _sharded(parts, letters, args, (0,))[0]


def _parts(q_BHTK, k_BGTK, v_BGTV, start_B, k_BGSK, v_BGSV, *scales, cut, window):
    """Every letter is a local extent; `cut`: whether T is, over seq."""
    place, mine = jax.lax.axis_index("seq"), q_BHTK
    if cut:
        with jax.named_scope("new"):        # 'B H T/seq K -> B H T K': the new queries, keys and values
            q_BHTK, k_BGTK, v_BGTV = (jax.lax.all_gather(x, "seq", axis=2, tiled=True) for x in (q_BHTK, k_BGTK, v_BGTV))
    o_BHTV, lse_BHT = _before(q_BHTK, start_B - place * k_BGSK.shape[2], k_BGSK, v_BGSV, scales, window)
    with jax.named_scope("join"):           # 'B H T V -> B H T/seq V', summed in float32
        top_BHT = jax.lax.pmax(lse_BHT, "seq")
        weight_BHT1 = jnp.exp(lse_BHT - jnp.where(jnp.isneginf(top_BHT), 0, top_BHT))[..., None]
        both = o_BHTV * weight_BHT1, weight_BHT1
        o_BHTV, sum_BHT1 = (jax.lax.psum_scatter(x, "seq", scatter_dimension=2, tiled=True) if cut
                            else jax.lax.psum(x, "seq") for x in both)
    T = mine.shape[2]
    if cut:
        top_BHT = jax.lax.dynamic_slice_in_dim(top_BHT, place * T, T, axis=2)
    lse_BHT = top_BHT + jnp.log(sum_BHT1[..., 0])
    first_B = jnp.full_like(start_B, place * T if cut else 0)
    new = softmax_attention(mine, k_BGTK, v_BGTV, start_B=first_B, window=window, return_lse=True)
    return _joined(o_BHTV / jnp.where(sum_BHT1 > 0, sum_BHT1, 1), lse_BHT, *new)[0].astype(q_BHTK.dtype),


def _before(q_BHTK, start_B, k_BGSK, v_BGSV, scales, window):
    """o_BHTV and lse_BHT over the keys before row b's start, which may lie before or behind all of them."""
    (B, _, T, _), S, how = q_BHTK.shape, k_BGSK.shape[2], {"scales": scales or None, "return_lse": True}
    if T == 1 and window != 1:      # a window of one has no key before its query
        return softmax_attention(q_BHTK, k_BGSK, v_BGSV, start_B=start_B - 1, window=max(window - 1, 0), **how)
    here_BS = jnp.asarray(jnp.arange(S) < start_B[:, None], jnp.int32)
    return softmax_attention(q_BHTK, k_BGSK, v_BGSV, start_B=start_B, window=window,
                             segments_BT=jnp.ones((B, T), jnp.int32), segments_BS=here_BS, **how)


def _joined(o_BHTV, lse_BHT, other_BHTV, other_BHT):
    """Attention to two sets of keys as to their union (`parallel.ring`); every query sees one of the second."""
    both_BHT = jnp.logaddexp(lse_BHT, other_BHT)
    weight_BHT1, other_BHT1 = (jnp.exp(x - both_BHT)[..., None] for x in (lse_BHT, other_BHT))
    return o_BHTV * weight_BHT1 + other_BHTV * other_BHT1, both_BHT


def _ring(q_BHTK, k_BGTK, v_BGTV, *, segments_BT):
    """The ring over seq, balanced where a device's tokens are two blocks."""
    if q_BHTK.shape[2] % 2:
        return ring.softmax_attention(q_BHTK, k_BGTK, v_BGTV, axis="seq", segments_BT=segments_BT)
    q_BHTK, k_BGTK, v_BGTV = (ring.to_zigzag(x, "seq", 2) for x in (q_BHTK, k_BGTK, v_BGTV))
    segments_BT = None if segments_BT is None else ring.to_zigzag(segments_BT, "seq", 1)
    o_BHTV = ring.softmax_attention(q_BHTK, k_BGTK, v_BGTV, axis="seq", segments_BT=segments_BT, balanced=True)
    return ring.from_zigzag(o_BHTV, "seq", 2)


def _split(q_BHTK):
    B, _, T, _ = q_BHTK.shape
    return sharding.tokens_are_sharded(B, T)


def _cut() -> bool:
    return sharding.active_mesh().shape["seq"] > 1


def _sharded(local, letters, args, like):
    """`local` of the arrays (or None) cut by the table; its results are cut as the arguments of the numbers `like`."""
    mesh = sharding.active_mesh()
    specs = tuple(P() if x is None else sharding.activation_spec(axes, x.shape, mesh) for axes, x in zip(letters, args))
    # what a kernel makes is not tracked: no array is alike on devices that differ
    return jax.shard_map(local, in_specs=specs, out_specs=tuple(specs[n] for n in like), check_vma=False)(*args)
