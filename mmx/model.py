"""The decoder: embedding, layers, final norm (docs/model.md section 2).

The layers repeat `model.pattern`, whose letters name layer kinds (`layers.kinds`). One repeat is a group, and the groups are
scanned. A layer computes x' from x:

    post-norm    u = RMSNorm(x);   y = alpha u + beta Mixer(u);   v = RMSNorm(y);   x' = alpha v + beta MoE(v)
    pre-norm     u = RMSNorm(x);   y = alpha x + beta Mixer(u);   v = RMSNorm(y);   x' = alpha y + beta MoE(v)

alpha and beta are DeepNorm's factors: model.alpha_* and model.beta_*. Lower-case axes: b blocks of a batch's rows, one for each
data shard of the mesh (`data.pipeline`); p patches of a block's images.
"""
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmx import config
from mmx.dims import axes_of
from mmx.kernels.dtypes import wide_dtype
from mmx.layers.common import Context, param, rms_norm
from mmx.layers.kinds import kind_of
from mmx.layers.moe import MoE
from mmx.layers.vision import Vision
from mmx.parallel import vocabulary
from mmx.parallel.cache import append, shard_cache
from mmx.parallel.exchange import ARRIVED
from mmx.parallel.sharding import constrain
from mmx.parallel.vision import insert_patches


class Layer(nn.Module):
    """One layer: mixer and mixture of experts, each with its norm and residual."""
    config: config.Model
    letter: str

    @nn.compact
    def __call__(self, x_BTD, context: Context, cache, constants):
        c, kind = self.config, kind_of(self.letter)
        # alpha_softmax and beta_softmax, or alpha_lightning and beta_lightning
        alpha, beta = getattr(c, f"alpha_{kind.factor_suffix}"), getattr(c, f"beta_{kind.factor_suffix}")
        u_BTD = rms_norm(x_BTD, param(self, "norm_mixer_D"), c.norm_eps)
        mixed_BTD, cache = kind.mixer(c, name="mixer")(u_BTD, context, cache, constants)
        y_BTD = alpha * (u_BTD if c.postnorm else x_BTD) + beta * constrain(mixed_BTD, "BTD")
        v_BTD = rms_norm(y_BTD, param(self, "norm_moe_D"), c.norm_eps)
        expert_BTD, logits_BTE, stats = MoE(c, name="moe")(v_BTD, context)
        return c.alpha_moe * (v_BTD if c.postnorm else y_BTD) + c.beta_moe * expert_BTD, cache, logits_BTE, stats


class Group(nn.Module):
    """One repeat of the pattern, unrolled: the body of the scan."""
    config: config.Model
    trace: bool

    @nn.compact
    def __call__(self, x_BTD, context: Context, cache, constants):
        caches, stats, layer = {}, [], _with_remat(Layer, self.config)
        for i, letter in enumerate(self.config.pattern):
            name, input_BTD = f"layer_{i}", x_BTD
            x_BTD, caches[name], logits_BTE, layer_stats = layer(self.config, letter, name=name)(
                x_BTD, context, cache and cache[name], constants.get(name))
            traced = {"hidden_BTD": input_BTD, "router_logits_BTE": logits_BTE} if self.trace else {}
            stats.append(layer_stats._asdict() | traced)
        return x_BTD, (cache and caches, jax.tree.map(lambda *x: jnp.stack(x), *stats))


class Model(nn.Module):
    """MiniMax-Text-01's decoder, or MiniMax-VL-01's with its image encoder (`encode_images`).

    Only the `params` collection is used; caches and statistics are results.
    """
    config: config.Model

    @nn.compact
    def __call__(self, tokens_BT, segments_BT=None, positions_BT=None, cache=None, trace=False, patch_code_BT=None,
                 images=None):
        """Returns hidden states after the final norm; `logits` turns them into logits.

        Args:
          tokens_BT: token ids.
          segments_BT: document numbers from 1, 0 for padding; None: one document a row. With a cache: 1 for a token, 0 for
            padding on the right, which the cache does not keep.
          positions_BT: positions for RoPE. None: n, n + 1, n + 2, ... in a row with n tokens in the cache (0 without a cache).
          cache: from `empty_cache` or an earlier call; the tokens continue it.
          trace: also return every layer's input and router logits in the statistics.
          patch_code_BT: selects each token's embedding; None: there are no images. 0: the token's own. 1: newline_D, which
            follows a line of patches. p + 2: patch p of the token's block of rows, patches_bpD[block, p].
          images: (newline_D, patches_bpD) from `encode_images`.

        Returns:
          x_BTD, the cache with these tokens (or None), and a dict of statistics, each [layers, ...]: load_E, prob_E, z,
          dropped, overflow (`parallel.routing.Stats`), with `trace` also hidden_BTD and router_logits_BTE.
        """
        c = self.config
        T = tokens_BT.shape[1]
        start_B = None if cache is None else cache["length_B"]
        if positions_BT is None:
            positions_BT = jnp.arange(T)[None] + (0 if start_B is None else start_B[:, None])
        # "BS" shards time over the mesh axis seq only, "BT" over seq and etp (`parallel.sharding`). RoPE needs "BS": inside a
        # mixer, etp shards the heads.
        context = Context(segments_BT, constrain(positions_BT, "BS"), start_B)
        embed_WD = self.param("embed_WD", nn.initializers.normal(c.embed_std), (c.vocab, c.dim))
        x_BTD = vocabulary.embed(embed_WD, tokens_BT, c.dtype)
        if patch_code_BT is not None:
            x_BTD = insert_patches(x_BTD, patch_code_BT, *images)
        x_BTD = constrain(x_BTD, "BTD")

        # Flax's check_constancy_invariants is for scans with broadcast outputs, and this scan has none. The check would trace
        # the body a second time, and would mistake a shard_map in the body for a broadcast output.
        groups = nn.scan(Group, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.groups,
                         in_axes=(nn.broadcast, 0, 0), check_constancy_invariants=False)(c, trace, name="groups")
        layers = None if cache is None else cache["layers"]
        x_BTD, (layers, stats) = groups(x_BTD, context, layers, _constants(c))
        if cache is not None:
            new_B = T if segments_BT is None else jnp.sum(segments_BT > 0, axis=1, dtype=jnp.int32)
            # x_BTD depends on all reads of the cache: `append` orders the write of a single token after them.
            cache = {"length_B": start_B + new_B, "layers": append(cache["layers"], layers, start_B, x_BTD)}
        self.param("head_WD", nn.initializers.normal(c.dim ** -0.5), (c.vocab, c.dim))
        x_BTD = rms_norm(x_BTD, param(self, "norm_D"), c.norm_eps)
        if c.vision.layers and self.is_initializing():      # creates its parameters; `encode_images` uses them
            Vision(c, name="vision")(jnp.zeros((1, 1, c.vision.tile, c.vision.tile, 3)))
        return x_BTD, cache, {k: v.reshape(c.layers, *v.shape[2:]) for k, v in stats.items()}


def _with_remat(layer, c: config.Model):
    """The layer's module. With model.remat, the backward pass of a layer recomputes the layer's activations.

    With model.keep_arrived, it does not recompute the tokens that the experts' devices received, so they are sent only once.
    """
    if not c.remat:
        return layer
    kept = [ARRIVED] if c.keep_arrived else []
    return nn.remat(layer, policy=jax.checkpoint_policies.save_only_these_names(*kept))


def _constants(c: config.Model) -> dict:
    """The arrays that `Kind.constants` gives the layers, as {layer name in a group: arrays stacked over the groups}."""
    found = {}
    for i, letter in enumerate(c.pattern):
        if of_layer := kind_of(letter).constants:
            layers = [of_layer(c, layer) for layer in range(i, c.layers, len(c.pattern))]
            found[f"layer_{i}"] = jax.tree.map(lambda *x: jnp.array(np.stack(x)), *layers)
    return found


def encode_images(c: config.Model, params, pixels_bIYXZ):
    """Computes the argument `images` of `Model` from the tiles of each block: newline_D and patches_bpD (`layers.vision`)."""
    return Vision(c).apply({"params": params["vision"]}, pixels_bIYXZ)


def logits(params, x_BTD):
    """logits_BTW of the model's hidden states; float32, or float64 for float64 hidden states."""
    return jnp.einsum("BTD,WD->BTW", x_BTD, params["head_WD"].astype(x_BTD.dtype),
                      preferred_element_type=wide_dtype(x_BTD.dtype))


@functools.partial(jax.jit, static_argnums=range(4))
def empty_cache(c: config.Model, rows: int, max_length: int, kv_dtype: str = ""):
    """A cache without tokens, with room for `max_length` tokens a row.

    The cache is {"length_B", "layers": {"layer_0": {...}, ...}}. The name of a layer's entry ends in its axes, such as
    "k_BGSK"; the array has one more axis in front, the groups (L). `kv_dtype` is the dtype of keys and values; empty: the
    dtype of the computation.
    """
    def zeros(name, entry):     # `entry` has the shape for one row and one token (`layers.common.cache_entry`)
        sizes = {"B": rows, "S": max_length}
        shape = [sizes.get(axis, size) for axis, size in zip(axes_of(name), entry.shape)]
        return jnp.zeros((c.groups, *shape), entry.dtype)
    layers = {}
    for i, letter in enumerate(c.pattern):
        entries = kind_of(letter).cache(c, kv_dtype or c.dtype)
        layers[f"layer_{i}"] = {name: zeros(name, entry) for name, entry in entries.items()}
    return shard_cache({"length_B": jnp.zeros(rows, jnp.int32), "layers": layers})


def abstract_params(c: config.Model) -> dict:
    """The shapes and dtypes (float32) of the parameters, in the tree that `Model.init` creates.

    Only one layer of each kind is traced, so the time does not grow with the number of layers.
    """
    plain = dataclasses.replace(c.portable(), dtype="float32")      # does not change the parameters
    traced = {letter: _abstract_layer(dataclasses.replace(plain, layers=1, pattern=letter)) for letter in set(c.pattern)}
    def stack(x):
        return jax.ShapeDtypeStruct((c.groups, *x.shape[1:]), x.dtype)
    stacked = {letter: jax.tree.map(stack, params["groups"]["layer_0"]) for letter, params in traced.items()}
    top = {name: part for name, part in traced[c.pattern[0]].items() if name != "groups"}
    return top | {"groups": {f"layer_{i}": stacked[letter] for i, letter in enumerate(c.pattern)}}


@functools.lru_cache(maxsize=512)
def _abstract_layer(c: config.Model) -> dict:
    """The abstract parameters of a model of one layer, whatever mesh and transfer guard the caller has set."""
    kind_of(c.pattern)      # raises ConfigError if the letter is unknown
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())), jax.transfer_guard("allow"):
        return jax.eval_shape(lambda: Model(c).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
