"""One model for both: does a small ViT before a small hybrid answer about pictures, and read words, that it was never shown?

    mmx train --config experiments/vl_tiny.py --workdir vl --config.train.seconds=1140
    mmx eval --checkpoint vl --suite vision

Generated pictures of 84 x 84 pixels (mmx/data/scenes.py). Without train.seconds it is 6,000 steps.
Result on 2 CPU cores, 2026-11-27: 12,554 steps in 1,140 s; of 500 held-out questions a kind (--examples 500) right with the
picture, and blind: count 87 and 17 %, colour 95 and 19 %, shape 100 and 19 %, side 81 and 53 %, together 90.6 and 27 %;
of held-out words' letters 99.3 and 0 %. vl_tiny.png has questions and answers.
Two kinds of question were not learned in that time: how many of both a shape and a colour, whose one held-out answer for each
pair was never given (17 %), and whether one object is left or right of another (52 %); they are asked so no longer.
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
    vision.tile, vision.patch = 84, 14      # 6 x 6 patches: a letter is one across, an object two by two
    vision.grids = ()                       # the whole picture is one tile
    vision.token = 259                      # a spare id of the byte tokenizer

    train.steps, train.batch, train.length = 6000, 4, 256       # two or three pictures a row
    train.lr, train.warmup, train.decay = 3e-3, 100, 0.5
    train.tensorboard = False
    data.sources = ("maps", "words", "scenes")          # what there is to see first, questions about it then
    data.weights = ((0, (0.5, 0.4, 0.1)), (1000, (0.1, 0.15, 0.75)))
    config.mesh.edp = -1                    # two simulated devices on two cores
    return config
