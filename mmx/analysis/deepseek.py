"""DeepSeek-V3's counts from its published geometry, beside `config.Model`'s: parameters, FLOPs, cache.

Geometry: arXiv 2412.19437, section 4.2; vocabulary and the dense layers' 18,432 from its released config.json. Multi-token
prediction, 11.5 B parameters more by its weights' documentation, is left out, as the published 671 B leave it out. Attention
(MLA, section 2.1.1) projects queries through a latent of 1,536, keys and values through one of 512; a token's cache is that
latent and one RoPE key for all heads.
"""
import dataclasses


@dataclasses.dataclass(frozen=True)
class DeepSeekV3:
    vocab: int = 129_280
    dim: int = 7_168
    layers: int = 61
    dense_layers: int = 3           # the first ones, with one FFN of dense_dim
    dense_dim: int = 18_432
    heads: int = 128
    nope_dim: int = 128             # of a head's queries and keys, without RoPE
    rope_dim: int = 64              # and with it, keys' for all heads at once
    value_dim: int = 128
    query_latent: int = 1_536
    latent: int = 512               # of keys and values
    experts: int = 256
    top_k: int = 8
    shared: int = 1                 # experts that every token takes
    expert_dim: int = 2_048

    @property
    def attention_params(self) -> int:
        """Of one layer, its two norms of latents included."""
        d = self
        queries = d.dim * d.query_latent + d.query_latent + d.query_latent * d.heads * (d.nope_dim + d.rope_dim)
        keys_values = d.dim * (d.latent + d.rope_dim) + d.latent + d.latent * d.heads * (d.nope_dim + d.value_dim)
        return queries + keys_values + d.heads * d.value_dim * d.dim

    def _params(self, experts: int) -> int:
        """Without embedding and head, with so many routed experts."""
        d = self
        moe = 3 * (experts + d.shared) * d.dim * d.expert_dim + d.experts * (d.dim + 1)     # the router has biases
        dense = 3 * d.dim * d.dense_dim
        return (d.dim + d.layers * (d.attention_params + 2 * d.dim) + d.dense_layers * dense
                + (d.layers - d.dense_layers) * moe)

    @property
    def params_total(self) -> int:
        """All parameters, embedding and head included."""
        return 2 * self.vocab * self.dim + self._params(self.experts)

    @property
    def params_active(self) -> int:
        """Parameters a token touches, without embedding and head."""
        return self._params(self.top_k)

    @property
    def params_active_all(self) -> int:
        """Parameters a token touches, with embedding and head: the published "37B activated"."""
        return self.params_active + 2 * self.vocab * self.dim

    @property
    def cache(self) -> int:
        """Bytes of cache a token, in bfloat16."""
        return self.layers * (self.latent + self.rope_dim) * 2

    def flops_forward(self, length: int) -> float:
        """Forward FLOPs per token at the mean of a causal sequence of `length` tokens, counted as `Model.flops_forward` counts.

        Keys and values are projected out of their latent, as prefill does: 2 x heads x (key + value dims) a pair.
        """
        norms = self.layers * (2 * self.dim + self.query_latent + self.latent) + self.dim
        biases = (self.layers - self.dense_layers) * self.experts
        matrices = self.params_active + self.vocab * self.dim - norms - biases
        pairs = self.layers * 2 * self.heads * (self.nope_dim + self.rope_dim + self.value_dim) * (length + 1) / 2
        return 2 * matrices + pairs
