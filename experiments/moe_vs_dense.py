"""Does a mixture of experts do more than a dense model at equal FLOPs? On text, and on facts to remember.

    mmx sweep --config experiments/moe_vs_dense.py --out moe_vs_dense --jobs 6          # or one run:
    mmx train --config experiments/moe_vs_dense.py:facts,65536,moe,3e-3,0 --workdir facts-moe

Protocol: four layers LLLS, 64 wide. Dense: a feed-forward part 133 wide; MoE: 16 experts of 64, top-2, none dropped, aux
0.01: 2 x 64 and the router's 15 more rows are 133, so that a token's FLOPs are the same to the last. Facts: `count` keys of
two ids with values of 16 random bits, seen as often in every run as steps x 128 rows x 85 / count; accuracy is the share of
value ids that are told right, of 2,048 of the facts learned: it is memory that is asked for. Text: bytes of the embedded
corpus in rows of 256, 32 a step, 8 M tokens, three quarters of an epoch; the loss is that of 262,144 bytes of validation text.
Two learning rates and three seeds an arm; an arm is told at its better rate, of the mean over seeds.
Hours: 0.24 of one H100 by the clock, 36 runs, 15 at a time, on 2026-11-27; 1.3 is the sum of theirs.
Result: supports. Text 1.116 nats a byte (1.110 to 1.124) against the dense model's 1.200 (1.193 to 1.206); of the value ids of
65,536 facts 100 % (100 to 100) against 48.7 % (48.1 to 49.7), of 32,768 all by both, which cannot tell. It is at equal steps:
the dense model's loss on 65,536, of which it sees each half as often, still falls at the end, and how many it would hold after
more is not asked. Of text, and of the dense model's facts, the better rate is the higher: what a yet higher one would do is not
known.
"""
from mmx.config import ConfigError, default

KINDS = {"dense": (1, 1, 133), "moe": (16, 2, 64)}      # experts, top-k, width of one
FACTS = (32_768, 65_536)
RATES, SEEDS = (3e-3, 1e-2), (0, 1, 2)


def get_config(task="facts", count=32_768, kind="moe", lr=3e-3, seed=0):
    if task not in ("facts", "text") or kind not in KINDS:
        raise ConfigError(f"{task},{count},{kind} is no arm: give facts or text, how many facts, and dense or moe")
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
        train.batch, train.length, train.steps = 128, 255, 1500     # 85 facts of three ids a row
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
