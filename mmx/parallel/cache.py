"""Operations on a cache, which keeps what a model needs of the tokens it has read (`model.empty_cache`).

A cache is {"length_B", "layers"}. A leaf of "layers" is named by its axes, after the scanned groups L. An entry with the axis S
keeps every token of its row, in order; an entry without S is a state. On a mesh (jax.set_mesh) rows, heads and tokens are
sharded as `parallel.sharding` says.
"""
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mmx.parallel import sharding

KV_DTYPES = "float32", "bfloat16", "int8"
PAGE = 256          # tokens; the room of a cache is a multiple of it


def shard_cache(cache):
    """The cache, sharded over the active mesh if there is one."""
    mesh = sharding.active_mesh()
    return cache if mesh is None else jax.lax.with_sharding_constraint(cache, sharding.cache_shardings(cache, mesh))


def kv_dtype(cache) -> str:
    """The dtype of a cache's keys and values; empty if it has none."""
    return next((x["k_BGSK"].dtype.name for x in cache["layers"].values() if "k_BGSK" in x), "")


def select_row(cache, b):
    """The cache of row b alone."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, b, 1, _row_axis(x)), cache)


@functools.partial(jax.jit, donate_argnums=0)
def insert_row(cache, b, row):
    """The cache with row b replaced by the only row of another cache, which may have room for fewer tokens."""
    def leaf(x, new):
        start = [0] * x.ndim
        start[_row_axis(x)] = b
        return jax.lax.dynamic_update_slice(x, new.astype(x.dtype), start)
    return shard_cache(jax.tree.map(leaf, cache, row))


@functools.partial(jax.jit, donate_argnums=0)
def clear_row(cache, b):
    """The cache with no tokens in row b. Keys and values stay: those after a row's length are never read."""
    def leaf(path, x):
        return x if "S" in sharding.letters_of(path) else x.at[(slice(None),) * _row_axis(x) + (b,)].set(0)
    return shard_cache(jax.tree_util.tree_map_with_path(leaf, cache))


@functools.partial(jax.jit, static_argnums=1)
def resize(cache, capacity: int):
    """The cache with room for `capacity` tokens a row, more or fewer than before."""
    def leaf(path, x):
        axis = sharding.letters_of(path).find("S") + 1
        if not axis:
            return x
        return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, (capacity - n) * (at == axis), 0) for at, n in enumerate(x.shape)])
    return shard_cache(jax.tree_util.tree_map_with_path(leaf, cache))


def _row_axis(x) -> int:
    """The axis of rows: the first of length_B, the second of the other leaves."""
    return min(x.ndim - 1, 1)


def kv_entries(k_BGTK, v_BGTV, cache):
    """New keys and values in the form of the cache: as they are, or int8 with a scale for every head and token."""
    new = {"k_BGSK": k_BGTK, "v_BGSV": v_BGTV}
    if cache["k_BGSK"].dtype != jnp.int8:
        return new
    scales = {name: jnp.maximum(jnp.abs(x).max(-1).astype(jnp.float32), 1e-30) / 127 for name, x in new.items()}
    quantized = {name: jnp.round(x / scales[name][..., None]).astype(jnp.int8) for name, x in new.items()}
    return quantized | {"k_scale_BGS": scales["k_BGSK"], "v_scale_BGS": scales["v_BGSV"]}


def append(layers, new, start_B, x_BTD):
    """The layers' entries after T new tokens: states are replaced; the tokens of row b are written from place start_b on.

    XLA copies a cache that it might write while others still read it. For a single token that copy would cost more than the
    step, so the place to write depends on x_BTD, which is computed from all reads: it adds 0. For more tokens it does not,
    since a prefill may not use x_BTD, and then XLA skips the last layer.
    """
    if x_BTD.shape[1] == 1:
        start_B = start_B + jnp.isnan(x_BTD).any((1, 2)).astype(jnp.int32)

    def leaf(path, x, new):
        letters = sharding.letters_of(path)
        return _write_tokens(letters, x, new.astype(x.dtype), start_B) if "S" in letters else new
    return jax.tree_util.tree_map_with_path(leaf, layers, new)


def _write_tokens(letters, cache_LBGSK, new_LBGTK, start_B):
    """Writes tokens on the mesh: each device writes those whose places it has; a start may lie outside of its places."""
    mesh, S = sharding.active_mesh(), cache_LBGSK.shape[3]
    if mesh is None or S % mesh.shape["seq"]:
        return _write(cache_LBGSK, new_LBGTK, start_B)
    specs = [sharding.activation_spec("L" + axes, x.shape, mesh) for axes, x in (
        (letters, cache_LBGSK), (letters.replace("S", "N"), new_LBGTK))]

    def local(cache_LBGSK, new_LBGTK, start_B):
        return _write(cache_LBGSK, new_LBGTK, start_B - jax.lax.axis_index("seq") * cache_LBGSK.shape[3])
    return jax.shard_map(local, in_specs=(*specs, P(specs[0][1])), out_specs=specs[0], check_vma=False)(
        cache_LBGSK, new_LBGTK, start_B)


def _write(cache_LBGSK, new_LBGTK, start_B):
    L, B, G, S, *rest = cache_LBGSK.shape
    T = new_LBGTK.shape[3]
    span = min(S, T)
    padded_LBGTK = jnp.pad(new_LBGTK, [(0, 0)] * 3 + [(span, span)] + [(0, 0)] * len(rest))

    def write_row(b, cache_LBGSK):
        place = jnp.clip(start_B[b], 0, S - span)
        first = place - start_B[b]      # the token that belongs at `place`; it may be negative or T and more
        token_T = first + jnp.arange(span, dtype=jnp.int32)
        zero, others = place * 0, (place * 0,) * len(rest)
        size = (L, 1, G, span, *rest)
        new_L1GTK = jax.lax.dynamic_slice(padded_LBGTK, (zero, b, zero, first + span, *others), size)
        old_L1GTK = jax.lax.dynamic_slice(cache_LBGSK, (zero, b, zero, place, *others), size)
        valid_T = jnp.expand_dims((token_T >= 0) & (token_T < T), tuple(range(1, 1 + len(rest))))
        written_L1GTK = jnp.where(valid_T, new_L1GTK, old_L1GTK)
        return jax.lax.dynamic_update_slice(cache_LBGSK, written_L1GTK, (zero, b, zero, place, *others))
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(B), write_row, cache_LBGSK)
