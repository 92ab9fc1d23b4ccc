"""Does half RoPE work beyond the training length? No, half and full RoPE, trained on 256 bytes, evaluated to 2,048.

    mmx sweep --config experiments/rope_length.py --out rope_length --jobs 6            # or a single run:
    mmx train --config experiments/rope_length.py:8,S,3e-3,0 --workdir rope-one
    python experiments/measure/rope_length.py --run rope_length     # adds the loss by place; writes results/rope_length.jsonl

Protocol: four layers, 64 wide, dense, heads of 16. RoPE rotates 0, 8 or 16 dims of a head, with a base of 10,000. The models
are softmax alone (S) and the hybrid 3:1 (LLLS), whose lightning layers have no positional encoding. They train on bytes of the
embedded corpus in rows of 256, and are evaluated on held-out rows of 2,048 bytes. This experiment measures the loss;
needle_rope.py measures retrieval, which needs its own training data. Two learning rates, three seeds.
Time: 0.04 hours on one H100 for 36 runs, 15 at a time, on 2026-11-27.
Result: that half RoPE works beyond the training length is contradicted: the hybrid's loss in bytes 1,024 to 2,047 is 1.58 nats
higher (1.14 to 1.96) than in the first 256 bytes, where its loss is lowest. Without RoPE it is 0.007 higher (0.003 to 0.008):
supports. Whether half RoPE is better than full RoPE beyond 256 bytes cannot be told: both have 2.9 nats or more there in some
seed, near the 3.02 of byte frequencies alone. In bytes 256 to 511 and in all seeds, the hybrid is better with half RoPE than
with full RoPE, by 0.26 (0.07 to 0.40), and softmax alone is worse, by 0.36 (0.25 to 0.45). Within 256 bytes, half RoPE is
better than full RoPE for the hybrid, by 0.016 (0.009 to 0.022): supports that it costs nothing.
"""
from mmx.config import ConfigError, default

TURNED, PATTERNS = (0, 8, 16), ("S", "LLLS")
RATES, SEEDS = (3e-3, 1e-2), (0, 1, 2)


def get_config(turned=8, pattern="S", lr=3e-3, seed=0):
    if int(turned) not in TURNED or pattern not in PATTERNS:
        raise ConfigError(f"unknown arm {turned},{pattern}: give one of {', '.join(map(str, TURNED))} and S or LLLS")
    config = default()
    model, train = config.model, config.train
    model.layers, model.pattern, model.dim = 4, pattern, 64
    model.heads = model.kv_heads = 4
    model.head_dim, model.rotary_dim = 16, int(turned)
    model.experts, model.top_k, model.expert_dim, model.aux_weight = 1, 1, 170, 0.0         # dense
    model.init, model.embed_std = "fan_in", 1.0
    train.batch, train.length, train.steps = 16, 256, 1000
    train.lr, train.warmup, train.decay = float(lr), 100, 0.5
    train.eval_bytes = 2**17
    train.seed = config.data.seed = int(seed)
    train.tensorboard = False
    config.checkpoint.every = train.steps
    config.mesh.edp = 1
    return config


def sweep():
    return [{"turned": turned, "pattern": pattern, "lr": lr, "seed": seed}
            for seed in SEEDS for pattern in PATTERNS for turned in TURNED for lr in RATES]
