"""Does DeepNorm train deeper than pre-norm and plain post-norm? Loss, gradient norms by layer, divergence at 8 to 48 layers.

    mmx sweep --config experiments/norm.py --out norm --jobs 6          # or one run:
    mmx train --config experiments/norm.py:deepnorm,48,3e-3,0 --workdir norm-one

Protocol: LLLLLLLS repeated, 64 wide, dense, all three with Xavier's initial values. deepnorm: the normed input times (2
layers)^1/4 is the residual, and v, out and the feed-forward part begin (8 layers)^-1/4 as large (the paper's); post: the
same without either factor; pre: the residual is the input as it is. Bytes of the embedded corpus in rows of 256, 16 a step,
300 steps (1.2 M tokens); the loss is that of 65,536 bytes of validation text, gradient norms by layer are means over the
last twentieth of the steps and before clipping, which is at 1. A run has failed to train when its loss is above 2.9 nats,
about what a byte's frequency tells (3.02), or when it ends in a number that is none. Two learning rates and three seeds an arm.
Hours: 0.1 of one H100 by the clock, 45 of the 54 runs, 15 at a time, on 2026-11-27; 48 layers have the lower rate alone.
Result: nothing diverged; plain post-norm does not train at 48 layers (three of three) and hardly at 24; its gradient fades,
by 5.4 orders of magnitude (5.2 to 5.8) from the last quarter of 48 layers to the first: supports. Its better rate is the lower
one: one lower still is not tried. Against pre-norm DeepNorm is 0.020 nats better at 24 layers (0.003 to 0.030), supports, and
within 0.02 of it at 8 and 48, cannot tell. At 48 both have 3e-3 alone, at which pre-norm leads at 8 and 24.
"""
from mmx.config import ConfigError, default

FORMS = ("deepnorm", "pre", "post")
DEPTHS = (8, 24, 48)
RATES, SEEDS = (3e-3, 1e-2), (0, 1, 2)


def get_config(form="deepnorm", layers=24, lr=3e-3, seed=0):
    if form not in FORMS or int(layers) % 8:
        raise ConfigError(f"{form},{layers} is no arm: give one of {', '.join(FORMS)} and a multiple of 8 layers")
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
