"""Does DeepNorm train deeper models than pre-norm and plain post-norm? Loss and gradient norms by layer, for 8 to 48 layers.

    mmx sweep --config experiments/norm.py --out norm --jobs 6          # or a single run:
    mmx train --config experiments/norm.py:deepnorm,48,3e-3,0 --workdir norm-one

Protocol: the pattern LLLLLLLS (hybrid 7:1) repeated, 64 wide, dense, all with Xavier initialisation. The three forms:
    deepnorm    the residual is the normed input times (2 layers)^1/4; v, out and the feed-forward part are initialised with the
                factor (8 layers)^-1/4 (the paper's form)
    post        the same without these two factors
    pre         the residual is the input without a norm
Bytes of the embedded corpus in rows of 256, 16 rows per step, 300 steps (1.2 M bytes). The loss is measured on 65,536 bytes of
validation text. Gradient norms by layer are means over the last twentieth of the steps, before clipping to 1. A run has failed
to train if its loss is above 2.9 nats (byte frequencies alone reach 3.02) or not finite. Two learning rates, three seeds.
Time: 0.1 hours on one H100 for 45 of the 54 runs, 15 at a time, on 2026-11-27. The 48-layer models ran at the lower rate only.
Result: no run diverged. Plain post-norm fails to train at 48 layers (three of three seeds) and hardly trains at 24. Its
gradient fades by 5.4 orders of magnitude (5.2 to 5.8) from the last quarter of 48 layers to the first: supports. Its better
learning rate is the lower one; an even lower one was not tried. DeepNorm is 0.020 nats better than pre-norm at 24 layers
(0.003 to 0.030): supports. At 8 and 48 layers they are within 0.02 of each other: cannot tell. At 48 layers both ran at 3e-3
only, the rate at which pre-norm is better at 8 and 24 layers.
"""
from mmx.config import ConfigError, default

FORMS = ("deepnorm", "pre", "post")
DEPTHS = (8, 24, 48)
RATES, SEEDS = (3e-3, 1e-2), (0, 1, 2)


def get_config(form="deepnorm", layers=24, lr=3e-3, seed=0):
    if form not in FORMS or int(layers) % 8:
        raise ConfigError(f"unknown arm {form},{layers}: give one of {', '.join(FORMS)} and a multiple of 8 layers")
    config = default()
    model, train = config.model, config.train
    model.layers, model.pattern, model.dim = int(layers), "LLLLLLLS", 64
    model.heads = model.kv_heads = 4
    model.head_dim, model.rotary_dim = 16, 8
    model.experts, model.top_k, model.expert_dim, model.aux_weight = 1, 1, 170, 0.0         # dense
    model.embed_std = 1.0
    model.init = "deepnorm" if form == "deepnorm" else "xavier"
    model.postnorm = form != "pre"
    if form == "post":
        model.alpha_lightning = model.alpha_softmax = model.alpha_moe = 1.0

    train.batch, train.length, train.steps = 16, 256, 300
    train.lr, train.warmup, train.decay = float(lr), 30, 0.5
    train.loss_chunk = train.batch * train.length
    train.seed = config.data.seed = int(seed)
    train.tensorboard = False
    config.checkpoint.every = train.steps
    config.mesh.edp = 1
    return config


def sweep():
    return [{"form": form, "layers": layers, "lr": lr, "seed": seed}
            for seed in SEEDS for layers in DEPTHS for lr in RATES for form in FORMS]
