"""The lightning-attention mixer (docs/model.md section 3).

    q, k, v = SiLU(W u);   o = lightning attention;   y = W_out( sigmoid(W_gate u) * RMSNorm(o) )

The RMSNorm is over all heads of a token. With a cache, a single new token uses the decode kernel, which reads and writes the
state once; longer inputs use the chunked kernel. Both use SiLU, norm and gate of `kernels.lightning.decode`. The decode kernel
has no Triton version: a model with impl="triton" decodes with the Pallas GPU kernel.
"""
import flax.linen as nn
import numpy as np

from mmx import config
from mmx.kernels.dtypes import wide_dtype
from mmx.kernels.lightning import decode
from mmx.layers.common import Context, Kind, Layout, Released, cache_entry, param
from mmx.parallel import attention
from mmx.parallel.projection import from_heads, to_heads


class Lightning(nn.Module):
    config: config.Model

    @nn.compact
    def __call__(self, u_BTD, context: Context, cache, log_decay_H):
        """Returns y_BTD and the cache {"state_BHKV"} after the last token (None without a cache)."""
        c = self.config
        # Keep the order of these lines: a parameter's initial values depend on the order in which parameters are created.
        q_DHK, k_DHK = param(self, "q_DHK", "D", "HK"), param(self, "k_DHK", "D", "HK")
        v_DHV, norm_HV = param(self, "v_DHV", "D", "HV", scaled=True), param(self, "norm_HV")
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
            y_BHTV = decode.norm_and_gate(o_BHTV, gate_BHTV, norm_HV[:, None], c.head_norm_eps,
                                          axes=(1, 3), count=norm_HV.size)
        return from_heads(y_BHTV, param(self, "out_HVD", "HV", "D", scaled=True)), cache and {"state_BHKV": state_BHKV}


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi's slope of each head.

    For n heads, n a power of two, the slopes are the geometric sequence 2^(-8/n), 2^(-16/n), ..., 2^-8. For another number of
    heads, let n be the largest power of two below it: the first n heads have the sequence for n, and the remaining heads have
    the 1st, 3rd, 5th, ... element of the sequence for 2 n.
    """
    def sequence(n):
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]
    power = 1 << (heads.bit_length() - 1)
    return sequence(power) + sequence(2 * power)[::2][:heads - power]


def log_decay(c: config.Model, layer: int) -> list[float]:
    """Log decay of each head in nats per token, as in the released model: -slope_h (1 - layer / (layers - 1) + 1e-5).

    See docs/model.md section 3.
    """
    return [-slope * (1 - layer / max(c.layers - 1, 1) + 1e-5) for slope in alibi_slopes(c.heads)]


def _cache(c: config.Model, kv_dtype: str):
    return {"state_BHKV": cache_entry(c, "state_BHKV", wide_dtype(c.dtype))}


KIND = Kind(
    name="lightning attention",
    mixer=Lightning,
    cache=_cache,
    flops=lambda c, length: 4 * c.heads * c.head_dim ** 2,       # of each head: 2 K V for k^T v, and 2 K V for q S
    constants=lambda c, layer: np.array(log_decay(c, layer), wide_dtype(c.dtype)),
    factor_suffix="lightning",
    config_keys=("head_norm_eps", "alpha_lightning", "beta_lightning"),
    splits_time=True,
    released=Released(0, "linear_attention", {
        "q_DHK": Layout("self_attn.qkv_proj.weight", "HK D", 0, 3), "k_DHK": Layout("self_attn.qkv_proj.weight", "HK D", 1, 3),
        "v_DHV": Layout("self_attn.qkv_proj.weight", "HV D", 2, 3), "gate_DHV": Layout("self_attn.output_gate.weight", "HV D"),
        "norm_HV": Layout("self_attn.norm.weight", "HV"), "out_HVD": Layout("self_attn.out_proj.weight", "D HV")}),
    # The papers' layer has chunks of dim / heads tokens, and a gate of two matrices of rank dim / heads (mmx's has full rank).
    # Forward FLOPs in units of dim^2 / heads: 2 + 2 for the scores and outputs in a chunk, 2 + 2 for k^T v and q S, 2 + 2 for
    # the matrices of the gate. Training takes three times as many.
    paper_flops=lambda c, length: 3 * (4 + 4 + 4) * c.dim ** 2 / c.heads,
)
