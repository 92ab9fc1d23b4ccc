"""How many pairs can a layer recall? Lightning, softmax and both, where the softmax layer stands, and by the size of the state.

    mmx sweep --config experiments/recall.py --out recall --jobs 2          # or one run:
    mmx train --config experiments/recall.py:LLLLLLLS,16,3e-3,0 --workdir recall-one

Protocol: MQAR (Zoology), 128 keys and 128 values. Eight layers 64 wide, dense, DeepNorm, eight heads of head_dim: a lightning
layer's state has 8 head_dim^2 numbers; heads of 8, 16 and 32 dims have 0.30, 0.46 and 0.79 M parameters and take 2.1, 3.5 and
6.7 TFLOPs, so that a larger state is a larger model too. A run reads 1,024 tokens a step in rows of 512, of tasks that grow: 2
and 4 pairs of 8 keys, up to 16 pairs of 16, 32 of 32, 64 of 64 and 128 of all, each task an equal share of the rows. With
thousands of keys at once, as Zoology has them, no trial learned in 49 M tokens. That a value is looked up by the key before it
all runs at 3e-3 found out within 250 steps, at 1.5e-3 within 300 or nearly; in trials with 16 keys at once it took 150 to 500,
and two of four did not in 500. The hybrids learn each doubling of the keys in 50 to 140 steps. RoPE's base is 100: of heads of
16 dims half turn, and with 10,000 one pair of them alone would tell a token from the one before it. Accuracy is the share of a
task's queries on 200 held-out documents whose likeliest next token is the value. Two learning rates and three seeds an arm, of
lightning alone a third, higher rate; an arm is told at its best rate, of the mean over seeds and tasks.
Hours: a run takes three to seven minutes of a core, up to three times that beside other work; 4.4 core hours for 45.
Result: 128 pairs in 512 tokens: hybrid 0.999 (0.999 to 1.000), softmax 0.984 (0.976 to 0.991), lightning 0.302 (0.263 to
0.354), by heads of 8 and 32 dims 0.102 (0.095 to 0.117) and 0.528 (0.479 to 0.565): supports that the hybrid retrieves more
than lightning and as well as softmax, and that a larger memory, with what it takes, helps. With the softmax layer in the middle
0.997 (0.994 to 0.999): supports that it serves there as at the end; at the beginning 0.254 (0.234 to 0.276): contradicts it. 45
of 51 runs, on 2026-11-28: at 6e-3 lightning's heads of 16 do worse than at 3e-3, 0.678 of all tasks (0.610 to 0.747) for 0.794
(0.768 to 0.835); those of 8 and 32 dims were not run there. These two, softmax alone, and the softmax layer first or in the
middle were best at the highest rate that they had: what a higher one would do is not known.
"""
from mmx.config import ConfigError, default

ARMS = ("LLLLLLLL", "LLLLLLLS", "SSSSSSSS", "LLLSLLLL", "SLLLLLLL")
HEAD_DIMS = (8, 16, 32)
RATES, SEEDS = (3e-3, 1.5e-3), (0, 1, 2)
HIGHER = 6e-3           # of lightning alone
VOCAB = 256
TASKS = ((8, 32), (16, 64), (32, 128), (64, 256), (128, 512), (16, 128), (16, 512))     # pairs, tokens: what is told of
STAGES = (      # first step, how few keys and values, tasks
    (0, 8, ((2, 8), (4, 16))),
    (300, 16, ((4, 16), (8, 32), (16, 64))),
    (400, 32, ((4, 16), (8, 32), (16, 64), (32, 128))),
    (525, 64, ((8, 32), (16, 64), (32, 128), (64, 256))),
    (700, VOCAB // 2, TASKS))


def get_config(arch="LLLLLLLS", head_dim=16, lr=3e-3, seed=0):
    head_dim = int(head_dim)
    if len(arch) != 8 or set(arch) - set("LS") or head_dim not in HEAD_DIMS:
        raise ConfigError(f"{arch},{head_dim} is no arm: give eight letters of L and S, and heads of "
                          f"{', '.join(map(str, HEAD_DIMS))} dims")
    config = default()
    model, train, data = config.model, config.train, config.data
    model.layers, model.dim = 8, 64
    model.pattern = arch[0] if len(set(arch)) == 1 else arch        # a pure one is scanned, layer by layer
    model.heads = model.kv_heads = 8
    model.head_dim, model.rotary_dim, model.rope_theta = head_dim, head_dim // 2, 100.0     # half RoPE, as the paper's
    model.experts, model.top_k, model.expert_dim, model.aux_weight = 1, 1, 64, 0.0      # dense
    model.vocab, model.embed_std = VOCAB + 8, 1.0

    train.batch, train.length, train.steps = 2, 512, 1200
    train.lr, train.warmup, train.decay = float(lr), 200, 0.3
    train.loss_chunk = train.batch * train.length
    train.seed = data.seed = int(seed)
    train.tensorboard = False

    data.tokenizer = f"numbers:{VOCAB}"
    data.sources = tuple(f"mqar:pairs={pairs},length={length},vocab={VOCAB},few={few},tokens={2**18},seed={int(seed)}"
                         for _, few, tasks in STAGES for pairs, length in tasks)
    data.weights = tuple((now, tuple(int(step == now) for step, _, tasks in STAGES for _ in tasks)) for now, *_ in STAGES)
    config.checkpoint.every = train.steps
    config.mesh.edp = 1
    return config


def sweep():
    parts = ([(arch, 16) for arch in ARMS[:3]], [("LLLLLLLL", n) for n in HEAD_DIMS if n != 16],
             [(arch, 16) for arch in ARMS[3:]])
    grid = [(lr, arms) for lr in RATES for arms in parts] + [(HIGHER, [("LLLLLLLL", n)]) for n in (16, 32, 8)]
    return [{"arch": arch, "head_dim": n, "lr": lr, "seed": seed} for lr, arms in grid for seed in SEEDS for arch, n in arms]
