"""Attention on a mesh: rows are sharded over the data axes, heads over etp, sequences over seq (by LASP+ and ring attention).

With a cache, lightning states continue as in LASP+. Cached keys and values stay where they are: each device of seq has a part
of the cache's positions. All new queries attend to each part, and the results are combined with the attention to the new keys
by their log-sum-exp. If rows or time do not divide by the mesh, the kernels are called directly and XLA shards them as it can.
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
    """`kernels.lightning_attention`. Returns o_BHTV and the state after the last token (None if state_BHKV is None)."""
    args = q_BHTK, k_BHTK, v_BHTV, log_decay_H
    if not _tokens_are_sharded(q_BHTK):
        return lightning_attention(*args, segments_BT=segments_BT, state_BHKV=state_BHKV, impl=impl, chunk=chunk)
    function = functools.partial(lightning_attention, impl=impl, chunk=chunk)
    if _sequence_is_sharded():
        function = functools.partial(lasp.lightning_attention, axis="seq", kernel=lasp.Kernel(impl, chunk))

    def local(*args):
        *args, segments_BT, state_BHKV = args
        o_BHTV, last_BHKV = function(*args, segments_BT=segments_BT, state_BHKV=state_BHKV)
        return o_BHTV, None if state_BHKV is None else last_BHKV
    return _sharded(local, ("BHSK", "BHSK", "BHSV", "H", "BS", "BHKV"), (*args, segments_BT, state_BHKV), (0, 5))


def softmax(q_BHTK, k_BGTK, v_BGTV, *, segments_BT, window=0):
    """`kernels.softmax_attention` of complete sequences, without a cache. A window requires that time is not sharded.

    KV heads are repeated as often as necessary to shard them over etp.
    """
    if not _tokens_are_sharded(q_BHTK):
        return softmax_attention(q_BHTK, k_BGTK, v_BGTV, segments_BT=segments_BT, segments_BS=segments_BT, window=window)
    G, etp = k_BGTK.shape[1], sharding.active_mesh().shape["etp"]
    k_BGTK, v_BGTV = (jnp.repeat(x, math.lcm(G, etp) // G, axis=1) for x in (k_BGTK, v_BGTV))
    function = _ring if _sequence_is_sharded() else functools.partial(softmax_attention, window=window)

    def local(q_BHTK, k_BGTK, v_BGTV, segments_BT):
        return function(q_BHTK, k_BGTK, v_BGTV, segments_BT=segments_BT),
    return _sharded(local, ("BHSK", "BGSK", "BGSV", "BS"), (q_BHTK, k_BGTK, v_BGTV, segments_BT), (0,))[0]


def softmax_with_cache(q_BHTK, k_BGTK, v_BGTV, cache, start_B, window=0):
    """Returns o_BHTV of T new tokens: softmax attention to the first start_B positions of a cache, and to each other.

    The cache is only read here. Writing the new keys while other operations read it would copy it, so `parallel.cache` writes
    them after the last layer. Padding comes last in a row, so no real token attends to it.
    """
    keys, scales = (cache["k_BGSK"], cache["v_BGSV"]), tuple(cache[name] for name in cache if "scale" in name)
    (G, S), mesh = cache["k_BGSK"].shape[1:3], sharding.active_mesh()
    args = (q_BHTK, k_BGTK, v_BGTV, start_B, *keys, *scales)
    if mesh is None or G % mesh.shape["etp"] or S % mesh.shape["seq"]:
        cached = _attend_to_cache(q_BHTK, start_B, *keys, scales, window)
        new = softmax_attention(q_BHTK, k_BGTK, v_BGTV, window=window, return_lse=True)
        return _combine(*cached, *new)[0].astype(q_BHTK.dtype)
    letters = ("BHSK", "BGSK", "BGSV", "B", "BGSK", "BGSV", "BGS", "BGS")[:len(args)]
    local = functools.partial(_attend_to_sharded_cache, time_is_sharded=q_BHTK.shape[2] % mesh.shape["seq"] == 0, window=window)
    return _sharded(local, letters, args, (0,))[0]


def _attend_to_sharded_cache(own_BHTK, k_BGTK, v_BGTV, start_B, *cache, time_is_sharded, window):
    """The same inside `shard_map`. `time_is_sharded`: whether seq shards the new tokens."""
    k_BGSK, v_BGSV, *scales = cache
    index, T, q_BHTK = jax.lax.axis_index("seq"), own_BHTK.shape[2], own_BHTK
    if time_is_sharded:
        with jax.named_scope("new"):        # 'B H T/seq K -> B H T K': queries, keys, values; (seq - 1) times the device's own
            q_BHTK, k_BGTK, v_BGTV = (jax.lax.all_gather(x, "seq", axis=2, tiled=True) for x in (q_BHTK, k_BGTK, v_BGTV))
    o_BHTV, lse_BHT = _attend_to_cache(q_BHTK, start_B - index * k_BGSK.shape[2], k_BGSK, v_BGSV, tuple(scales), window)
    with jax.named_scope("join"):           # 'B H T V -> B H T/seq V', summed in float32: (seq - 1) / seq B H T V numbers
        top_BHT = jax.lax.pmax(lse_BHT, "seq")
        weight_BHT1 = jnp.exp(lse_BHT - jnp.where(jnp.isneginf(top_BHT), 0, top_BHT))[..., None]
        both = o_BHTV * weight_BHT1, weight_BHT1
        o_BHTV, sum_BHT1 = (jax.lax.psum_scatter(x, "seq", scatter_dimension=2, tiled=True) if time_is_sharded
                            else jax.lax.psum(x, "seq") for x in both)
    if time_is_sharded:
        top_BHT = jax.lax.dynamic_slice_in_dim(top_BHT, index * T, T, axis=2)
    lse_BHT = top_BHT + jnp.log(sum_BHT1[..., 0])
    first_B = jnp.full_like(start_B, index * T if time_is_sharded else 0)
    new = softmax_attention(own_BHTK, k_BGTK, v_BGTV, start_B=first_B, window=window, return_lse=True)
    return _combine(o_BHTV / jnp.where(sum_BHT1 > 0, sum_BHT1, 1), lse_BHT, *new)[0].astype(q_BHTK.dtype),


def _attend_to_cache(q_BHTK, start_B, k_BGSK, v_BGSV, scales, window):
    """Returns o_BHTV and lse_BHT over the keys before row b's start_B, which may be outside of the range of keys."""
    (B, _, T, _), S, options = q_BHTK.shape, k_BGSK.shape[2], {"scales": scales or None, "return_lse": True}
    if T == 1 and window != 1:      # a window of one has no key before its query
        return softmax_attention(q_BHTK, k_BGSK, v_BGSV, start_B=start_B - 1, window=max(window - 1, 0), **options)
    written_BS = jnp.asarray(jnp.arange(S) < start_B[:, None], jnp.int32)
    return softmax_attention(q_BHTK, k_BGSK, v_BGSV, start_B=start_B, window=window,
                             segments_BT=jnp.ones((B, T), jnp.int32), segments_BS=written_BS, **options)


def _combine(o_BHTV, lse_BHT, new_BHTV, new_BHT):
    """Combines attention to two sets of keys (see `parallel.ring`). Every query must attend to a key of the second set."""
    both_BHT = jnp.logaddexp(lse_BHT, new_BHT)
    weight_BHT1, new_BHT1 = (jnp.exp(x - both_BHT)[..., None] for x in (lse_BHT, new_BHT))
    return o_BHTV * weight_BHT1 + new_BHTV * new_BHT1, both_BHT


def _ring(q_BHTK, k_BGTK, v_BGTV, *, segments_BT):
    """Ring attention over seq, balanced if a device's number of tokens is even."""
    if q_BHTK.shape[2] % 2:
        return ring.softmax_attention(q_BHTK, k_BGTK, v_BGTV, axis="seq", segments_BT=segments_BT)
    q_BHTK, k_BGTK, v_BGTV = (ring.to_zigzag(x, "seq", 2) for x in (q_BHTK, k_BGTK, v_BGTV))
    segments_BT = None if segments_BT is None else ring.to_zigzag(segments_BT, "seq", 1)
    o_BHTV = ring.softmax_attention(q_BHTK, k_BGTK, v_BGTV, axis="seq", segments_BT=segments_BT, balanced=True)
    return ring.from_zigzag(o_BHTV, "seq", 2)


def _tokens_are_sharded(q_BHTK) -> bool:
    B, _, T, _ = q_BHTK.shape
    return sharding.tokens_are_sharded(B, T)


def _sequence_is_sharded() -> bool:
    return sharding.active_mesh().shape["seq"] > 1


def _sharded(local, letters, args, like):
    """Calls `local` in shard_map: args (or None) are sharded by their letters, results as the args with the indices `like`."""
    mesh = sharding.active_mesh()
    specs = tuple(P() if x is None else sharding.activation_spec(axes, x.shape, mesh) for axes, x in zip(letters, args))
    # check_vma=False, since kernels do not say over which axes their results vary
    return jax.shard_map(local, in_specs=specs, out_specs=tuple(specs[n] for n in like), check_vma=False)(*args)
