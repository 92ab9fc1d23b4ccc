"""MiniMax-Text-01: the released geometry and the paper's pre-training recipe (arXiv 2501.08313, section 4.2).

    mmx config experiments/text_01.py       # 456.09 B parameters, 45.94 B active without embedding and head

Not run here: it is the reference for shapes, counts and schedules. The report trained on 1,500 to 2,500 H800. Its corpus
and tokenizer are not public: data.sources and data.tokenizer below are paths to your own.
"P" is the paper, "R" the released config.json, "ours" a choice where neither states one.
"""
from mmx.config import default


def get_config():
    config = default()
    model, train, data = config.model, config.train, config.data

    model.vocab = 200_064               # R
    model.dim = 6_144                   # P 2, R
    model.layers = 80                   # P 2, R
    model.pattern = "LLLLLLLS"          # P 2: one softmax layer after every seven lightning layers
    model.heads = 64                    # P 2, R
    model.kv_heads = 8                  # P 2: group size 8
    model.head_dim = 128                # P 2, R
    model.rotary_dim = 64               # P 2: half of the head
    model.rope_theta = 10_000.0         # P 2, at pre-training; the released weights after the long-context stages: 1e7
    model.experts = 32                  # P 2, R
    model.top_k = 2                     # P 2, R
    model.expert_dim = 9_216            # P 2, R
    model.capacity = 1.25               # ours: the paper drops tokens, at a capacity it does not state
    model.aux, model.aux_weight = "paper", 0.01     # P 2.2.3, 4.2: alpha (1/E) sum f m
    model.norm_eps = 1e-5               # R
    model.context = 10_240_000          # R: max_position_embeddings
    model.init = "deepnorm"             # P 4.2: Xavier, DeepNorm alpha (2 layers)^(1/4), beta (8 layers)^(-1/4)
    model.embed_std = 0.02              # R: initializer_range
    model.dtype = "bfloat16"            # ours: bfloat16 computation over float32 master weights
    model.remat = True                  # ours: activations are recomputed layer by layer

    train.length = 8_192                # P 4.2
    train.batch = 2_048                 # P 4.2: 16M tokens a step, one micro-batch at the start
    train.ramp = ((0, 1), (69_000_000_000, 2), (790_000_000_000, 4), (4_700_000_000_000, 8))    # P 4.2: to 128M
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
    train.eps, train.clip = 1e-8, 1.0   # ours: not stated
    train.loss_chunk = 8_192            # rows of logits at a time: 6.6 GB in float32 whole, spread over the mesh

    data.sources = ("corpus",)          # yours: a folder of .txt and .jsonl
    data.tokenizer = "tokenizer.json"   # yours: byte-level BPE of 200,064 tokens
    data.shards = 2_048                 # virtual shards, for up to as many hosts

    config.checkpoint.every = 500       # ours
    return config
