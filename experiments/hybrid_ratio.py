"""How many softmax layers does a hybrid need, and can softmax in windows replace lightning? Ratios of 1/2 to 1/16, equal FLOPs.

    mmx sweep --config experiments/hybrid_ratio.py --out hybrid_ratio --jobs 2          # or a single run:
    mmx train --config experiments/hybrid_ratio.py:L,8,3e-3,0 --workdir hybrid-one

Protocol: 16 layers, 64 wide, dense, DeepNorm. Every `period`-th layer is softmax; the others are lightning (L) or softmax in a
window of 32 tokens (W). Period 0 has no full softmax layer, period 1 has only those. The task is MQAR in growing stages, for
the reasons given in recall.py: at the end 8 to 64 pairs of 64 keys in 32 to 256 tokens. The models have eight heads of 8; with
heads of 16, lightning alone recalled 0.96 of 64 pairs (one run), too much to separate the arms. The width of the feed-forward
part makes the FLOPs of a token equal to within 0.5 %. Two learning rates, three seeds.
Time: a run takes five to nine minutes on one core, up to twice that on a busy machine; 7.8 core hours for 66 runs on
2026-11-28.
Result (mean accuracy over all tasks, at the better learning rate):
    softmax layers      other layers lightning      other layers in windows
    none                0.686 (0.674 to 0.693)      0.395 (0.392 to 0.398)      supports lightning
    1 in 16             1.000 (1.000 to 1.000)      0.604 (0.316 to 1.000)      cannot tell
    1 in 8              1.000 (1.000 to 1.000)      0.690 (0.072 to 0.999)      cannot tell
    1 in 4              1.000 (1.000 to 1.000)      0.977 (0.932 to 1.000)      cannot tell
    1 in 2              0.962 (0.887 to 1.000)      1.000 (1.000 to 1.000)      contradicts
    all                 1.000 (0.999 to 1.000)
One in 8 retrieves as well as one in 4, one in 2 and all: supports. One in 16 reaches the ceiling too, so whether one in 8 is
better cannot be told. One in 16 is better than none: supports. With windows the seeds differ widely. With
lightning, the runs from one in 4 to one in 16 learn the task in all but one combination of seed and rate, and with windows they
do not; this was observed and not tested.
"""
from mmx.analysis.counts import flops_forward
from mmx.config import ConfigError, build, default

PERIODS = (0, 1, 2, 4, 8, 16)
RATES, SEEDS = (3e-3, 1.5e-3), (0, 1, 2)
VOCAB, LENGTH, WINDOW = 128, 256, 32
STAGES = (      # first step, number of keys and of values, tasks (pairs, tokens)
    (0, 8, ((2, 8), (4, 16))),
    (300, 16, ((4, 16), (8, 32), (16, 64))),
    (400, 32, ((4, 16), (8, 32), (16, 64), (32, 128))),
    (525, VOCAB // 2, ((8, 32), (16, 64), (32, 128), (64, 256), (16, 256))))
WIDTH = 170             # feed-forward width of the lightning model, 8/3 of the model width; the other arms match its FLOPs


def get_config(other="L", period=8, lr=3e-3, seed=0):
    period = int(period)
    if other not in ("L", "W") or period not in PERIODS:
        raise ConfigError(f"unknown arm {other},{period}: give L or W, and one of {', '.join(map(str, PERIODS))}")
    config = default()
    model, train, data = config.model, config.train, config.data
    model.layers, model.dim, model.window = 16, 64, WINDOW
    model.heads = model.kv_heads = 8
    model.head_dim, model.rotary_dim, model.rope_theta = 8, 4, 100.0
    model.experts, model.top_k, model.aux_weight = 1, 1, 0.0
    model.vocab, model.embed_std = VOCAB + 8, 1.0

    train.batch, train.length, train.steps = 4, LENGTH, 1000
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
    model.pattern, model.expert_dim = "L", WIDTH
    target = flops_forward(build(config).model, LENGTH)
    model.pattern = other if not period else other * (period - 1) + "S"
    excess = flops_forward(build(config).model, LENGTH) - target
    model.expert_dim = WIDTH - round(excess / (model.layers * 6 * model.dim))     # one column of the three matrices: 6 D FLOPs
    return config


def sweep():
    main = (("L", 0), ("L", 1), ("L", 2), ("L", 8), ("L", 16), ("W", 8))
    others = (("L", 4), ("W", 0), ("W", 2), ("W", 4), ("W", 16))
    return [{"other": other, "period": period, "lr": lr, "seed": seed}
            for lr in RATES for arms in (main, others) for seed in SEEDS for other, period in arms]
