"""Does the critical batch grow as the loss falls? Gradient noise scale against loss, for three model sizes.

    mmx sweep --config experiments/critical_batch.py --out critical_batch --executor inline         # or a single run:
    mmx train --config experiments/critical_batch.py:48,0 --workdir critical-one

Protocol: four layers (LLLS, hybrid 3:1), dense, 32 to 64 wide. The data is the bytes of the embedded corpus. A step has eight
micro-batches of 2 x 128 bytes. The gradient noise scale is the batch size at which noise and gradient are equally large
(McCandlish et al., arXiv 1812.06162, appendix A). It is computed from the gradient norms of the micro-batches and of their
mean, each a root mean square over a twentieth of the run. The learning rate does not decay. The paper doubles its batch at
losses of 2.22, 1.98, 1.77 and 1.58 nats, from the critical batches of models with 50 to 600 M active parameters; the noise
scale is only an estimate of the critical batch.
Time: 0.16 hours for nine runs of one core each, four at a time, on 2026-11-27.
Result: the noise scale is proportional to loss^-2.6 (2.3 to 2.9), the mean of the exponents 2.1 (1.7 to 2.6), 2.6 (2.2 to 3.0)
and 3.1 (2.7 to 3.7) at widths 32, 48 and 64. That it grows supports the paper. The exponent contradicts the paper's, whose four
points follow loss^-6.1. The exponent rises with the width, by 1.0 (0.5 to 2.0) from 32 to 64; larger models were not tested.
"""
from mmx.config import default

DIMS, SEEDS, MICRO = (32, 48, 64), (0, 1, 2), 8


def get_config(dim=48, seed=0, micro=MICRO):
    config = default()
    model, train = config.model, config.train
    model.layers, model.pattern, model.dim = 4, "LLLS", int(dim)
    model.heads = model.kv_heads = int(dim) // 16
    model.head_dim, model.rotary_dim = 16, 8
    model.experts, model.top_k, model.expert_dim, model.aux_weight = 1, 1, 8 * int(dim) // 3, 0.0       # dense
    model.init, model.embed_std = "fan_in", 1.0
    train.batch, train.length, train.steps = 2, 128, 400
    train.ramp = ((0, int(micro)),)
    train.lr, train.warmup, train.decay = 3e-3, 40, 0.0
    train.eval_bytes = 2**15
    train.seed = config.data.seed = int(seed)
    train.tensorboard = False
    config.checkpoint.every = train.steps
    config.mesh.edp = 1
    return config


def sweep():
    return [{"dim": dim, "micro": MICRO, "seed": seed} for seed in SEEDS for dim in DIMS]
