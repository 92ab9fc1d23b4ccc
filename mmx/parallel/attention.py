"""Attention on a mesh: rows over the data axes, heads over etp, sequences over seq, by LASP+ and ring attention.

Behind a cache, and where rows or time do not split, it is the kernels' plain call, which XLA splits as it can.
"""
import functools
import math

import jax
import jax.numpy as jnp

from mmx.kernels.attention import softmax_attention
from mmx.kernels.lightning import lightning_attention
from mmx.parallel import lightning as lasp
from mmx.parallel import ring, sharding


def lightning(q_BHTK, k_BHTK, v_BHTV, log_decay_H, *, segments_BT, state_BHKV, impl, chunk):
    """`kernels.lightning_attention`. Returns o_BHTV and the state behind the last token (None without a given one)."""
    how = {"impl": impl, "chunk": chunk}
    if state_BHKV is not None or not _split(q_BHTK):
        return lightning_attention(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT=segments_BT, state_BHKV=state_BHKV,
                                   **how)
    function = functools.partial(lasp.lightning_attention, axis="seq") if _cut() else lightning_attention

    def local(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT):
        return function(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT=segments_BT, **how)[0]
    return _sharded(local, ("BHSK", "BHSK", "BHSV", "H"), (q_BHTK, k_BHTK, v_BHTV, log_decay_H), segments_BT), None


def softmax(q_BHTK, k_BGTK, v_BGTV, *, segments_BT):
    """`kernels.softmax_attention` of whole sequences. KV heads are repeated just enough to be cut over etp."""
    if not _split(q_BHTK):
        return softmax_attention(q_BHTK, k_BGTK, v_BGTV, segments_BT=segments_BT, segments_BS=segments_BT)
    G, etp = k_BGTK.shape[1], sharding.mesh().shape["etp"]
    k_BGTK, v_BGTV = (jnp.repeat(x, math.lcm(G, etp) // G, axis=1) for x in (k_BGTK, v_BGTV))
    function = _ring if _cut() else softmax_attention

    def local(q_BHTK, k_BGTK, v_BGTV, segments_BT):
        return function(q_BHTK, k_BGTK, v_BGTV, segments_BT=segments_BT)
    return _sharded(local, ("BHSK", "BGSK", "BGSV"), (q_BHTK, k_BGTK, v_BGTV), segments_BT)


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


def _sharded(local, letters, args, segments_BT):
    """`local` of the arrays cut by the table; its result is cut as the first."""
    if segments_BT is None:
        local = functools.partial(local, segments_BT=None)
    else:
        letters, args = (*letters, "BS"), (*args, segments_BT)
    specs = tuple(sharding.act(axes, x.shape, sharding.mesh()) for axes, x in zip(letters, args))
    # what a kernel makes is not tracked: no array is alike on devices that differ
    return jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)(*args)
