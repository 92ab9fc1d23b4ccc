"""What do dropped tokens cost, and does one capacity for the whole batch drop fewer than one for each shard?

    python experiments/measure/router.py --run router       # a sweep of three seeds, evaluation on held-out text, rows
    mmx train --config experiments/router.py:0 --workdir router-0       # a single run

Protocol: four layers (LLLS, hybrid 3:1), 64 wide, 8 experts of width 64, top-2, auxiliary weight 0.01, trained on bytes of the
embedded corpus without dropping. Then 96 held-out rows of 256 bytes, in random order, are evaluated in batches of 32 with
capacity factors of 1 to 2. The capacity holds for the whole batch (the paper's global router) or for each of 4, 16 or 32
shards of its rows. A token that one layer drops also changes the input of the next layer. The models never dropped tokens in
training; the effect of training with drops was not measured.
Time: 0.3 hours on one core, on 2026-11-27.
Result: supports that a global capacity drops fewer. At a capacity factor of 1.25 it drops 3.85 % of the assignments (2.22 to
5.71). A capacity for each of 32 shards (one row each) drops 4.54 % (3.06 to 6.21): 0.69 percentage points more (0.51 to 0.85),
and a loss that is 0.0010 nats per byte higher (0.0004 to 0.0015). With 4 shards it drops 0.08 points more (0.06 to 0.10), and
the loss is 0.0005 lower (0.0000 to 0.0011). At a factor of 1.0, 32 shards drop 1.07 points more (0.97 to 1.24) and the loss is
0.0083 higher (0.0042 to 0.0115). At 2.0 almost nothing is dropped.
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
