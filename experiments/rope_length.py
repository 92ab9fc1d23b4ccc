"""Does half RoPE reach further than was trained? None, half and full RoPE, learned at 256 bytes, read at up to 2,048.

    mmx sweep --config experiments/rope_length.py --out rope_length --jobs 6            # or one run, and its reading:
    mmx train --config experiments/rope_length.py:8,S,3e-3,0 --workdir rope-one
    python experiments/measure/rope_length.py --run rope_length      # the sweep's rows with the loss by place: rope_length.jsonl

Protocol: four layers, 64 wide, dense, heads of 16 dims of which 0, 8 or 16 turn, base 10,000; softmax alone (S), and the hybrid
(LLLS), whose lightning layers know nothing of positions. Bytes of the embedded corpus in rows of 256; read are rows of 2,048
held-out bytes. A needle has to be trained for (needle_rope.py). Two learning rates, three seeds.
Hours: 0.04 of one H100 by the clock, 36 runs, 15 at a time, on 2026-11-27.
Result: that half RoPE reaches further than was trained is contradicted: bytes 1,024 to 2,047 cost the hybrid 1.58 nats more
(1.14 to 1.96) than the best part before them, the first 256; without RoPE 0.007 more (0.003 to 0.008): supports. Whether half
RoPE keeps more than full beyond 256 cannot be told: each has 2.9 nats or more there in some seed, near the 3.02 that a byte's
frequency tells. The hybrid has less with half RoPE than with full in all seeds, by 0.26 (0.07 to 0.40) in bytes 256 to 511,
softmax alone more, by 0.36 (0.25 to 0.45). Within 256 bytes half RoPE is better than full for the hybrid, by 0.016 (0.009 to
0.022): supports that it costs nothing.
"""
from mmx.config import ConfigError, default

TURNED, PATTERNS = (0, 8, 16), ("S", "LLLS")
RATES, SEEDS = (3e-3, 1e-2), (0, 1, 2)


def get_config(turned=8, pattern="S", lr=3e-3, seed=0):
    if int(turned) not in TURNED or pattern not in PATTERNS:
        raise ConfigError(f"{turned},{pattern} is no arm: give one of {', '.join(map(str, TURNED))} and S or LLLS")
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
