"""How many softmax layers does a hybrid need, and do windows do instead of lightning? Ratios of 1/2 to 1/16, equal FLOPs.

    mmx sweep --config experiments/hybrid_ratio.py --out hybrid_ratio --jobs 2          # or one run:
    mmx train --config experiments/hybrid_ratio.py:L,8,3e-3,0 --workdir hybrid-one

Protocol: 16 layers, 64 wide, dense, DeepNorm; every `period`-th layer is softmax, the others lightning (L) or softmax in a
window of 32 tokens (W); period 0 has none, 1 only softmax. MQAR in growing stages, as recall.py has it and says why: 8 to 64
pairs of 64 keys in 32 to 256 tokens at the end. Eight heads of 8 dims: with 16 lightning alone recalled 0.96 of 64 pairs (one
run), which parts nothing. A token's FLOPs are made the same, to 0.5 %, by the width of the feed-forward part. Two learning
rates, three seeds.
Hours: a run takes five to nine minutes of a core, up to twice that beside other work; 7.8 core hours for 66 on 2026-11-28.
Result: share of all tasks recalled, at the better rate: one softmax layer in eight 1.000 (1.000 to 1.000), softmax alone 1.000
(0.999 to 1.000), every second 0.962 (0.887 to 1.000), every fourth 1.000 (1.000 to 1.000): supports that one in eight does as
well; one in sixteen 1.000 (1.000 to 1.000), which has all of it as well: cannot tell; none 0.686 (0.674 to 0.693): supports
that one in sixteen does more. Lightning more than windows between them: one in eight, 0.690 (0.072 to 0.999) with windows,
every fourth, 0.977 (0.932 to 1.000), and one in sixteen, 0.604 (0.316 to 1.000), cannot tell, for with windows seeds lie far
apart; supports with none, 0.395 (0.392 to 0.398); contradicts every second, 1.000 (1.000 to 1.000). That lightning's runs one
in four to one in sixteen learn at each seed and rate but one, and windows' do not, is seen and not tested.
"""
from mmx.analysis.counts import flops_forward
from mmx.config import ConfigError, build, default

PERIODS = (0, 1, 2, 4, 8, 16)
RATES, SEEDS = (3e-3, 1.5e-3), (0, 1, 2)
VOCAB, LENGTH, WINDOW = 128, 256, 32
STAGES = (      # first step, how few keys and values, tasks of pairs and tokens
    (0, 8, ((2, 8), (4, 16))),
    (300, 16, ((4, 16), (8, 32), (16, 64))),
    (400, 32, ((4, 16), (8, 32), (16, 64), (32, 128))),
    (525, VOCAB // 2, ((8, 32), (16, 64), (32, 128), (64, 256), (16, 256))))
WIDTH = 170             # of lightning's feed-forward part, 8/3 of the width: what the others are made equal to


def get_config(other="L", period=8, lr=3e-3, seed=0):
    period = int(period)
    if other not in ("L", "W") or period not in PERIODS:
        raise ConfigError(f"{other},{period} is no arm: give L or W, and one of {', '.join(map(str, PERIODS))}")
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
    data.weights = tuple((now, tuple(int(step == now) for step, _, tasks in STAGES for _ in tasks)) for now, *_ in STAGES)
    config.checkpoint.every = train.steps
    config.mesh.edp = 1
    model.pattern, model.expert_dim = "L", WIDTH
    goal = flops_forward(build(config).model, LENGTH)
    model.pattern = other if not period else other * (period - 1) + "S"
    more = flops_forward(build(config).model, LENGTH) - goal
    model.expert_dim = WIDTH - round(more / (model.layers * 6 * model.dim))     # a column of the three matrices: 6 D FLOPs
    return config


def sweep():
    first = (("L", 0), ("L", 1), ("L", 2), ("L", 8), ("L", 16), ("W", 8))
    rest = (("L", 4), ("W", 0), ("W", 2), ("W", 4), ("W", 16))
    return [{"other": other, "period": period, "lr": lr, "seed": seed}
            for lr in RATES for arms in (first, rest) for seed in SEEDS for other, period in arms]
