"""The softmax-attention mixer: grouped queries, RoPE on a leading part of each head (model.md section 4)."""
import flax.linen as nn
import jax

from mmx import config
from mmx.kernels.attention import softmax_attention
from mmx.kernels.rope import rope
from mmx.layers.common import Context, param
from mmx.parallel import attention
from mmx.parallel.projection import heads, join


class Softmax(nn.Module):
    config: config.Model

    @nn.compact
    def __call__(self, u_BTD, context: Context, cache, log_decay_H):
        """Returns y_BTD and the cache {"k_BGSK", "v_BGSV"} with these tokens in (None without one)."""
        c = self.config
        q_BHTK, k_BGTK, v_BGTV = heads(u_BTD, q_DHK=param(self, "q_DHK", "D", "HK"), k_DGK=param(self, "k_DGK", "D", "GK"),
                                       v_DGV=param(self, "v_DGV", "D", "GV", True))
        q_BHTK, k_BGTK = (rope(x, context.positions_BT, rotary_dim=c.rotary_dim, theta=c.rope_theta)
                          for x in (q_BHTK, k_BGTK))
        if cache is None:
            o_BHTV = attention.softmax(q_BHTK, k_BGTK, v_BGTV, segments_BT=context.segments_BT)
        else:
            cache = {"k_BGSK": _write(cache["k_BGSK"], k_BGTK, context.start_B),
                     "v_BGSV": _write(cache["v_BGSV"], v_BGTV, context.start_B)}
            o_BHTV = softmax_attention(q_BHTK, cache["k_BGSK"], cache["v_BGSV"], start_B=context.start_B)
        return join(o_BHTV, param(self, "out_HVD", "HV", "D", True)), cache


def _write(cache_BGSK, new_BGTK, start_B):
    """Each row's new tokens behind those it has. Padding lands past a row's end, where the next tokens overwrite it."""
    def row(cache_GSK, new_GTK, start):
        return jax.lax.dynamic_update_slice_in_dim(cache_GSK, new_GTK.astype(cache_GSK.dtype), start, axis=1)
    return jax.vmap(row)(cache_BGSK, new_BGTK, start_B)
