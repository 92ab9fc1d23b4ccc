"""Lightning attention in chunks, as plain XLA: differentiable, memory linear in T, any T, segments, states in and out.

docs/kernels.md, sections "Chunks" and "Backward", derives the equations and defines a, b, r, D, S, time and total. The backward
pass keeps only the inputs. It recomputes the states of the chunks, then visits the chunks in reverse. States, decays and sums
are float32 (docs/model.md section 10).

Axis p is the tokens of a chunk as keys, where Q is the same tokens as queries.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmx.kernels import platform
from mmx.kernels.lightning.documents import real_bounds, state_documents
from mmx.kernels.products import einsum


class Chunks(NamedTuple):
    """Decays and documents of all chunks. Without segments, axis B has size 1.

    In the loops over chunks, `this` contains the arrays of one chunk: the fields keep their names, but have no axis N.
    """
    a_NBHQ: jax.Array
    b_NBHQ: jax.Array
    r_NBH: jax.Array
    segments_NBQ: jax.Array


def forward(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, chunk):
    """Returns o_BHTV and the last state; see `api.lightning_attention`. `segments_BT` may be None, `state_BHKV` may not."""
    T = q_BHTK.shape[2]
    chunk = _chunk_size(chunk, T)
    chunks = _chunks(log_decay_H, segments_BT, T, chunk)
    decay_of = _decay_function(log_decay_H, chunk, segments_BT is not None)
    q_BHTK, k_BHTK, v_BHTV = (_pad(x, chunk) for x in (q_BHTK, k_BHTK, v_BHTV))

    def step(n, carry):
        state_BHKV, o_BHTV = carry
        q_BHQK, k_BHQK, v_BHQV = (_take(x, n, chunk) for x in (q_BHTK, k_BHTK, v_BHTV))
        this = jax.tree.map(lambda x: x[n], chunks)
        scores_BHQp = einsum("BHQK,BHpK->BHQp", q_BHQK, k_BHQK) * decay_of(this)
        o_BHQV = einsum("BHQp,BHpV->BHQV", scores_BHQp.astype(v_BHQV.dtype), v_BHQV)
        o_BHQV += einsum("BHQK,BHKV->BHQV", q_BHQK * this.a_NBHQ[..., None], state_BHKV)
        return _advance(state_BHKV, k_BHQK, v_BHQV, this), _put(o_BHTV, o_BHQV, n)

    start = state_BHKV, zeros_like(v_BHTV)
    state_BHKV, o_BHTV = jax.lax.fori_loop(0, len(chunks.r_NBH), step, start)
    return o_BHTV[:, :, :T], state_BHKV


def backward(q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT, state_BHKV, do_BHTV, dstate_BHKV, chunk):
    """Returns the gradients of q, k, v and the initial state, given the gradients of the results of `forward`."""
    T = q_BHTK.shape[2]
    chunk = _chunk_size(chunk, T)
    chunks = _chunks(log_decay_H, segments_BT, T, chunk)
    N = len(chunks.r_NBH)
    decay_of = _decay_function(log_decay_H, chunk, segments_BT is not None)
    q_BHTK, k_BHTK, v_BHTV, do_BHTV = (_pad(x, chunk) for x in (q_BHTK, k_BHTK, v_BHTV, do_BHTV))

    def state_step(state_BHKV, n):
        this = jax.tree.map(lambda x: x[n], chunks)
        return _advance(state_BHKV, _take(k_BHTK, n, chunk), _take(v_BHTV, n, chunk), this), state_BHKV

    _, state_NBHKV = jax.lax.scan(state_step, state_BHKV, jnp.arange(N))

    def step(i, carry):
        dstate_BHKV, dq_BHTK, dk_BHTK, dv_BHTV = carry
        n = N - 1 - i
        q_BHQK, k_BHQK, v_BHQV, do_BHQV = (_take(x, n, chunk) for x in (q_BHTK, k_BHTK, v_BHTV, do_BHTV))
        this, state_BHKV = jax.tree.map(lambda x: x[n], (chunks, state_NBHKV))
        a_BHQ1, b_BHQ1, decay_BHQp = this.a_NBHQ[..., None], this.b_NBHQ[..., None], decay_of(this)
        scores_BHQp = (einsum("BHQK,BHpK->BHQp", q_BHQK, k_BHQK) * decay_BHQp).astype(do_BHQV.dtype)
        dscores_BHQp = (einsum("BHQV,BHpV->BHQp", do_BHQV, v_BHQV) * decay_BHQp).astype(k_BHQK.dtype)
        dq_BHQK = einsum("BHQp,BHpK->BHQK", dscores_BHQp, k_BHQK) + einsum("BHQV,BHKV->BHQK", do_BHQV * a_BHQ1, state_BHKV)
        dk_BHQK = einsum("BHQp,BHQK->BHpK", dscores_BHQp, q_BHQK) + einsum("BHQV,BHKV->BHQK", v_BHQV * b_BHQ1, dstate_BHKV)
        dv_BHQV = einsum("BHQp,BHQV->BHpV", scores_BHQp, do_BHQV) + einsum("BHQK,BHKV->BHQV", k_BHQK * b_BHQ1, dstate_BHKV)
        dstate_BHKV = this.r_NBH[..., None, None] * dstate_BHKV + einsum("BHQK,BHQV->BHKV", q_BHQK * a_BHQ1, do_BHQV)
        return dstate_BHKV, _put(dq_BHTK, dq_BHQK, n), _put(dk_BHTK, dk_BHQK, n), _put(dv_BHTV, dv_BHQV, n)

    start = dstate_BHKV, *map(zeros_like, (q_BHTK, k_BHTK, v_BHTV))
    dstate_BHKV, *grads = jax.lax.fori_loop(0, N, step, start)
    return *(g[:, :, :T] for g in grads), dstate_BHKV


def zeros_like(x):
    """Returns zeros with the sharding of x, as a value computed from x.

    jnp.zeros_like(x) would not keep the sharding under jit if the arguments are sharded and no mesh is set (jax.set_mesh).
    """
    return jnp.where(False, jax.lax.stop_gradient(x), 0)


def _chunk_size(chunk, T):
    # 64 is fastest on CPU, 128 to 256 on accelerators (multiples of the matrix unit's tiles of 128).
    return min(chunk or (64 if platform.name() == "cpu" else 128), T)


def _advance(state_BHKV, k_BHQK, v_BHQV, this: Chunks):
    """Returns the state after a chunk."""
    return this.r_NBH[..., None, None] * state_BHKV + einsum("BHQK,BHQV->BHKV", k_BHQK * this.b_NBHQ[..., None], v_BHQV)


def _pad(x_BHTK, chunk):
    return jnp.pad(x_BHTK, ((0, 0), (0, 0), (0, -x_BHTK.shape[2] % chunk), (0, 0)))


def _take(x_BHTK, n, chunk):
    return jax.lax.dynamic_slice_in_dim(x_BHTK, n * chunk, chunk, axis=2)


def _put(x_BHTK, x_BHQK, n):
    return jax.lax.dynamic_update_slice_in_dim(x_BHTK, x_BHQK.astype(x_BHTK.dtype), n * x_BHQK.shape[2], axis=2)


def _chunks(log_decay_H, segments_BT, T, chunk):
    """Returns the decays and documents of all chunks."""
    bounds_B2 = jnp.array([[0, T]]) if segments_BT is None else real_bounds(segments_BT)
    segments_BT = jnp.ones((1, T), jnp.int32) if segments_BT is None else segments_BT
    documents_cB = state_documents(segments_BT, chunk).T
    before_NB, after_NB = documents_cB[:-1], documents_cB[1:]
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, -T % chunk)))
    segments_NBQ = jnp.moveaxis(segments_BT.reshape(len(segments_BT), -1, chunk), 1, 0)

    first_NB1 = jnp.arange(len(segments_NBQ))[:, None, None] * chunk
    begin_B1, end_B1 = jnp.split(bounds_B2, 2, axis=1)
    # Clipping to [begin, end] counts only tokens at which the state decays.
    start_NB1 = jnp.clip(first_NB1, begin_B1, end_B1)
    time_NBQ = jnp.clip(first_NB1 + jnp.arange(1, chunk + 1), begin_B1, end_B1)
    time_NBQ = (time_NBQ - start_NB1).astype(log_decay_H.dtype)
    total_NB1 = time_NBQ[:, :, -1:]

    g_H1 = log_decay_H[:, None]
    from_state_NBQ = (segments_NBQ > 0) & (segments_NBQ == before_NB[..., None])
    to_state_NBQ = (segments_NBQ > 0) & (segments_NBQ == after_NB[..., None])
    a_NBHQ = jnp.where(from_state_NBQ[:, :, None], jnp.exp(g_H1 * time_NBQ[:, :, None]), 0)
    b_NBHQ = jnp.where(to_state_NBQ[:, :, None], jnp.exp(g_H1 * (total_NB1 - time_NBQ)[:, :, None]), 0)
    r_NBH = jnp.where((before_NB == after_NB)[..., None], jnp.exp(log_decay_H * total_NB1), 0)
    return Chunks(a_NBHQ, b_NBHQ, r_NBH, segments_NBQ)


def _decay_function(log_decay_H, chunk, segmented):
    """Returns a function that computes D of a chunk. D differs between chunks only if there are segments."""
    distance_Qp = jnp.arange(chunk)[:, None] - jnp.arange(chunk)
    decay_HQp = jnp.where(distance_Qp >= 0, jnp.exp(log_decay_H[:, None, None] * jnp.maximum(distance_Qp, 0)), 0)

    def within_documents(this: Chunks):
        segments_BQ = this.segments_NBQ
        same_BQp = (segments_BQ[:, :, None] == segments_BQ[:, None, :]) & (segments_BQ > 0)[:, None, :]
        return jnp.where(same_BQp[:, None], decay_HQp, 0)
    return within_documents if segmented else lambda _: decay_HQp
