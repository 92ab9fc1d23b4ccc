"""Is a mixture of experts better than a dense model at equal FLOPs? On text, and on facts to remember.

    mmx sweep --config experiments/moe_vs_dense.py --out moe_vs_dense --jobs 6          # or a single run:
    mmx train --config experiments/moe_vs_dense.py:facts,65536,moe,3e-3,0 --workdir facts-moe

Protocol: four layers (LLLS, hybrid 3:1), 64 wide. The dense model has a feed-forward part 133 wide. The MoE model has 16
experts of width 64, top-2, without dropping, with an auxiliary weight of 0.01. Two experts of 64 and the router's 15
additional rows also make 133, so the FLOPs of a token are exactly equal.
Facts: `count` keys of two ids, each with a value of 16 random bits. A fact is seen steps x 128 rows x 85 / count times in every
run. Accuracy is the share of value ids predicted correctly for 2,048 of the training facts: the task measures memory.
Text: bytes of the embedded corpus in rows of 256, 32 rows per step, 8 M bytes (three quarters of an epoch). The loss is
measured on 262,144 bytes of validation text.
Each arm has two learning rates and three seeds; the rate with the better mean over seeds represents the arm.
Time: 0.24 hours on one H100 for 36 runs, 15 at a time, on 2026-11-27; the runs' own times add up to 1.3 hours.
Result: supports. On text, 1.116 nats per byte (1.110 to 1.124) against 1.200 (1.193 to 1.206) of the dense model. Of the value
ids of 65,536 facts, 100 % (100 to 100) against 48.7 % (48.1 to 49.7). Both know all of 32,768 facts: cannot tell. The
comparison is at equal steps: the dense model's loss on 65,536 facts still falls at the end, since it sees each fact half as
often as one of 32,768, and its final capacity was not measured. On text, and on facts for the dense model, the better learning
rate is the higher one, so an even higher rate might be better.
"""
from mmx.config import ConfigError, default

KINDS = {"dense": (1, 1, 133), "moe": (16, 2, 64)}      # experts, top-k, width of one expert
FACTS = (32_768, 65_536)
RATES, SEEDS = (3e-3, 1e-2), (0, 1, 2)


def get_config(task="facts", count=32_768, kind="moe", lr=3e-3, seed=0):
    if task not in ("facts", "text") or kind not in KINDS:
        raise ConfigError(f"unknown arm {task},{count},{kind}: give facts or text, the number of facts, and dense or moe")
    config = default()
    model, train, data = config.model, config.train, config.data
    model.layers, model.pattern, model.dim = 4, "LLLS", 64
    model.heads = model.kv_heads = 4
    model.head_dim, model.rotary_dim = 16, 8
    model.experts, model.top_k, model.expert_dim = KINDS[kind]
    model.embed_std = 1.0

    if task == "facts":
        data.tokenizer = "numbers:256"
        data.sources = (f"facts:count={int(count)},vocab=256,seed={int(seed)}",)
        train.batch, train.length, train.steps = 128, 255, 1500     # 85 facts of three ids per row
    else:
        train.batch, train.length, train.steps = 32, 256, 1000
        train.eval_bytes = 2**18
    train.lr, train.warmup, train.decay = float(lr), 100, 0.5
    train.loss_chunk = train.batch * train.length
    train.seed = data.seed = int(seed)
    train.tensorboard = False
    config.checkpoint.every = train.steps
    config.mesh.edp = 1
    return config


def sweep():
    tasks = [("facts", count) for count in FACTS] + [("text", 0)]
    return [{"task": task, "count": count, "kind": kind, "lr": lr, "seed": seed}
            for seed in SEEDS for task, count in tasks for lr in RATES for kind in KINDS]
