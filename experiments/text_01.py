"""MiniMax-Text-01: the released geometry and the paper's recipe (arXiv 2501.08313, section 4.2), stage by stage, on four pods.

    mmx config experiments/text_01.py                       # 456.09 B parameters, 45.94 B active without embedding and head
    mmx config experiments/text_01.py:v5p-512,1m            # a pod, a stage, or both
    mmx aot --config experiments/text_01.py:v5p-512 --topology v5p:8x8x8

    pods      v5p-512 (v5p:8x8x8), v5p-2048 (v5p:8x16x16; the default), v6e-256 (v6e:16x16), h100-512 (h100:64x8); in chips
    stages    8k (pre-training, the default), 128k, 512k, 1m; each starts from the final parameters of the stage before

We did not train this model. The file documents shapes, counts and schedules; docs/scale.md lists what compiles and fits. On the
meshes tried there, v6e-256 runs out of memory. The report trained on 1,500 to 2,500 H800. Its corpus and tokenizer are not
public: data.sources and data.tokenizer are paths to your own.
In the comments, "P" is the paper, "R" the released config.json, and "ours" is our choice where neither states a value.
"""
from mmx.config import ConfigError, default

PODS = {        # ours: (edp, ep, etp, seq) by stage. One row of a micro-batch for each device of edp x ep; 8,192 tokens per
                # chip (v6e: 2,048, and 4,096 at 1m). Experts are sharded over devices with different rows (H100: within a host)
    "v5p-512": {"8k": (16, 32, 1, 1), "128k": (1, 32, 1, 16), "512k": (1, 8, 1, 64), "1m": (1, 4, 1, 128)},
    "v5p-2048": {"8k": (64, 32, 1, 1), "128k": (4, 32, 1, 16), "512k": (1, 32, 1, 64), "1m": (1, 16, 1, 128)},
    "v6e-256": {"8k": (2, 32, 1, 4), "128k": (1, 4, 4, 16), "512k": (1, 1, 16, 16), "1m": (1, 1, 16, 16)},
    "h100-512": {"8k": (64, 8, 1, 1), "128k": (4, 8, 1, 16), "512k": (1, 8, 1, 64), "1m": (1, 4, 1, 128)},
}
STAGES = {      # P Table 6: tokens per row, RoPE base, total tokens, % of short, medium and long documents
    "128k": (131_072, 5e6, 300_000_000_000, (30, 70, 0)),
    "512k": (524_288, 1e7, 32_000_000_000, (35, 35, 30)),
    "1m": (1_048_576, 1e7, 26_000_000_000, (30, 30, 40)),
}
STEP = 2 ** 27      # tokens per step; P 4.2: at the end of pre-training; ours: in the later stages


def get_config(*words):
    pod, stage = parse_words(words)
    config = default()
    model, train, data, mesh = config.model, config.train, config.data, config.mesh

    model.vocab = 200_064               # R
    model.dim = 6_144                   # P 2, R
    model.layers = 80                   # P 2, R
    model.pattern = "LLLLLLLS"          # P 2: one softmax layer after every seven lightning layers
    model.heads = 64                    # P 2, R
    model.kv_heads = 8                  # P 2: group size 8
    model.head_dim = 128                # P 2, R
    model.rotary_dim = 64               # P 2: half of the head
    model.rope_theta = 10_000.0         # P 2, at pre-training
    model.experts = 32                  # P 2, R
    model.top_k = 2                     # P 2, R
    model.expert_dim = 9_216            # P 2, R
    model.capacity = 1.25               # ours: the paper drops tokens but does not state its capacity
    model.transport = 1.25              # ours: all-to-all buffers a quarter larger than the even share
    model.token_groups = 8              # ours: the paper's figures show 2 and 4
    model.aux, model.aux_weight = "paper", 0.01     # P 2.2.3, 4.2: alpha (1/E) sum f m
    model.norm_eps = 1e-5               # R
    model.context = 10_240_000          # R: max_position_embeddings
    model.init = "deepnorm"             # P 4.2: Xavier, DeepNorm alpha (2 layers)^(1/4), beta (8 layers)^(-1/4)
    model.embed_std = 0.02              # R: initializer_range
    model.dtype = "bfloat16"            # ours: bfloat16 computation over float32 master weights
    model.remat = True                  # ours: activations are recomputed layer by layer

    mesh.edp, mesh.ep, mesh.etp, mesh.seq = PODS[pod][stage]
    chips = mesh.edp * mesh.ep * mesh.etp * mesh.seq
    train.batch = mesh.edp * mesh.ep    # ours: one row of a micro-batch for each device of edp x ep
    train.length = 8_192                # P 4.2
    first = 2 ** 24 // (train.batch * train.length)     # P 4.2: 16M tokens per step, doubled three times to 128M
    train.ramp = ((0, first), (69_000_000_000, 2 * first), (790_000_000_000, 4 * first), (4_700_000_000_000, 8 * first))
    train.steps = 133_784               # P 4.2: 7.2T + 3.2T + 1T tokens with this ramp
    train.schedule = "stepwise"
    train.warmup = 500                  # P 4.2: steps, linear
    train.rates = ((0, 2e-4), (7_200_000_000_000, 1.3e-4))      # P 4.2: lowered when gradient norms grew
    train.lr = 2e-4                     # P 4.2: the peak
    train.decay = 1.0 / 11.4            # P 4.2: the last 1T tokens
    train.decay_form = "exponential"    # P 4.2
    train.lr_end = 3e-5                 # P 4.2
    train.beta1, train.beta2 = 0.9, 0.95        # P 4.2
    train.weight_decay = 0.1            # P 4.2
    train.eps, train.clip = 1e-8, 1.0   # ours: P does not state them
    train.loss_chunk = 1_024 * chips    # rows of logits at a time: 0.8 GB of float32 per chip

    data.sources = ("corpus",)          # yours: a folder of .txt and .jsonl
    data.tokenizer = "tokenizer.json"   # yours: byte-level BPE of 200,064 tokens
    data.shards = 2_048                 # virtual shards: the most hosts that can share the data

    config.checkpoint.every = 500       # ours
    return add_long_context(config, stage) if stage in STAGES else config


def add_long_context(config, stage):
    """Returns the config with the changes of a long-context stage."""
    model, train, data = config.model, config.train, config.data
    names = ["8k", *STAGES]
    previous = names[names.index(stage) - 1]
    train.length, model.rope_theta, tokens, mix = STAGES[stage]     # P Table 6
    train.init_from = previous            # yours: the workdir of the previous stage
    train.ramp = ((0, STEP // (train.batch * train.length)),)
    train.steps = steps = -(-tokens // STEP)
    train.schedule, train.decay, train.warmup = "wsd", 0.0, 10      # ours: the final rate of pre-training, with a new warm-up
    train.lr = train.lr_end = 3e-5

    # P 4.2: short documents have less than 32K tokens, long ones more than 128K. In the last fifth of a stage, 10 % of the
    # data is long-context question answering. The weights of the sources change linearly at transitions.
    data.sources = ("corpus", "corpus", "corpus", "questions")      # yours: paths
    data.lengths = ((0, 32_768), (32_768, 131_073), (131_073, 0), (0, 0))
    old = STAGES[previous][3] if previous in STAGES else (100, 0, 0)    # ours: pre-training, with rows of 8,192 tokens
    transition, questions = steps // 20, steps * 4 // 5                      # ours: a transition takes a twentieth of the stage
    data.interpolate = True
    data.weights = ((0, (*old, 0)), (transition, (*mix, 0)), (questions, (*mix, 0)),
                    (questions + transition, (*(0.9 * share for share in mix), 10)))
    config.checkpoint.every = 50        # ours
    return config


def parse_words(words):
    """Returns the pod and the stage named in `words`, such as ("v5p-512", "1m"); each has a default."""
    chosen = {"pod": "v5p-2048", "stage": "8k"}
    for word in filter(None, words):
        kind = "pod" if word in PODS else "stage" if word in ("8k", *STAGES) else None
        if not kind:
            raise ConfigError(f"{word!r} is neither a pod ({', '.join(PODS)}) nor a stage (8k, {', '.join(STAGES)})")
        chosen[kind] = word
    return chosen.values()
