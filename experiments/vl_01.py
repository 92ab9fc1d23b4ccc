"""MiniMax-VL-01: the released geometry and the report's stages of training (arXiv 2501.08313, section 6), on four pods.

    mmx config experiments/vl_01.py:full                    # a stage, a pod, or both
    mmx aot --config experiments/vl_01.py:v5p-512,full --topology v5p:8x8x8

    stages    vit-224, vit-336 (the ViT, by captions: contrastive, and to be told), align (I: ViT and projector learn, an image
              is one tile of 336; the default), full (II: all parameters, images as tiles), long (III); each starts from what
              the one before it left, align from MiniMax-Text-01 and the ViT
    pods      v5p-512, v5p-2048 (the default), v6e-256, h100-512, as in text_01.py

Not run here: it is the reference for shapes, counts and schedules; what compiles and fits stands in docs/scale.md. Stage IV,
DPO, is not built. Neither rates nor batches nor lengths are stated. The data is not public: data.sources are paths to your own.
"P" is the paper, "R" the released config.json, "ours" a choice where neither states one.
"""
from mmx.config import ConfigError, default

PODS = {        # ours: (edp, ep, etp, seq) by stage, as in text_01.py, with as many tokens a chip
    "v5p-512": {"vit": (512, 1, 1, 1), "align": (16, 32, 1, 1), "full": (8, 32, 1, 2), "long": (1, 32, 1, 16)},
    "v5p-2048": {"vit": (2048, 1, 1, 1), "align": (64, 32, 1, 1), "full": (32, 32, 1, 2), "long": (4, 32, 1, 16)},
    "v6e-256": {"vit": (256, 1, 1, 1), "align": (2, 32, 1, 4), "full": (1, 32, 1, 8), "long": (1, 4, 4, 16)},
    "h100-512": {"vit": (512, 1, 1, 1), "align": (64, 8, 1, 1), "full": (32, 8, 1, 2), "long": (4, 8, 1, 16)},
}
STAGES = {      # P: tokens in all; ours: tokens a row (the largest image is 11,088), the peak rate, warm-up
    "align": (80_000_000_000, 8_192, 1e-4, 500),
    "full": (420_000_000_000, 16_384, 2e-5, 500),
    "long": (44_800_000_000, 131_072, 1e-5, 50),
}
PAIRS = {       # P 6.1: pixels of an image, pairs in all; ours: pairs of a row of 2,048 tokens (captions of 76 tokens, twice)
    "vit-224": (224, 37_000_000_000, 4),
    "vit-336": (336, 1_200_000_000, 2),
}
STEP = 2 ** 24      # tokens a step, ours


def get_config(*words):
    pod, stage = read(words)
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
    train.beta1, train.beta2, train.weight_decay, train.eps, train.clip = 0.9, 0.95, 0.1, 1e-8, 1.0     # ours: Text-01's
    train.loss_chunk = 1_024 * chips    # rows of logits at a time: 0.8 GB of float32 a chip
    config.data.tokenizer = "tokenizer.json"        # yours
    config.data.shards = 2_048          # virtual shards, for up to as many hosts
    config.checkpoint.every = 100       # ours
    look(config, stage) if stage in PAIRS else read_on(config, stage)
    train.lr_end = train.lr / 10        # ours
    return config


def look(config, stage):
    """The ViT's own training, beside a decoder of captions that is dropped."""
    model, train = config.model, config.train
    model.dim, model.layers, model.pattern = 1_024, 12, "S"     # ours: as wide as the ViT, half as deep
    model.heads, model.kv_heads, model.head_dim, model.rotary_dim = 16, 16, 64, 32
    model.experts, model.top_k, model.expert_dim = 1, 1, 2_816
    model.context = train.length = 2_048
    tile, pairs, row = PAIRS[stage]
    model.vision.tile, model.vision.grids = tile, ()
    train.contrastive = 0.5             # P 6.1: CoCa, whose proportion this is
    train.batch = 16_384                # ours: 65,536 pairs a step, CoCa's; at 336 half as many
    train.steps = pairs // (train.batch * row)
    train.lr, train.warmup = 5e-4, 2_000            # ours
    train.init_vision = "vit-224" if stage == "vit-336" else ""         # yours: a workdir
    config.data.sources = ("pairs",)    # yours: images and captions, cut to 76 tokens (P 6.1)


def read_on(config, stage):
    """A stage of the whole model."""
    model, train, mesh = config.model, config.train, config.mesh
    model.dim, model.layers, model.pattern = 6_144, 80, "LLLLLLLS"                      # R, as MiniMax-Text-01
    model.heads, model.kv_heads, model.head_dim, model.rotary_dim = 64, 8, 128, 64      # R
    model.experts, model.top_k, model.expert_dim = 32, 2, 9_216                         # R
    model.rope_theta, model.context = 10_000_000.0, 8_192       # R
    model.capacity, model.transport, model.token_groups = 1.25, 1.25, 8                 # ours
    model.aux, model.aux_weight = "paper", 0.01                 # P 2.2.3, 4.2
    if stage == "align":
        model.vision.grids = ()         # P 6.3: images at a fixed 336 x 336
        train.freeze = ("embed_WD", "groups", "norm_D", "head_WD")      # P 6.3: ViT and adapter learn
        train.init_vision = "vit-336"   # yours: a workdir

    tokens, train.length, train.lr, train.warmup = STAGES[stage]
    train.batch = mesh.edp * mesh.ep    # ours: one row of a micro-batch for each of the mesh's
    train.ramp = ((0, STEP // (train.batch * train.length)),)
    train.steps = -(-tokens // STEP)
    names = ["text-01", *STAGES]        # yours: the workdir of the stage before; the first: Text-01's
    train.init_from = names[names.index(stage) - 1]
    config.data.sources = {"align": ("captions",), "full": ("multimodal", "text"), "long": ("long",)}[stage]    # yours: paths
    config.data.weights = ((0, (20, 1)),) if stage == "full" else ()    # P 6.3: 20 : 1


def read(words):
    """The pod and the stage among ("v5p-512", "full"): either may be left out."""
    chosen, stages = {"pod": "v5p-2048", "stage": "align"}, (*PAIRS, *STAGES)
    for word in filter(None, words):
        kind = "pod" if word in PODS else "stage" if word in stages else None
        if not kind:
            raise ConfigError(f"{word!r} is no pod ({', '.join(PODS)}) and no stage ({', '.join(stages)})")
        chosen[kind] = word
    return chosen.values()
