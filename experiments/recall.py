"""How many key-value pairs can a model recall? Lightning, softmax and hybrids, by state size and place of the softmax layer.

    mmx sweep --config experiments/recall.py --out recall --jobs 2          # or a single run:
    mmx train --config experiments/recall.py:LLLLLLLS,16,3e-3,0 --workdir recall-one

Protocol: multi-query associative recall (MQAR, Zoology) with 128 keys and 128 values. Eight layers, 64 wide, dense, DeepNorm,
eight heads. The state of a lightning layer has 8 head_dim^2 numbers. Larger heads also make a larger model: heads of 8, 16 and
32 have 0.30, 0.46 and 0.79 M parameters, and training takes 2.1, 3.5 and 6.7 TFLOPs.
A step reads 1,024 tokens in rows of 512. The tasks grow in stages: first 2 and 4 pairs of 8 keys, then up to 16 pairs of 16
keys, 32 of 32, 64 of 64 and 128 of 128. All tasks of a stage have the same share of the rows. With thousands of keys at once,
as in Zoology, no trial learned within 49 M tokens. All runs at 3e-3 learned within 250 steps that a value follows its key, and
runs at 1.5e-3 within about 300; in trials with 16 keys from the start it took 150 to 500 steps, and two of four did not learn
it in 500. The hybrids learn each doubling of the keys in 50 to 140 steps. The base of RoPE is 100: with heads of 16, half of
which are rotated, and a base of 10,000, only one pair of dims would distinguish a token from the one before it.
Accuracy is the share of queries in 200 held-out documents whose most likely next token is the value. Each arm has two learning
rates and three seeds, lightning alone a third, higher rate. The rate with the best mean over seeds and tasks represents the
arm.
Time: a run takes three to seven minutes on one core, up to three times that on a busy machine; 4.4 core hours for 45 runs.
Result: 128 pairs in 512 tokens: hybrid 0.999 (0.999 to 1.000), softmax 0.984 (0.976 to 0.991), lightning 0.302 (0.263 to
0.354), lightning with heads of 8 and 32 0.102 (0.095 to 0.117) and 0.528 (0.479 to 0.565). This supports that the hybrid
retrieves more than lightning and as well as softmax, and that a larger memory helps, together with its parameters and FLOPs.
The softmax layer works as well in the middle, 0.997 (0.994 to 0.999): supports; but not at the beginning, 0.254 (0.234 to
0.276): contradicts. 45 of 51 runs were made, on 2026-11-28. At 6e-3, lightning with heads of 16 does worse than at 3e-3: 0.678
of all tasks (0.610 to 0.747) against 0.794 (0.768 to 0.835); heads of 8 and 32 were not run at 6e-3. These two arms, softmax
alone, and the hybrids with the softmax layer first or in the middle were best at their highest rate, so an even higher rate
might be better.
"""
from mmx.config import ConfigError, default

ARMS = ("LLLLLLLL", "LLLLLLLS", "SSSSSSSS", "LLLSLLLL", "SLLLLLLL")
HEAD_DIMS = (8, 16, 32)
RATES, SEEDS = (3e-3, 1.5e-3), (0, 1, 2)
HIGHER = 6e-3           # an additional rate for lightning alone
VOCAB = 256
TASKS = ((8, 32), (16, 64), (32, 128), (64, 256), (128, 512), (16, 128), (16, 512))     # (pairs, tokens) of the results
STAGES = (      # first step, number of keys and of values, tasks
    (0, 8, ((2, 8), (4, 16))),
    (300, 16, ((4, 16), (8, 32), (16, 64))),
    (400, 32, ((4, 16), (8, 32), (16, 64), (32, 128))),
    (525, 64, ((8, 32), (16, 64), (32, 128), (64, 256))),
    (700, VOCAB // 2, TASKS))


def get_config(arch="LLLLLLLS", head_dim=16, lr=3e-3, seed=0):
    head_dim = int(head_dim)
    if len(arch) != 8 or set(arch) - set("LS") or head_dim not in HEAD_DIMS:
        raise ConfigError(f"unknown arm {arch},{head_dim}: give eight letters L or S, and a head_dim of "
                          f"{', '.join(map(str, HEAD_DIMS))}")
    config = default()
    model, train, data = config.model, config.train, config.data
    model.layers, model.dim = 8, 64
    model.pattern = arch[0] if len(set(arch)) == 1 else arch        # equal layers: one letter, so that they are scanned
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
    data.weights = tuple((first, tuple(int(step == first) for step, _, tasks in STAGES for _ in tasks)) for first, *_ in STAGES)
    config.checkpoint.every = train.steps
    config.mesh.edp = 1
    return config


def sweep():
    parts = ([(arch, 16) for arch in ARMS[:3]], [("LLLLLLLL", n) for n in HEAD_DIMS if n != 16],
             [(arch, 16) for arch in ARMS[3:]])
    grid = [(lr, arms) for lr in RATES for arms in parts] + [(HIGHER, [("LLLLLLLL", n)]) for n in (16, 32, 8)]
    return [{"arch": arch, "head_dim": n, "lr": lr, "seed": seed} for lr, arms in grid for seed in SEEDS for arch, n in arms]
