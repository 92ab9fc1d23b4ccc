"""The softmax-attention mixer: grouped queries, RoPE on a leading part of each head (model.md section 4)."""
import flax.linen as nn

from mmx import config
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
            o_BHTV, k_BGSK, v_BGSV = attention.behind(q_BHTK, k_BGTK, v_BGTV, cache["k_BGSK"], cache["v_BGSV"],
                                                      context.start_B)
            cache = {"k_BGSK": k_BGSK, "v_BGSV": v_BGSV}
        return join(o_BHTV, param(self, "out_HVD", "HV", "D", True)), cache

