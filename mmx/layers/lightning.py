"""The lightning-attention mixer (model.md section 3).

    q, k, v = SiLU(W u);   o = lightning attention;   y = W_out( sigmoid(W_gate u) * RMSNorm over all heads (o) )

One token behind a cache is a step of its own, which moves the state once; both ways share the maths around attention.
"""
import flax.linen as nn
import jax.numpy as jnp

from mmx import config
from mmx.kernels.lightning import decode, lightning_attention
from mmx.layers.common import Context, heads, param


class Lightning(nn.Module):
    config: config.Model

    @nn.compact
    def __call__(self, u_BTD, context: Context, cache, log_decay_H):
        """Returns y_BTD and the cache {"state_BHKV"} after the last token (None without one)."""
        c = self.config
        norm_HV, gate_DHV = param(self, "norm_HV"), param(self, "gate_DHV", "D", "HV")
        q_BHTK, k_BHTK, v_BHTV = (heads(u_BTD, w) for w in (
            param(self, "q_DHK", "D", "HK"), param(self, "k_DHK", "D", "HK"), param(self, "v_DHV", "D", "HV", True)))
        (B, H, T, V), D = v_BHTV.shape, u_BTD.shape[2]
        gate_BTX = jnp.einsum("BTD,DX->BTX", u_BTD, gate_DHV.reshape(D, H * V))
        if cache and T == 1:
            live_B = None if context.segments_BT is None else context.segments_BT[:, 0] > 0
            y_BHV, state_BHKV = decode.decode(
                q_BHTK[:, :, 0], k_BHTK[:, :, 0], v_BHTV[:, :, 0], gate_BTX.reshape(B, H, V), norm_HV, log_decay_H,
                cache["state_BHKV"], live_B, eps=c.head_norm_eps, impl=c.impl if c.impl in decode.IMPLS else None)
            y_BTX = y_BHV.reshape(B, 1, H * V)
        else:
            q_BHTK, k_BHTK, v_BHTV = (decode.silu(x).astype(x.dtype) for x in (q_BHTK, k_BHTK, v_BHTV))
            o_BHTV, state_BHKV = lightning_attention(
                q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT=context.segments_BT,
                state_BHKV=cache and cache["state_BHKV"], impl=c.impl or None, chunk=c.chunk or None)
            o_BTX = jnp.einsum("BHTV->BTHV", o_BHTV).reshape(B, T, H * V)
            y_BTX = decode.norm_and_gate(o_BTX, gate_BTX, norm_HV.reshape(H * V), c.head_norm_eps, -1, H * V)
        y_BTD = jnp.einsum("BTX,XD->BTD", y_BTX, param(self, "out_HVD", "HV", "D", True).reshape(H * V, D))
        return y_BTD, cache and {"state_BHKV": state_BHKV}
