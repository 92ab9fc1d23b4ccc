"""The mixture-of-experts layer: its parameters, and a call of `parallel.expert`."""
import flax.linen as nn
import jax.numpy as jnp

from mmx import config
from mmx.layers.common import Context, param
from mmx.parallel import expert
from mmx.parallel.routing import Routing


class MoE(nn.Module):
    config: config.Model

    @nn.compact
    def __call__(self, v_BTD, context: Context):
        """Returns y_BTD, router logits_BTE and `routing.Stats`."""
        c = self.config
        live_BT = jnp.ones(v_BTD.shape[:2], bool) if context.segments_BT is None else context.segments_BT > 0
        router_DE = param(self, "router_DE", "D", "E")
        weights = (param(self, "w1_EDF", "D", "F", scaled=True), param(self, "w3_EDF", "D", "F", scaled=True),
                   param(self, "w2_EFD", "F", "D", scaled=True))
        return expert.moe(v_BTD, live_BT, router_DE, weights,
                          Routing(c.top_k, c.capacity, c.transport, c.token_groups, c.ragged))
