"""The lightning-attention mixer (model.md section 3).

    q, k, v = SiLU(W u);   o = lightning attention;   y = W_out( sigmoid(W_gate u) * RMSNorm over all heads (o) )
"""
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmx import config
from mmx.kernels.lightning import lightning_attention
from mmx.layers.common import Context, heads, param, rms_norm


class Lightning(nn.Module):
    config: config.Model

    @nn.compact
    def __call__(self, u_BTD, context: Context, cache, log_decay_H):
        """Returns y_BTD and the cache {"state_BHKV"} after the last token (None without one)."""
        c = self.config
        q_BHTK, k_BHTK, v_BHTV = (jax.nn.silu(heads(u_BTD, w)) for w in (
            param(self, "q_DHK", "D", "HK"), param(self, "k_DHK", "D", "HK"), param(self, "v_DHV", "D", "HV", True)))
        o_BHTV, state_BHKV = lightning_attention(
            q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT=context.segments_BT,
            state_BHKV=cache and cache["state_BHKV"], impl=c.impl or None, chunk=c.chunk or None)
        B, H, T, V = o_BHTV.shape
        o_BTX = jnp.einsum("BHTV->BTHV", o_BHTV).reshape(B, T, H * V)
        o_BTX = rms_norm(o_BTX, param(self, "norm_HV").reshape(H * V), c.head_norm_eps)
        gate_BTX = jnp.einsum("BTD,DX->BTX", u_BTD, param(self, "gate_DHV", "D", "HV").reshape(-1, H * V))
        y_BTX = jax.nn.sigmoid(gate_BTX) * o_BTX
        y_BTD = jnp.einsum("BTX,XD->BTD", y_BTX, param(self, "out_HVD", "HV", "D", True).reshape(H * V, -1))
        return y_BTD, cache and {"state_BHKV": state_BHKV}
