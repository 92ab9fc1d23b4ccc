"""Which architecture has the lower loss at equal FLOPs? The paper's ladder in small: softmax, lightning, hybrid, 25k to 400k.

    mmx sweep --config experiments/scaling.py --out scaling --executor inline
    mmx fit scaling/runs.jsonl --law envelope --out scaling     # or experiments/results/scaling.jsonl, the runs below

Protocol: eight layers, so that seven lightning layers to one of softmax is literal; dense, heads of 8 dims, feed-forward parts
8/3 of the width; bytes of the embedded corpus in rows of 256, four a step. Each budget of tokens is a run of its own whose
rate decays to 0 over its last 30 %, where the paper reads points off one run at a fixed rate. One seed, and one learning rate:
0.01, at 100k and 131,072 tokens better than 0.005 and 0.02 for lightning (2.238 nats against 2.257, 2.288) and for softmax
(2.221 against 2.273, 2.305; on 131,072 bytes). The loss is that of 65,536 bytes of validation text, FLOPs are with the head.
Hours: 1.2 for the 45 runs, 0.6 of them training, at the lowest priority on one core of a busy machine.
Result, 2026-11-25: cannot tell. L(C) = a C^-b on the envelope has b = 0.131 (95 %: 0.065 to 0.198) for softmax, 0.090 (0.059
to 0.121) for lightning, 0.093 (0.070 to 0.116) for the hybrid: all intervals meet, those of a too. In six of nine pairs of runs
400k is worse than 200k: one seed and one rate for all sizes do not show what a size can do.
"""
from mmx.config import ConfigError, default

PATTERNS = {"softmax": "S", "lightning": "L", "hybrid": "LLLLLLLS"}
SIZES = {"25k": 16, "50k": 24, "100k": 32, "200k": 48, "400k": 64}       # width, at 8 layers and heads of 8 dims
BUDGETS = (2 ** 16, 2 ** 17, 2 ** 18)       # tokens
LENGTH, BATCH = 256, 4


def get_config(arch="hybrid", size="100k", tokens=BUDGETS[-1]):
    if arch not in PATTERNS or size not in SIZES:
        raise ConfigError(f"{arch},{size} is no rung: give one of {', '.join(PATTERNS)} and one of {', '.join(SIZES)}")
    config = default()
    model, train = config.model, config.train
    model.layers, model.pattern = 8, PATTERNS[arch]     # eight layers, so that seven to one is literal
    model.dim = SIZES[size]
    model.head_dim, model.rotary_dim = 8, 8
    model.heads = model.kv_heads = model.dim // model.head_dim
    model.experts, model.top_k, model.expert_dim = 1, 1, 8 * model.dim // 3      # dense
    model.init, model.embed_std = "fan_in", 1.0         # as tiny.py: better than Xavier at this size
    train.batch, train.length = BATCH, LENGTH
    train.steps = int(tokens) // (BATCH * LENGTH)
    train.lr, train.warmup, train.decay = 1e-2, train.steps // 10, 0.3
    train.tensorboard = False
    config.mesh.edp = 1
    return config


def sweep():
    return {"tokens": BUDGETS, "size": tuple(SIZES), "arch": tuple(PATTERNS)}
