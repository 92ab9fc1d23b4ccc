"""Attention on a mesh: rows over the data axes, heads over etp, sequences over seq, by LASP+ and ring attention.

Behind a cache, states go on as in LASP+, while keys and values stay where they are: each device of seq has a part of the
cache's places, all of the new queries meet it there, and results over parts are joined by their log-sum-exp. Where rows or
time do not split it is the kernels' plain call, which XLA splits as it can.
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


def softmax(q_BHTK, k_BGTK, v_BGTV, *, segments_BT):
    """`kernels.softmax_attention` of whole sequences. KV heads are repeated just enough to be cut over etp."""
    if not _split(q_BHTK):
        return softmax_attention(q_BHTK, k_BGTK, v_BGTV, segments_BT=segments_BT, segments_BS=segments_BT)
    G, etp = k_BGTK.shape[1], sharding.mesh().shape["etp"]
    k_BGTK, v_BGTV = (jnp.repeat(x, math.lcm(G, etp) // G, axis=1) for x in (k_BGTK, v_BGTV))
    function = _ring if _cut() else softmax_attention

    def local(q_BHTK, k_BGTK, v_BGTV, segments_BT):
        return function(q_BHTK, k_BGTK, v_BGTV, segments_BT=segments_BT),
    return _sharded(local, ("BHSK", "BGSK", "BGSV", "BS"), (q_BHTK, k_BGTK, v_BGTV, segments_BT), (0,))[0]


def behind(q_BHTK, k_BGTK, v_BGTV, k_BGSK, v_BGSV, start_B):
    """Softmax attention of T new tokens, row b's at start_b on the cache's axis. Returns o_BHTV and both caches with them in.

    What is padding on the right of a row lands past the row's end, where the next tokens overwrite it.
    """
    (G, S), mesh = k_BGSK.shape[1:3], sharding.mesh()
    args, letters = (q_BHTK, k_BGTK, v_BGTV, k_BGSK, v_BGSV, start_B), ("BHSK", "BGSK", "BGSV", "BGSK", "BGSV", "B")
    if mesh is None or G % mesh.shape["etp"] or S % mesh.shape["seq"]:
        k_BGSK, v_BGSV = (_write(x, new, start_B) for x, new in ((k_BGSK, k_BGTK), (v_BGSV, v_BGTV)))
        return softmax_attention(q_BHTK, k_BGSK, v_BGSV, start_B=start_B), k_BGSK, v_BGSV
    return _sharded(functools.partial(_parts, cut=q_BHTK.shape[2] % mesh.shape["seq"] == 0), letters, args, (0, 3, 4))


def _parts(q_BHTK, k_BGTK, v_BGTV, k_BGSK, v_BGSV, start_B, cut):
    """Every letter is a local extent; `cut`: whether T is, over seq."""
    if cut:
        with jax.named_scope("new"):        # 'B H T/seq K -> B H T K': the new queries, keys and values
            q_BHTK, k_BGTK, v_BGTV = (jax.lax.all_gather(x, "seq", axis=2, tiled=True) for x in (q_BHTK, k_BGTK, v_BGTV))
    start_B -= jax.lax.axis_index("seq") * k_BGSK.shape[2]
    k_BGSK, v_BGSV = (_write_part(x, new, start_B) for x, new in ((k_BGSK, k_BGTK), (v_BGSV, v_BGTV)))
    o_BHTV, lse_BHT = softmax_attention(q_BHTK, k_BGSK, v_BGSV, start_B=start_B, return_lse=True)
    with jax.named_scope("join"):           # 'B H T V -> B H T/seq V', summed in float32
        weight_BHT1 = jnp.exp(lse_BHT - jax.lax.pmax(lse_BHT, "seq"))[..., None]
        both = o_BHTV * weight_BHT1, weight_BHT1
        o_BHTV, weight_BHT1 = (jax.lax.psum_scatter(x, "seq", scatter_dimension=2, tiled=True) if cut
                               else jax.lax.psum(x, "seq") for x in both)
    return (o_BHTV / weight_BHT1).astype(q_BHTK.dtype), k_BGSK, v_BGSV


def _write(cache_BGSK, new_BGTK, start_B):
    def row(cache_GSK, new_GTK, start):
        return jax.lax.dynamic_update_slice_in_dim(cache_GSK, new_GTK.astype(cache_GSK.dtype), start, axis=1)
    return jax.vmap(row)(cache_BGSK, new_BGTK, start_B)


def _write_part(cache_BGSK, new_BGTK, start_B):
    """The same of those new tokens whose places are here, from none to all; a start may lie before or behind the places."""
    S, T = cache_BGSK.shape[2], new_BGTK.shape[2]
    span = min(S, T)

    def row(cache_GSK, new_GTK, start):
        at = jnp.clip(start, 0, S - span)
        first = at - start      # the token that belongs at the window's first place
        token_T = first + jnp.arange(span)
        padded_GTK = jnp.pad(new_GTK.astype(cache_GSK.dtype), ((0, 0), (span, span), (0, 0)))
        window_GTK = jax.lax.dynamic_slice_in_dim(padded_GTK, first + span, span, axis=1)
        here_T1 = ((token_T >= 0) & (token_T < T))[:, None]
        window_GTK = jnp.where(here_T1, window_GTK, jax.lax.dynamic_slice_in_dim(cache_GSK, at, span, axis=1))
        return jax.lax.dynamic_update_slice_in_dim(cache_GSK, window_GTK, at, axis=1)
    return jax.vmap(row)(cache_BGSK, new_BGTK, start_B)


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
    return sharding.splits(B, T)


def _cut() -> bool:
    return sharding.mesh().shape["seq"] > 1


def _sharded(local, letters, args, like):
    """`local` of the arrays (or None) cut by the table; its results are cut as the arguments of the numbers `like`."""
    specs = tuple(P() if x is None else sharding.act(axes, x.shape, sharding.mesh()) for axes, x in zip(letters, args))
    # what a kernel makes is not tracked: no array is alike on devices that differ
    return jax.shard_map(local, in_specs=specs, out_specs=tuple(specs[n] for n in like), check_vma=False)(*args)
