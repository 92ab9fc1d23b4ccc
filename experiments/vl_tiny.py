"""A small vision-language model: does a small ViT with a small hybrid answer questions about new pictures, and read new words?

    mmx train --config experiments/vl_tiny.py --workdir vl --config.train.seconds=1140
    mmx eval --checkpoint vl --suite vision

The pictures are generated, 84 x 84 pixels (mmx/data/scenes.py). Without train.seconds the run has 6,000 steps.
Result on 2 CPU cores, 2026-11-27: 12,554 steps in 1,140 s. Correct answers to 500 held-out questions of each kind (--examples
500), with the picture and without it: count 87 and 17 %, colour 95 and 19 %, shape 100 and 19 %, side 81 and 53 %, all
together 90.6 and 27 %; letters of held-out words 99.3 and 0 %. results/vl_tiny.png shows questions and answers.
Two kinds of questions were not learned in that time and were removed: how many objects have a given shape and colour (17 %;
the one held-out answer for each pair never occurs in training), and whether one object is left or right of another (52 %).
"""
from mmx.config import default


def get_config():
    config = default()
    model, vision, train, data = config.model, config.model.vision, config.train, config.data
    model.dim, model.layers, model.pattern = 64, 4, "LSLS"
    model.heads, model.kv_heads, model.head_dim, model.rotary_dim = 2, 2, 32, 16
    model.experts, model.top_k, model.expert_dim, model.aux_weight = 1, 1, 128, 0.0
    model.init, model.embed_std = "fan_in", 1.0

    vision.layers, vision.dim, vision.heads, vision.hidden = 2, 64, 4, 256
    vision.tile, vision.patch = 84, 14      # 6 x 6 patches: a letter is one patch wide, an object 2 x 2
    vision.grids = ()                       # the whole picture is one tile
    vision.token = 259                      # a spare id of the byte tokenizer

    train.steps, train.batch, train.length = 6000, 4, 256       # two or three pictures per row
    train.lr, train.warmup, train.decay = 3e-3, 100, 0.5
    train.tensorboard = False
    data.sources = ("maps", "words", "scenes")          # first what a picture contains, then questions about it
    data.weights = ((0, (0.5, 0.4, 0.1)), (1000, (0.1, 0.15, 0.75)))
    config.mesh.edp = -1                    # two simulated devices on two cores
    return config
