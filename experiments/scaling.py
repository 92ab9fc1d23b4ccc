"""Which architecture has the lowest loss at equal FLOPs? Softmax, lightning and hybrid models of 25k to 400k parameters.

    mmx sweep --config experiments/scaling.py --out scaling --executor inline
    mmx fit scaling/runs.jsonl --law envelope --out scaling     # or experiments/results/scaling.jsonl, the runs below

Protocol: eight layers, so that a hybrid has exactly seven lightning layers and one softmax layer; dense, heads of 8,
feed-forward width 8/3 of the model width. Bytes of the embedded corpus in rows of 256, four rows per step. Each token budget
is a separate run whose learning rate decays to 0 over its last 30 %; the paper takes several points from one run at a fixed
rate. One seed. One learning rate, 0.01: at 100k parameters and 131,072 tokens it was better than 0.005 and 0.02, for lightning
(2.238 nats against 2.257 and 2.288) and for softmax (2.221 against 2.273 and 2.305), on 131,072 bytes of validation text. The
loss of the results is measured on 65,536 bytes of validation text. FLOPs include the head.
Time: 1.2 hours for the 45 runs, 0.6 of them training, at the lowest priority on one core of a busy machine.
Result, 2026-11-25: cannot tell. On the envelope, L(C) = a C^-b has b = 0.131 (95 %: 0.065 to 0.198) for softmax, 0.090 (0.059
to 0.121) for lightning and 0.093 (0.070 to 0.116) for the hybrid. All intervals of b overlap, and so do those of a. In six of
nine pairs of runs, 400k is worse than 200k: one seed and one learning rate for all sizes do not show what a size can reach.
"""
from mmx.config import ConfigError, default

PATTERNS = {"softmax": "S", "lightning": "L", "hybrid": "LLLLLLLS"}
SIZES = {"25k": 16, "50k": 24, "100k": 32, "200k": 48, "400k": 64}       # width, with 8 layers and heads of 8
BUDGETS = (2 ** 16, 2 ** 17, 2 ** 18)       # tokens per run
LENGTH, BATCH = 256, 4


def get_config(arch="hybrid", size="100k", tokens=BUDGETS[-1]):
    if arch not in PATTERNS or size not in SIZES:
        raise ConfigError(f"unknown model {arch},{size}: give one of {', '.join(PATTERNS)} and one of {', '.join(SIZES)}")
    config = default()
    model, train = config.model, config.train
    model.layers, model.pattern = 8, PATTERNS[arch]     # eight layers: exactly seven to one
    model.dim = SIZES[size]
    model.head_dim, model.rotary_dim = 8, 8
    model.heads = model.kv_heads = model.dim // model.head_dim
    model.experts, model.top_k, model.expert_dim = 1, 1, 8 * model.dim // 3      # dense
    model.init, model.embed_std = "fan_in", 1.0         # as in tiny.py: better than Xavier at this size
    train.batch, train.length = BATCH, LENGTH
    train.steps = int(tokens) // (BATCH * LENGTH)
    train.lr, train.warmup, train.decay = 1e-2, train.steps // 10, 0.3
    train.tensorboard = False
    config.mesh.edp = 1
    return config


def sweep():
    return {"tokens": BUDGETS, "size": tuple(SIZES), "arch": tuple(PATTERNS)}
