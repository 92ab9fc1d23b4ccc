"""The decoder: embedding, the pattern's layers scanned over its repeats, final norm (model.md section 2).

    u = RMSNorm(x);   y  = alpha u + beta Mixer(u)          the residual is the normed value,
    v = RMSNorm(y);   x' = alpha v + beta MoE(v)            with DeepNorm's alpha; in pre-norm alpha x and alpha y

A letter of the pattern is a layer kind: two dicts below map it to its mixer and to its cache.
"""
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx import config
from mmx.layers.common import Context, param, rms_norm
from mmx.layers.lightning import Lightning
from mmx.layers.moe import MoE
from mmx.layers.softmax import Softmax
from mmx.layers.vision import Vision
from mmx.parallel import vocabulary
from mmx.parallel.cache import put
from mmx.parallel.expert import ARRIVED
from mmx.parallel.sharding import constrain
from mmx.parallel.vision import show

MIXERS = {"L": Lightning, "S": Softmax, "W": lambda c, name=None: Softmax(c, c.window, name=name)}


class Layer(nn.Module):
    config: config.Model
    kind: str

    @nn.compact
    def __call__(self, x_BTD, context: Context, cache, log_decay_H):
        c = self.config
        alpha, beta = (c.alpha_lightning, c.beta_lightning) if self.kind == "L" else (c.alpha_softmax, c.beta_softmax)
        u_BTD = rms_norm(x_BTD, param(self, "norm_mixer_D"), c.norm_eps)
        mixed_BTD, cache = MIXERS[self.kind](c, name="mixer")(u_BTD, context, cache, log_decay_H)
        y_BTD = alpha * (u_BTD if c.postnorm else x_BTD) + beta * constrain(mixed_BTD, "BTD")
        v_BTD = rms_norm(y_BTD, param(self, "norm_moe_D"), c.norm_eps)
        expert_BTD, logits_BTE, stats = MoE(c, name="moe")(v_BTD, context)
        return c.alpha_moe * (v_BTD if c.postnorm else y_BTD) + c.beta_moe * expert_BTD, cache, logits_BTE, stats


class Group(nn.Module):
    """One repeat of the pattern, unrolled: the body of the scan."""
    config: config.Model
    trace: bool

    @nn.compact
    def __call__(self, x_BTD, context: Context, cache, log_decay_PH):
        caches, stats, layer = {}, [], _rematerialised(Layer, self.config)
        for i, kind in enumerate(self.config.pattern):
            name, before_BTD = f"layer_{i}", x_BTD
            x_BTD, caches[name], logits_BTE, layer_stats = layer(self.config, kind, name=name)(
                x_BTD, context, cache and cache[name], log_decay_PH[i])
            traced = {"hidden_BTD": before_BTD, "router_logits_BTE": logits_BTE} if self.trace else {}
            stats.append(layer_stats._asdict() | traced)
        return x_BTD, (cache and caches, jax.tree.map(lambda *x: jnp.stack(x), *stats))


class Model(nn.Module):
    """MiniMax-Text-01's decoder, or MiniMax-VL-01's, which shows it images: `see` looks at their tiles. Only the `params`
    collection; caches and statistics come out as results."""
    config: config.Model

    @nn.compact
    def __call__(self, tokens_BT, segments_BT=None, positions_BT=None, cache=None, trace=False, places_BT=None, seen=None):
        """Hidden states after the final norm; `logits` makes logits of them.

        Args:
          tokens_BT: token ids.
          segments_BT: documents from 1, 0 for padding; None: one document a row. With a cache: 1, or 0 for padding on
            the right, which is not written.
          positions_BT: positions for RoPE; None: by place (behind the cache's tokens).
          cache: of `parallel.cache.empty_cache`; the tokens continue it.
          trace: also return every layer's input and router logits in the statistics.
          places_BT: what stands in a token's place: 0 the token itself, 1 the row that ends a row of patches, from 2 on a patch
            of the row's own block. None: no images.
          seen: of `see`.

        Returns:
          x_BTD, the cache with these tokens in (or None), and a dict of statistics, [layers, ...] each: load_E, prob_E,
          z, dropped, overflow (`parallel.expert.Stats`), with `trace` hidden_BTD and router_logits_BTE.
        """
        c = self.config
        T = tokens_BT.shape[1]
        start_B = None if cache is None else cache["length_B"]
        if positions_BT is None:
            positions_BT = jnp.arange(T)[None] + (0 if start_B is None else start_B[:, None])
        context = Context(segments_BT, constrain(positions_BT, "BS"), start_B)
        embed_WD = self.param("embed_WD", nn.initializers.normal(c.embed_std), (c.vocab, c.dim))
        x_BTD = vocabulary.embed(embed_WD, tokens_BT, c.dtype)
        if places_BT is not None:
            x_BTD = show(x_BTD, places_BT, *seen)
        x_BTD = constrain(x_BTD, "BTD")
        log_decay_LPH = jnp.array(c.log_decay, jnp.promote_types(c.dtype, jnp.float32)).reshape(
            c.groups, len(c.pattern), c.heads)

        # Nothing broadcast comes out: flax's check of that would trace the body once more, and takes a shard_map for such.
        groups = nn.scan(Group, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.groups,
                         in_axes=(nn.broadcast, 0, 0), check_constancy_invariants=False)(c, trace, name="groups")
        layers = None if cache is None else cache["layers"]
        x_BTD, (layers, stats) = groups(x_BTD, context, layers, log_decay_LPH)
        if cache is not None:
            new_B = T if segments_BT is None else jnp.sum(segments_BT > 0, axis=1, dtype=jnp.int32)
            cache = {"length_B": start_B + new_B, "layers": put(cache["layers"], layers, start_B, x_BTD)}
        self.param("head_WD", nn.initializers.normal(c.dim ** -0.5), (c.vocab, c.dim))
        x_BTD = rms_norm(x_BTD, param(self, "norm_D"), c.norm_eps)
        if c.vision.layers and self.is_initializing():      # its parameters are here, what they do is `see`
            Vision(c, name="vision")(jnp.zeros((1, 1, c.vision.tile, c.vision.tile, 3)))
        return x_BTD, cache, {k: v.reshape(c.layers, *v.shape[2:]) for k, v in stats.items()}


def _rematerialised(layer, c: config.Model):
    """Each layer's activations are made anew for its backward pass, and not before it (prevent_cse): one layer's at a time."""
    if not c.remat:
        return layer
    return nn.remat(layer, policy=jax.checkpoint_policies.save_only_these_names(*[ARRIVED] * c.keep_arrived))


def see(c: config.Model, params, pixels_NIYXZ):
    """What a model is shown of tiles, block by block of a batch's rows (`data.images.collate`): newline_D, patches_NMD."""
    return Vision(c).apply({"params": params["vision"]}, pixels_NIYXZ)


def logits(params, x_BTD):
    """logits_BTW of the model's hidden states, float32."""
    return jnp.einsum("BTD,WD->BTW", x_BTD, params["head_WD"].astype(x_BTD.dtype),
                      preferred_element_type=jnp.promote_types(x_BTD.dtype, jnp.float32))
