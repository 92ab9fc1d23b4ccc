"""The softmax-attention mixer: grouped queries, RoPE on a leading part of each head (model.md section 4); also in a window."""
import flax.linen as nn

from mmx import config
from mmx.kernels.rope import rope
from mmx.layers.common import Context, param
from mmx.parallel import attention
from mmx.parallel.cache import stored
from mmx.parallel.projection import from_heads, to_heads


class Softmax(nn.Module):
    config: config.Model
    window: int = 0         # tokens that one sees, itself included; 0: all

    @nn.compact
    def __call__(self, u_BTD, context: Context, cache, log_decay_H):
        """Returns y_BTD and what a cache keeps of these tokens, {"k_BGSK", "v_BGSV", ...} (None without one)."""
        c = self.config
        q_BHTK, k_BGTK, v_BGTV = to_heads(u_BTD, q_DHK=param(self, "q_DHK", "D", "HK"), k_DGK=param(self, "k_DGK", "D", "GK"),
                                          v_DGV=param(self, "v_DGV", "D", "GV", True))
        q_BHTK, k_BGTK = (rope(x, context.positions_BT, rotary_dim=c.rotary_dim, theta=c.rope_theta)
                          for x in (q_BHTK, k_BGTK))
        if cache is None:
            o_BHTV, new = attention.softmax(q_BHTK, k_BGTK, v_BGTV, segments_BT=context.segments_BT, window=self.window), None
        else:
            o_BHTV = attention.softmax_with_cache(q_BHTK, k_BGTK, v_BGTV, cache, context.start_B, self.window)
            new = stored(k_BGTK, v_BGTV, cache)
        return from_heads(o_BHTV, param(self, "out_HVD", "HV", "D", True)), new
