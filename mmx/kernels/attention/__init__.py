from mmx.kernels.attention.api import softmax_attention

__all__ = ["softmax_attention"]
