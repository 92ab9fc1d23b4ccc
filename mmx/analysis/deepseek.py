"""Parameters, FLOPs and cache of DeepSeek-V3, computed from its published geometry, to compare with MiniMax-01.

The geometry is from arXiv 2412.19437, section 4.2; the vocabulary and the width of the dense layers (18,432) are from the
released config.json. The module for multi-token prediction (11.5 B parameters, by the documentation of the weights) is not
included, as in the published total of 671 B. Attention (MLA, section 2.1.1) projects queries through a latent of 1,536 and
keys and values through a latent of 512. The cache of a token is the latter latent and one RoPE key that all heads share.
"""
import dataclasses


@dataclasses.dataclass(frozen=True)
class DeepSeekV3:
    vocab: int = 129_280
    dim: int = 7_168
    layers: int = 61
    dense_layers: int = 3           # the first layers, which have one dense FFN of width dense_dim
    dense_dim: int = 18_432
    heads: int = 128
    nope_dim: int = 128             # dimensions of a head's query and key without RoPE
    rope_dim: int = 64              # dimensions with RoPE; all heads share one such key
    value_dim: int = 128
    query_latent: int = 1_536
    latent: int = 512               # of keys and values together
    experts: int = 256
    top_k: int = 8
    shared: int = 1                 # experts that process every token
    expert_dim: int = 2_048

    @property
    def attention_params(self) -> int:
        """Parameters of one attention layer, including the norms of its two latents."""
        d = self
        queries = d.dim * d.query_latent + d.query_latent + d.query_latent * d.heads * (d.nope_dim + d.rope_dim)
        keys_values = d.dim * (d.latent + d.rope_dim) + d.latent + d.latent * d.heads * (d.nope_dim + d.value_dim)
        return queries + keys_values + d.heads * d.value_dim * d.dim

    def _params(self, experts: int) -> int:
        """Parameters without embedding and output head, with `experts` routed experts in each layer."""
        d = self
        moe = 3 * (experts + d.shared) * d.dim * d.expert_dim + d.experts * (d.dim + 1)     # the router has a bias
        dense = 3 * d.dim * d.dense_dim
        return (d.dim + d.layers * (d.attention_params + 2 * d.dim) + d.dense_layers * dense
                + (d.layers - d.dense_layers) * moe)

    @property
    def params_total(self) -> int:
        """All parameters, including embedding and output head."""
        return 2 * self.vocab * self.dim + self._params(self.experts)

    @property
    def params_active(self) -> int:
        """Parameters activated for each token, without embedding and output head."""
        return self._params(self.top_k)

    @property
    def params_active_all(self) -> int:
        """Parameters activated for each token, with embedding and output head: the published "37B activated"."""
        return self.params_active + 2 * self.vocab * self.dim

    @property
    def cache(self) -> int:
        """Cache bytes per token in bfloat16."""
        return self.layers * (self.latent + self.rope_dim) * 2

    def flops_forward(self, length: int) -> float:
        """Forward FLOPs per token, averaged over a causal sequence of `length` tokens, as `counts.flops_forward` counts them.

        Keys and values are expanded from their latent, as in prefill: 2 * heads * (key + value dims) per pair of tokens.
        """
        norms = self.layers * (2 * self.dim + self.query_latent + self.latent) + self.dim
        biases = (self.layers - self.dense_layers) * self.experts
        matrices = self.params_active + self.vocab * self.dim - norms - biases
        pairs = self.layers * 2 * self.heads * (self.nope_dim + self.rope_dim + self.value_dim) * (length + 1) / 2
        return 2 * matrices + pairs
