"""Parameters and FLOPs of a model, counted from the shapes of its parameters and the `Kind` records of its layers.

A token costs two FLOPs for each matrix parameter that it is multiplied with, plus the FLOPs that `Kind.flops` gives for the
rest of a mixer. Embedding lookup, norms, the choice of experts and recomputation count as 0.
"""
import dataclasses
import functools
import math

import jax

from mmx import config
from mmx.dims import axes_of, is_matrix
from mmx.layers.kinds import kind_of
from mmx.model import abstract_params


@dataclasses.dataclass(frozen=True)
class Counts:
    """Parameters of a model; `active` are those that a token uses: its top_k experts of each layer, no vision."""
    total: int              # all, with embedding, head and vision
    active: int             # without embedding and head: the published "45.9 B active"
    active_all: int         # with embedding and head
    vision: int             # the image encoder and its projector
    active_matrices: int    # of `active_all`, those that a token is multiplied with: no norms, no embedding


@functools.lru_cache(maxsize=512)
def count_params(c: config.Model) -> Counts:
    """Counts the parameters of a model without creating them."""
    total = active = vision = matrices = 0
    for path, x in jax.tree_util.tree_leaves_with_path(abstract_params(c)):
        name, size = path[-1].key, math.prod(x.shape)
        total += size
        if path[0].key == "vision":
            vision += size
            continue
        if axes_of(name).startswith("E"):       # one matrix for each expert
            size = size * c.top_k // c.experts
        active += size
        matrices += size * is_matrix(name)
    vocabulary = c.vocab * c.dim
    return Counts(total, active - 2 * vocabulary, active, vision, matrices - vocabulary)


def flops_forward(c: config.Model, length: int) -> float:
    """Forward FLOPs of a token, the mean over a causal sequence of `length` tokens."""
    mixers = {letter: kind_of(letter).flops(c, length) for letter in set(c.pattern)}
    return 2 * count_params(c).active_matrices + sum(mixers[letter] for letter in c.layer_kinds)


def flops_training(c: config.Model, length: int) -> float:
    """Forward and backward FLOPs of a token, without recomputation; images add `flops_tile` for each tile."""
    return 3 * flops_forward(c, length)


def flops_companion(c: config.Model, length: int) -> float | None:
    """Forward and backward FLOPs of a token, as counted in the paper's Table 1 and in arXiv 2406.16690, appendix A.

    The two sources count by the number of layers, width d and heads h alone: a layer has 4 d^2 parameters in its mixer and 8
    d^2 in its dense feed-forward part, six FLOPs each; a softmax token attends to all `length` keys; lightning has chunks of d
    / h tokens and a gate of rank d / h; norms and activations are 20 d. Embedding and head count nothing. With more than one
    expert, which neither source counts, the feed-forward part is the router and the top_k experts. Returns None if neither
    source counts one of the model's kinds.
    """
    d, kinds = c.dim, {letter: kind_of(letter) for letter in set(c.pattern)}
    if not all(kind.paper_flops for kind in kinds.values()):
        return None
    ffn = 8 * d ** 2 if c.experts == 1 else 3 * c.top_k * d * c.expert_dim + c.experts * d
    return sum(6 * (4 * d ** 2 + ffn) + 20 * d + kinds[letter].paper_flops(c, length) for letter in c.layer_kinds)


def flops_tile(c: config.Model) -> float:
    """Forward FLOPs of one image tile through the encoder and the projector; 0 for a model without vision.

    A matrix parameter costs two FLOPs at each position that it is applied to. Scores and values cost 4 P^2 J a layer.
    """
    v = c.vision
    if not v.layers:
        return 0
    patches = v.patches_per_side ** 2
    places = patches + 1
    layer = 2 * places * (4 * v.dim ** 2 + 2 * v.dim * v.hidden) + 4 * places ** 2 * v.dim
    return v.layers * layer + 2 * patches * (3 * v.patch ** 2 * v.dim + v.dim * c.dim + c.dim ** 2)


@dataclasses.dataclass(frozen=True)
class CacheBytes:
    """What the layers of a model keep of one sequence."""
    state: int              # bytes whatever its length
    per_token: int          # bytes for each of its tokens


def cache_bytes(c: config.Model, kv_dtype: str = "") -> CacheBytes:
    """Bytes of a sequence's cache; `kv_dtype` is the dtype of keys and values, empty: the computation's."""
    state = per_token = 0
    for letter in c.layer_kinds:
        for name, one in kind_of(letter).cache(c, kv_dtype or c.dtype).items():
            size = math.prod(one.shape) * one.dtype.itemsize
            if "S" in axes_of(name):
                per_token += size
            else:
                state += size
    return CacheBytes(state, per_token)
