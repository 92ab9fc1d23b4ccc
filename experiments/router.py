"""What do dropped tokens cost, and does one capacity for all shards of a batch drop fewer than one for each? On real routing.

    python experiments/measure/router.py --run router        # mmx sweep of three seeds, readings of held-out text, rows; or one:
    mmx train --config experiments/router.py:0 --workdir router-0

Protocol: four layers LLLS, 64 wide, 8 experts of 64, top-2, aux 0.01, trained on bytes of the embedded corpus without dropping;
then 96 rows of 256 held-out bytes, in random order, are read in batches of 32 with capacity factors of 1 to 2, over the whole
batch (the paper's global router) and over each of 4, 16 and 32 shards of its rows by itself. What is dropped by one layer is
missed by the next. The model never met a drop in training: what a run that trains with drops would lose is not asked here.
Hours: 0.3 of a core, on 2026-11-27.
Result: supports that fewer are dropped. At a capacity factor of 1.25 the whole batch's capacity drops 3.85 % of the assignments
(2.22 to 5.71), that of 32 shards of a row each 4.54 % (3.06 to 6.21), 0.69 points more (0.51 to 0.85), which costs 0.0010 nats
a byte (0.0004 to 0.0015), that of 4 shards 0.08 points more (0.06 to 0.10), with a loss that is no higher (0.0005
lower, 0.0000 to 0.0011). At 1.0 32 shards drop 1.07 points more (0.97 to 1.24) and cost 0.0083 nats (0.0042 to
0.0115), at 2.0 next to nothing is dropped by any.
"""
from mmx.config import default


def get_config(seed=0):
    config = default()
    model, train, data = config.model, config.train, config.data
    model.layers, model.pattern, model.dim = 4, "LLLS", 64
    model.heads = model.kv_heads = 4
    model.head_dim, model.rotary_dim = 16, 8
    model.experts, model.top_k, model.expert_dim = 8, 2, 64
    model.init, model.embed_std = "fan_in", 1.0
    train.batch, train.length, train.steps = 8, 256, 500
    train.lr, train.warmup, train.decay = 5e-3, 50, 0.5
    train.seed = data.seed = int(seed)
    train.tensorboard = False
    config.checkpoint.every = train.steps
    config.mesh.edp = 1
    return config


def sweep():
    return {"seed": (0, 1, 2)}
