"""The mixture-of-experts layer: parameters, and a call of `parallel.expert`."""
import flax.linen as nn
import jax.numpy as jnp

from mmx import config
from mmx.layers.common import Context, param
from mmx.parallel import expert


class MoE(nn.Module):
    config: config.Model

    @nn.compact
    def __call__(self, u_BTD, context: Context):
        """Returns y_BTD, router logits_BTE and `expert.Stats`."""
        c = self.config
        B, T, D = u_BTD.shape
        live_BT = jnp.ones((B, T), bool) if context.segments_BT is None else context.segments_BT > 0
        y_MD, logits_ME, stats = expert.moe(
            u_BTD.reshape(-1, D), live_BT.reshape(-1), param(self, "router_DE", "D", "E"),
            param(self, "w1_EDF", "D", "F", True), param(self, "w3_EDF", "D", "F", True),
            param(self, "w2_EFD", "F", "D", True), top_k=c.top_k, capacity=c.capacity)
        return y_MD.reshape(B, T, D), logits_ME.reshape(B, T, -1), stats
