"""A layer kind outside the package: a decayed average of the values, o_t = a o_{t-1} + (1 - a) v_t within each document."""
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx import config
from mmx.layers.common import Context, Kind, cache_entry, param
from mmx.parallel.projection import from_heads, to_heads

DECAY = 0.9


class Average(nn.Module):
    config: config.Model

    @nn.compact
    def __call__(self, u_BTD, context: Context, cache, constants):
        """Returns y_BTD and the cache {"mean_BHV"} after the last token (None without one)."""
        v_BHTV, = to_heads(u_BTD, v_DHV=param(self, "v_DHV", "D", "HV"))
        B, H, T, V = v_BHTV.shape
        segments_BT = jnp.ones((B, T), jnp.int32) if context.segments_BT is None else context.segments_BT
        mean_BHV = cache["mean_BHV"] if cache else jnp.zeros((B, H, V), v_BHTV.dtype)

        def step(carry, token):
            mean_BHV, document_B = carry
            v_BHV, segment_B = token
            same_B, live_B = segment_B == document_B, segment_B > 0
            new_BHV = DECAY * jnp.where(same_B[:, None, None], mean_BHV, 0) + (1 - DECAY) * v_BHV
            mean_BHV = jnp.where(live_B[:, None, None], new_BHV, mean_BHV)
            return (mean_BHV, jnp.where(live_B, segment_B, document_B)), mean_BHV

        start = mean_BHV, jnp.ones(B, segments_BT.dtype)        # the state belongs to document 1
        (mean_BHV, _), o_TBHV = jax.lax.scan(step, start, (jnp.einsum("BHTV->TBHV", v_BHTV), segments_BT.T))
        y_BTD = from_heads(jnp.einsum("TBHV->BHTV", o_TBHV), param(self, "out_HVD", "HV", "D"))
        return y_BTD, cache and {"mean_BHV": mean_BHV}


KIND = Kind(
    name="decayed average",
    mixer=Average,
    cache=lambda c, kv_dtype: {"mean_BHV": cache_entry(c, "mean_BHV", c.dtype)},
    flops=lambda c, length: 3 * c.heads * c.head_dim,
)
