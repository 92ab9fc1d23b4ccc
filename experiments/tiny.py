"""A small hybrid-lightning mixture of experts on the embedded corpus: the whole job on two CPU cores.

    mmx train --config experiments/tiny.py --workdir demo        # or `make demo`
"""
from mmx.config import default


def get_config():
    config = default()
    model, train = config.model, config.train
    model.dim, model.layers, model.pattern = 128, 4, "LLLS"
    model.heads, model.kv_heads, model.head_dim, model.rotary_dim = 4, 1, 32, 16
    model.experts, model.expert_dim = 4, 256
    model.init, model.embed_std = "fan_in", 1.0
    train.steps, train.batch, train.length = 1500, 4, 512
    train.lr, train.warmup, train.decay = 6e-3, 40, 0.4
    return config
