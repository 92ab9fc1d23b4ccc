"""The softmax-attention mixer: grouped queries, RoPE on the first dims of each head (docs/model.md section 4).

It has two kinds: full attention, and attention in a window of model.window tokens.
"""
import flax.linen as nn
import jax.numpy as jnp

from mmx import config
from mmx.kernels.rope import rope
from mmx.layers.common import Context, Kind, Layout, Released, cache_entry, param
from mmx.parallel import attention
from mmx.parallel.cache import kv_entries
from mmx.parallel.projection import from_heads, to_heads


class Softmax(nn.Module):
    config: config.Model
    window: int = 0         # number of tokens that a token attends to, itself included; 0: itself and all tokens before it

    @nn.compact
    def __call__(self, u_BTD, context: Context, cache, constants):
        """Returns y_BTD and the new cache entries of these tokens, {"k_BGSK", "v_BGSV", ...} (None without a cache)."""
        c = self.config
        q_BHTK, k_BGTK, v_BGTV = to_heads(u_BTD, q_DHK=param(self, "q_DHK", "D", "HK"), k_DGK=param(self, "k_DGK", "D", "GK"),
                                          v_DGV=param(self, "v_DGV", "D", "GV", scaled=True))
        q_BHTK, k_BGTK = (rope(x, context.positions_BT, rotary_dim=c.rotary_dim, theta=c.rope_theta)
                          for x in (q_BHTK, k_BGTK))
        if cache is None:
            o_BHTV, new = attention.softmax(q_BHTK, k_BGTK, v_BGTV, segments_BT=context.segments_BT, window=self.window), None
        else:
            o_BHTV = attention.softmax_with_cache(q_BHTK, k_BGTK, v_BGTV, cache, context.start_B, self.window)
            new = kv_entries(k_BGTK, v_BGTV, cache)
        return from_heads(o_BHTV, param(self, "out_HVD", "HV", "D", scaled=True)), new


def windowed(c: config.Model, name: str | None = None) -> Softmax:
    """The mixer of a window layer."""
    return Softmax(c, c.window, name=name)


def _cache(c: config.Model, kv_dtype: str):
    # Both kinds keep all tokens of a row. A window layer does not drop the tokens that have left the window.
    entries = {"k_BGSK": kv_dtype, "v_BGSV": kv_dtype}
    if kv_dtype == "int8":
        entries |= {"k_scale_BGS": jnp.float32, "v_scale_BGS": jnp.float32}
    return {name: cache_entry(c, name, dtype) for name, dtype in entries.items()}


def _flops(c: config.Model, keys: float) -> float:
    """FLOPs of the scores and of the weighted sum of values, for a token that attends to `keys` tokens."""
    return 4 * c.heads * c.head_dim * keys


def _mean_keys(c: config.Model, length: int) -> float:
    """Number of tokens that a token of a window layer attends to, averaged over a sequence of `length` tokens."""
    full = min(c.window, length)
    # Token i = 0, 1, ... attends to min(i + 1, full) tokens: for i < full, this is full - 1 - i fewer than `full`.
    missing = full * (full - 1) / 2     # the sum of full - 1 - i
    return full - missing / max(length, 1)


KIND = Kind(
    name="softmax attention",
    mixer=Softmax,
    cache=_cache,
    flops=lambda c, length: _flops(c, (length + 1) / 2),
    config_keys=("rotary_dim", "rope_theta", "alpha_softmax", "beta_softmax"),
    splits_time=True,
    released=Released(1, "full_attention", {
        "q_DHK": Layout("self_attn.q_proj.weight", "HK D"), "k_DGK": Layout("self_attn.k_proj.weight", "GK D"),
        "v_DGV": Layout("self_attn.v_proj.weight", "GV D"), "out_HVD": Layout("self_attn.o_proj.weight", "D HV")}),
    paper_flops=lambda c, length: 12 * c.dim * length,      # the papers count all pairs of tokens, without the causal mask
)
WINDOW_KIND = Kind(
    name="softmax attention in a window",
    mixer=windowed,
    cache=_cache,
    flops=lambda c, length: _flops(c, _mean_keys(c, length)),
    config_keys=(*KIND.config_keys, "window"),
    paper_flops=lambda c, length: 12 * c.dim * min(length, c.window),
)
