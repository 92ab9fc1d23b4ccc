"""Does half RoPE retrieve beyond the training length? No, half and full RoPE, trained on 256 bytes, evaluated to 2,048.

    # documents, a sweep of 18 runs, evaluation:
    python experiments/measure/needle.py --experiment needle_rope --run needle-rope
    # or a single run:
    mmx examples --suite needle --rows again --lengths 128 --examples 4000 --seed 1 --out needle-rope-data/again.jsonl
    mmx examples --suite needle --lengths 192,256 --examples 300 --seed 1 --out needle-rope-data/needle.jsonl
    mmx train --config experiments/needle_rope.py:hybrid,16,0 --workdir needle-rope-one
    mmx eval --checkpoint needle-rope-one --suite needle --lengths 256,512,1k,2k --rows 0,25,50,75,100 --examples 10

Protocol: the models of needle.py, hybrid 3:1 (LLLS) and softmax alone. RoPE rotates 0, 16 or 32 of a head's 32 dims, with the
paper's base of 10,000. The documents are those of needle.py with prompts of 192 and 256 tokens (bytes). Three seeds.
Time: 18 runs of 3 to 6 minutes and 18 evaluations of a minute, on one core; 1.4 hours in all, on 2026-11-28.
Result: at 2,048 tokens the hybrid answers 91 % correctly without RoPE (86 to 100), 26 % with half RoPE (20 to 30) and 17 % with
full RoPE (16 to 20); at 256 tokens 99 to 100 %. That half RoPE works beyond the training length is contradicted. Whether it is
better there than full RoPE cannot be told: 66 % (62 to 72) against 60 % (54 to 68) at 512 tokens, 44 % (32 to 58) against 28 %
(24 to 34) at 1,024; at 2,048 both find the needles at the end, a fifth of all, and few others. Softmax alone answers 0 to 3 %
correctly at 2,048. Without RoPE it had not learned the task at 256 either.
"""
from mmx.config import ConfigError, default

KINDS = {"hybrid": ("LLLS", 139), "softmax": ("S", 171)}        # pattern, feed-forward width: equal in size
TURNED = (0, 16, 32)


def get_config(kind="hybrid", turned=16, seed=0):
    if kind not in KINDS or int(turned) not in TURNED:
        raise ConfigError(f"unknown arm {kind},{turned}: give hybrid or softmax, and one of {', '.join(map(str, TURNED))}")
    config = default()
    model, train, data = config.model, config.train, config.data
    model.pattern, model.expert_dim = KINDS[kind]
    model.dim, model.layers = 64, 4
    model.heads, model.kv_heads, model.head_dim, model.rotary_dim = 4, 4, 32, int(turned)
    model.experts, model.top_k, model.aux_weight = 1, 1, 0.0
    model.init, model.embed_std = "fan_in", 1.0

    train.steps, train.batch, train.length = 750, 8, 272        # a prompt of 256 tokens, its answer and its end fit in a row
    train.lr, train.warmup, train.decay = 4e-3, 50, 0.3
    train.loss_chunk = train.batch * train.length
    train.seed = data.seed = int(seed)
    train.tensorboard = False

    data.sources = ("needle-rope-data/again.jsonl", "needle-rope-data/needle.jsonl")
    data.weights = ((0, (1, 0)), (100, (1, 3)), (400, (1, 9)), (600, (0, 1)))
    config.checkpoint.every = train.steps
    config.mesh.edp = 1
    return config


def sweep():
    return [{"kind": kind, "turned": turned, "seed": seed} for seed in (0, 1, 2) for kind in KINDS for turned in TURNED]
