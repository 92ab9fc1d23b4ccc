"""How many pairs can a layer recall? Lightning, softmax and both, where the softmax layer stands, and by the size of the state.

    mmx sweep --config experiments/recall.py --out recall --jobs 6          # or one run:
    mmx train --config experiments/recall.py:LLLLLLLS,16,1e-3,0 --workdir recall-one

Protocol: MQAR (Zoology), 4,096 ids, keys from one half and values from the other. All runs learn from one mixture, 4 to 64
pairs in 8 times as many tokens and 16 pairs in 256 and 512 tokens too, each in an equal share of the rows of 512 tokens, 32
a step. Eight layers 64 wide, dense, DeepNorm; 64 / head_dim heads, so that a lightning layer's state has 64 x head_dim
numbers. Accuracy is the share of a task's queries on 200 held-out documents whose likeliest next token is the value. Three
learning rates and three seeds an arm; an arm is told at its best rate, of the mean over seeds and tasks.
Hours: a run of SSSSSSSS takes a minute and a half of an H100, of LLLLLLLL twenty seconds.
Result: not run. Trials on 2026-11-27, on one H100, their rows not kept: LLLLLLLL at three rates came to 0.01; with 256 ids, 128
rows of 256 tokens and up to 64 pairs, 49 M tokens, the hybrid to 0.10, which is to know a row's values and not whose they are.
Keys then stood among what fills a row too; now they do not. More steps, or easier tasks first, are the next to try.
"""
from mmx.config import ConfigError, default

ARMS = ("LLLLLLLL", "LLLLLLLS", "SSSSSSSS", "LLLSLLLL", "SLLLLLLL")
HEAD_DIMS = (8, 16, 32, 64)
RATES, SEEDS = (1e-3, 3e-3, 1e-2), (0, 1, 2)
TASKS = ((4, 32), (8, 64), (16, 128), (32, 256), (64, 512), (16, 256), (16, 512))       # pairs, tokens
VOCAB = 4096


def get_config(arch="LLLLLLLS", head_dim=16, lr=3e-3, seed=0):
    head_dim = int(head_dim)
    if len(arch) != 8 or set(arch) - set("LS") or 64 % head_dim:
        raise ConfigError(f"{arch},{head_dim} is no arm: give eight letters of L and S, and a head dim that divides 64")
    config = default()
    model, train, data = config.model, config.train, config.data
    model.layers, model.dim = 8, 64
    model.pattern = arch[0] if len(set(arch)) == 1 else arch        # a pure one is scanned, layer by layer
    model.head_dim, model.rotary_dim = head_dim, head_dim // 2     # half RoPE, as the paper's
    model.heads = model.kv_heads = 64 // head_dim
    model.experts, model.top_k, model.expert_dim, model.aux_weight = 1, 1, 170, 0.0         # dense, 8/3 of the width
    model.vocab, model.embed_std = VOCAB + 8, 1.0

    train.batch, train.length, train.steps = 32, 512, 1500
    train.lr, train.warmup, train.decay = float(lr), 150, 0.5
    train.loss_chunk = train.batch * train.length
    train.seed = data.seed = int(seed)
    train.tensorboard = False

    data.tokenizer = f"numbers:{VOCAB}"
    data.sources = tuple(f"mqar:pairs={pairs},length={length},vocab={VOCAB},seed={int(seed)}" for pairs, length in TASKS)
    data.weights = ((0, (1,) * len(TASKS)),)
    config.checkpoint.every = train.steps
    config.mesh.edp = 1
    return config


def sweep():
    states = [("LLLLLLLL", n) for n in HEAD_DIMS if n != 16]
    arms = [(arch, 16) for arch in ARMS[:3]] + states + [(arch, 16) for arch in ARMS[3:]]
    return [{"arch": arch, "head_dim": n, "lr": lr, "seed": seed} for seed in SEEDS for arch, n in arms for lr in RATES]
