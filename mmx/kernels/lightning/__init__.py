from mmx.kernels.lightning.api import lightning_attention

__all__ = ["lightning_attention"]
