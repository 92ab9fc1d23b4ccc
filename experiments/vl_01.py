"""MiniMax-VL-01: the released geometry and the report's stages of training (arXiv 2501.08313, section 6), on four pods.

    mmx config experiments/vl_01.py:full                    # a stage, a pod, or both
    mmx aot --config experiments/vl_01.py:v5p-512,full --topology v5p:8x8x8

    stages    vit-224, vit-336  the ViT alone, on images with captions, by a contrastive loss and by predicting the caption
              align             (stage I, the default) ViT and projector train; an image is one tile of 336 pixels
              full              (stage II) all parameters train; images have several tiles
              long              (stage III) longer sequences
              Each stage starts from the result of the stage before; align starts from MiniMax-Text-01 and the ViT.
    pods      v5p-512, v5p-2048 (the default), v6e-256, h100-512, as in text_01.py

We did not train this model. The file documents shapes, counts and schedules; docs/scale.md lists what compiles and fits. Stage
IV (DPO) is not implemented. The report does not state learning rates, batch sizes or sequence lengths. The data is not public:
data.sources are paths to your own.
In the comments, "P" is the paper, "R" the released config.json, and "ours" is our choice where neither states a value.
"""
from mmx.config import ConfigError, default

PODS = {        # ours: (edp, ep, etp, seq) by stage, with the tokens per chip of text_01.py
    "v5p-512": {"vit": (512, 1, 1, 1), "align": (16, 32, 1, 1), "full": (8, 32, 1, 2), "long": (1, 32, 1, 16)},
    "v5p-2048": {"vit": (2048, 1, 1, 1), "align": (64, 32, 1, 1), "full": (32, 32, 1, 2), "long": (4, 32, 1, 16)},
    "v6e-256": {"vit": (256, 1, 1, 1), "align": (2, 32, 1, 4), "full": (1, 32, 1, 8), "long": (1, 4, 4, 16)},
    "h100-512": {"vit": (512, 1, 1, 1), "align": (64, 8, 1, 1), "full": (32, 8, 1, 2), "long": (4, 8, 1, 16)},
}
STAGES = {      # P: total tokens; ours: tokens per row (the largest image has 11,088), peak learning rate, warm-up steps
    "align": (80_000_000_000, 8_192, 1e-4, 500),
    "full": (420_000_000_000, 16_384, 2e-5, 500),
    "long": (44_800_000_000, 131_072, 1e-5, 50),
}
PAIRS = {       # P 6.1: image side in pixels, total pairs; ours: pairs in a row of 2,048 tokens (a caption takes 2 x 76)
    "vit-224": (224, 37_000_000_000, 4),
    "vit-336": (336, 1_200_000_000, 2),
}
STEP = 2 ** 24      # ours: tokens per step


def get_config(*words):
    pod, stage = parse_words(words)
    config = default()
    model, vision, train, mesh = config.model, config.model.vision, config.train, config.mesh
    mesh.edp, mesh.ep, mesh.etp, mesh.seq = PODS[pod]["vit" if stage in PAIRS else stage]
    chips = mesh.edp * mesh.ep * mesh.etp * mesh.seq

    model.vocab = 200_064               # R
    model.norm_eps = 1e-5               # R
    model.dtype, model.remat = "bfloat16", True                 # ours
    vision.layers, vision.dim, vision.heads, vision.hidden = 24, 1_024, 16, 4_096       # P 6.1: ViT-L/14, 303 M
    vision.tile, vision.patch, vision.norm_eps = 336, 14, 1e-5  # P 6.1, R
    vision.token = 200_025                                      # R
    train.schedule = "cosine"           # ours
    train.beta1, train.beta2, train.weight_decay, train.eps, train.clip = 0.9, 0.95, 0.1, 1e-8, 1.0     # ours, as in text_01.py
    train.loss_chunk = 1_024 * chips    # rows of logits at a time: 0.8 GB of float32 per chip
    config.data.tokenizer = "tokenizer.json"        # yours
    config.data.shards = 2_048          # virtual shards: the most hosts that can share the data
    config.checkpoint.every = 100       # ours
    set_vit_stage(config, stage) if stage in PAIRS else set_full_stage(config, stage)
    train.lr_end = train.lr / 10        # ours
    return config


def set_vit_stage(config, stage):
    """Sets a stage that trains the ViT with a caption decoder; later stages use the ViT only."""
    model, train = config.model, config.train
    model.dim, model.layers, model.pattern = 1_024, 12, "S"     # ours: as wide as the ViT, half as deep
    model.heads, model.kv_heads, model.head_dim, model.rotary_dim = 16, 16, 64, 32
    model.experts, model.top_k, model.expert_dim = 1, 1, 2_816
    model.context = train.length = 2_048
    tile, pairs, row = PAIRS[stage]
    model.vision.tile, model.vision.grids = tile, ()
    train.contrastive = 0.5             # P 6.1: CoCa; the weight is that of its paper
    train.batch = 16_384                # ours: 65,536 pairs per step, as in CoCa; half as many at 336 pixels
    train.steps = pairs // (train.batch * row)
    train.lr, train.warmup = 5e-4, 2_000            # ours
    train.init_vision = "vit-224" if stage == "vit-336" else ""         # yours: a workdir
    config.data.sources = ("pairs",)    # yours: images and captions, cut to 76 tokens (P 6.1)


def set_full_stage(config, stage):
    """Sets a stage that trains with the whole model."""
    model, train, mesh = config.model, config.train, config.mesh
    model.dim, model.layers, model.pattern = 6_144, 80, "LLLLLLLS"                      # R, as MiniMax-Text-01
    model.heads, model.kv_heads, model.head_dim, model.rotary_dim = 64, 8, 128, 64      # R
    model.experts, model.top_k, model.expert_dim = 32, 2, 9_216                         # R
    model.rope_theta, model.context = 10_000_000.0, 8_192       # R
    model.capacity, model.transport, model.token_groups = 1.25, 1.25, 8                 # ours
    model.aux, model.aux_weight = "paper", 0.01                 # P 2.2.3, 4.2
    if stage == "align":
        model.vision.grids = ()         # P 6.3: images at a fixed 336 x 336
        train.freeze = ("embed_WD", "groups", "norm_D", "head_WD")      # P 6.3: ViT and adapter train
        train.init_vision = "vit-336"   # yours: a workdir

    tokens, train.length, train.lr, train.warmup = STAGES[stage]
    train.batch = mesh.edp * mesh.ep    # ours: one row of a micro-batch for each device of edp x ep
    train.ramp = ((0, STEP // (train.batch * train.length)),)
    train.steps = -(-tokens // STEP)
    names = ["text-01", *STAGES]        # yours: the workdir of the previous stage; at first Text-01
    train.init_from = names[names.index(stage) - 1]
    config.data.sources = {"align": ("captions",), "full": ("multimodal", "text"), "long": ("long",)}[stage]    # yours: paths
    config.data.weights = ((0, (20, 1)),) if stage == "full" else ()    # P 6.3: 20 : 1


def parse_words(words):
    """Returns the pod and the stage named in `words`, such as ("v5p-512", "full"); each has a default."""
    chosen, stages = {"pod": "v5p-2048", "stage": "align"}, (*PAIRS, *STAGES)
    for word in filter(None, words):
        kind = "pod" if word in PODS else "stage" if word in stages else None
        if not kind:
            raise ConfigError(f"{word!r} is neither a pod ({', '.join(PODS)}) nor a stage ({', '.join(stages)})")
        chosen[kind] = word
    return chosen.values()
