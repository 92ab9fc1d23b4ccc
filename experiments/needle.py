"""Which layers find a needle? A small hybrid and its twins learn at 1K and are read to 16K."""
from mmx.config import ConfigError, default

KINDS = {       # pattern, and the hidden part that makes the three equal in size
    "hybrid": ("LLLS", 139),
    "softmax": ("S", 171),
    "lightning": ("L", 128),
}


def get_config(argument="hybrid"):
    if argument not in KINDS:
        raise ConfigError(f"{argument!r} is none of {', '.join(KINDS)}")
    config = default()
    model, train, data = config.model, config.train, config.data
    model.pattern, model.expert_dim = KINDS[argument]
    model.dim, model.layers = 64, 4
    model.heads, model.kv_heads, model.head_dim = 4, 4, 32
    model.rotary_dim, model.rope_theta = 16, 100.0  # turns of 6 to 350 tokens: all of them were whole in training
    model.experts, model.top_k, model.aux_weight = 1, 1, 0.0
    model.init, model.embed_std = "fan_in", 1.0

    train.steps, train.batch, train.length = 750, 2, 1088      # a prompt of 1,024 tokens, its answer and its end fit a row
    train.lr, train.warmup, train.decay = 4e-3, 50, 0.3
    train.tensorboard = False

    needles = "needle-data/needle.jsonl"
    data.sources = ("needle-data/again.jsonl", needles, needles)
    data.lengths = ((0, 0), (0, 600), (600, 0))
    data.weights = ((0, (1, 0, 0)), (100, (1, 3, 0)), (400, (1, 6, 3)), (600, (0, 1, 1)))
    config.checkpoint.every = 200
    config.mesh.edp = 1
    return config
