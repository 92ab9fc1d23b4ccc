"""What a model keeps of the tokens it has read: constant float32 states for lightning layers, keys and values for softmax.

A cache is {"length_B", "layers"}; a leaf's name ends in its axes, before which stand the scanned layers L. Places S are
those of a row's tokens, in order. On a mesh (jax.set_mesh) rows, heads and places are cut by `parallel.sharding`.
"""
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mmx.parallel import sharding

KV_DTYPES = "float32", "bfloat16", "int8"
PLACES = 256        # a page: rooms of a cache are multiples


def placed(cache):
    """The cache cut as the table says, on a mesh."""
    here = sharding.active_mesh()
    return cache if here is None else jax.lax.with_sharding_constraint(cache, sharding.cache_shardings(cache, here))


def kv_dtype(cache) -> str:
    """Of a cache's keys and values; empty where it has none."""
    return next((x["k_BGSK"].dtype.name for x in cache["layers"].values() if "k_BGSK" in x), "")


def row(cache, b):
    """The cache of row b alone."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, b, 1, _rows(x)), cache)


@functools.partial(jax.jit, donate_argnums=0)
def adopt(cache, b, row):
    """The cache with a row's in place of row b; it may have fewer places, those of its tokens."""
    def leaf(x, new):
        at = [0] * x.ndim
        at[_rows(x)] = b
        return jax.lax.dynamic_update_slice(x, new.astype(x.dtype), at)
    return placed(jax.tree.map(leaf, cache, row))


@functools.partial(jax.jit, donate_argnums=0)
def vacate(cache, b):
    """The cache with no tokens in row b. Keys and values behind a row's length are nobody's: they stay."""
    def leaf(path, x):
        return x if "S" in sharding.letters_of(path) else x.at[(slice(None),) * _rows(x) + (b,)].set(0)
    return placed(jax.tree_util.tree_map_with_path(leaf, cache))


@functools.partial(jax.jit, static_argnums=1)
def resized(cache, places: int):
    """The cache with more places, empty ones, or with fewer."""
    def leaf(path, x):
        axis = sharding.letters_of(path).find("S") + 1
        if not axis:
            return x
        return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, (places - n) * (at == axis), 0) for at, n in enumerate(x.shape)])
    return placed(jax.tree_util.tree_map_with_path(leaf, cache))


def _rows(x) -> int:
    """The axis of rows: length_B has it first, the others behind their layers."""
    return min(x.ndim - 1, 1)


def stored(k_BGTK, v_BGTV, cache):
    """New keys and values as this cache keeps them: int8 with a scale for every head and token, or as they are."""
    new = {"k_BGSK": k_BGTK, "v_BGSV": v_BGTV}
    if cache["k_BGSK"].dtype != jnp.int8:
        return new
    scales = {name: jnp.maximum(jnp.abs(x).max(-1).astype(jnp.float32), 1e-30) / 127 for name, x in new.items()}
    whole = {name: jnp.round(x / scales[name][..., None]).astype(jnp.int8) for name, x in new.items()}
    return whole | {"k_scale_BGS": scales["k_BGSK"], "v_scale_BGS": scales["v_BGSV"]}


def put(layers, new, start_B, x_BTD):
    """The layers' caches with what T new tokens left: states in place of states, keys and values behind row b's start_b.

    XLA copies a cache that it might write beside its readers. Where one token moves, and a copy would outweigh it, the
    place is made to hang on what was made of the reads, x_BTD: it adds 0. A chunk's x_BTD may be used by nobody, and the
    last layer then is not computed.
    """
    if x_BTD.shape[1] == 1:
        start_B = start_B + jnp.isnan(x_BTD).any((1, 2)).astype(jnp.int32)

    def leaf(path, x, new):
        letters = sharding.letters_of(path)
        return _put(letters, x, new.astype(x.dtype), start_B) if "S" in letters else new
    return jax.tree_util.tree_map_with_path(leaf, layers, new)


def _put(letters, cache_LBGSK, new_LBGTK, start_B):
    """Tokens whose places are here, from none to all; a start may lie before or behind the places."""
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

    def row(b, cache_LBGSK):
        at = jnp.clip(start_B[b], 0, S - span)
        first = at - start_B[b]         # the token that belongs at the window's first place
        token_T = first + jnp.arange(span, dtype=jnp.int32)
        zero, wide = at * 0, (at * 0,) * len(rest)
        size = (L, 1, G, span, *rest)
        new_L1GTK = jax.lax.dynamic_slice(padded_LBGTK, (zero, b, zero, first + span, *wide), size)
        old_L1GTK = jax.lax.dynamic_slice(cache_LBGSK, (zero, b, zero, at, *wide), size)
        here_T = jnp.expand_dims((token_T >= 0) & (token_T < T), tuple(range(1, 1 + len(rest))))
        return jax.lax.dynamic_update_slice(cache_LBGSK, jnp.where(here_T, new_L1GTK, old_L1GTK), (zero, b, zero, at, *wide))
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(B), row, cache_LBGSK)
