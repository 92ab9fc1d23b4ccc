"""The lightning-attention mixer (model.md section 3).

    q, k, v = SiLU(W u);   o = lightning attention;   y = W_out( sigmoid(W_gate u) * RMSNorm over all heads (o) )

One token behind a cache is a step of its own, which moves the state once; both ways share the maths around attention. The
step has no form in Triton: a model with impl="triton" takes the GPU's Pallas kernel for it.
"""
import flax.linen as nn

from mmx import config
from mmx.kernels.lightning import decode
from mmx.layers.common import Context, param
from mmx.parallel import attention
from mmx.parallel.projection import from_heads, to_heads


class Lightning(nn.Module):
    config: config.Model

    @nn.compact
    def __call__(self, u_BTD, context: Context, cache, log_decay_H):
        """Returns y_BTD and the cache {"state_BHKV"} after the last token (None without one)."""
        c = self.config
        # a seed's initial values hang on the order in which parameters are made
        q_DHK, k_DHK = param(self, "q_DHK", "D", "HK"), param(self, "k_DHK", "D", "HK")
        v_DHV, norm_HV = param(self, "v_DHV", "D", "HV", True), param(self, "norm_HV")
        q_BHTK, k_BHTK, v_BHTV, gate_BHTV = to_heads(u_BTD, q_DHK=q_DHK, k_DHK=k_DHK, v_DHV=v_DHV,
                                                     gate_DHV=param(self, "gate_DHV", "D", "HV"))
        state_BHKV = cache and cache["state_BHKV"]
        if cache and u_BTD.shape[1] == 1:
            live_B = None if context.segments_BT is None else context.segments_BT[:, 0] > 0
            token = (x_BHTK[:, :, 0] for x_BHTK in (q_BHTK, k_BHTK, v_BHTV, gate_BHTV))
            y_BHV, state_BHKV = decode.decode(*token, norm_HV, log_decay_H, state_BHKV, live_B, eps=c.head_norm_eps,
                                              impl="gpu" if c.impl == "triton" else c.impl or None)
            y_BHTV = y_BHV[:, :, None]
        else:
            q_BHTK, k_BHTK, v_BHTV = (decode.silu(x).astype(x.dtype) for x in (q_BHTK, k_BHTK, v_BHTV))
            o_BHTV, state_BHKV = attention.lightning(
                q_BHTK, k_BHTK, v_BHTV, log_decay_H, segments_BT=context.segments_BT, state_BHKV=state_BHKV,
                impl=c.impl or None, chunk=c.chunk or None)
            y_BHTV = decode.norm_and_gate(o_BHTV, gate_BHTV, norm_HV[:, None], c.head_norm_eps, (1, 3), norm_HV.size)
        return from_heads(y_BHTV, param(self, "out_HVD", "HV", "D", True)), cache and {"state_BHKV": state_BHKV}
