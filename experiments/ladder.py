"""The published ladder: softmax, lightning and hybrid, dense, 70M to 7B, whose losses over FLOPs chose the architecture.

    mmx config experiments/ladder.py:softmax,410M           # parameters, FLOPs
    mmx sweep --config experiments/ladder.py --out ladder --executor slurm --slurm partition=gpu,gpus_per_node=8

Question: which architecture has the lower loss at equal FLOPs? Protocol: 300B tokens each, rows of 8,192 tokens, 4M tokens a
step, one fixed learning rate for all; the training loss stands for the test loss.
Not run here: it is the reference for shapes, counts and schedules. The FLOPs of a step are those printed, with
`Model.flops_companion`. Corpus and tokenizer are not public: data.sources and data.tokenizer below are paths to your own.
"P" is the paper (arXiv 2501.08313, section 2.2.2), "S" its companion (2406.16690, Table 7), which has the same softmax and
lightning runs; "ours" is a choice where neither states one. Our blocks are MiniMax-01's: DeepNorm, and a gate of full rank.
"""
from mmx.config import ConfigError, default

ARCHITECTURES = ("softmax", "lightning", "hybrid")
SIZES = {       # S: layers, width, heads, width of the dense feed-forward part; head dim 128
    "70M": (6, 512, 4, 1_536), "160M": (12, 768, 6, 2_048), "410M": (26, 1_024, 8, 2_816),
    "1B": (32, 1_536, 12, 4_096),       # S prints 16 and 5,632; its FLOPs say 12 heads, its 906.2M parameters 4,096
    "3B": (35, 2_560, 20, 6_912), "7B": (32, 4_096, 32, 11_008),
}


def get_config(arch="hybrid", size="410M"):
    if arch not in ARCHITECTURES or size not in SIZES:
        raise ConfigError(f"{arch},{size} is no rung: give one of {', '.join(ARCHITECTURES)} and one of {', '.join(SIZES)}")
    config = default()
    model, train, data = config.model, config.train, config.data

    model.layers, model.dim, model.heads, model.expert_dim = SIZES[size]
    if (arch, size) == ("lightning", "410M"):
        model.layers = 25               # S
    model.pattern = {"softmax": "S", "lightning": "L", "hybrid": hybrid(model.layers)}[arch]
    model.vocab = 100_280               # S: tiktoken
    model.kv_heads, model.head_dim, model.rotary_dim = model.heads, 128, 128        # S
    model.experts, model.top_k = 1, 1   # dense
    model.init = "deepnorm"             # ours, as MiniMax-01
    model.dtype, model.remat = "bfloat16", True     # ours

    train.batch, train.length = 480, 8_192          # S: 480 rows
    train.steps = 76_294                # P: up to 300B tokens
    train.lr = train.lr_end = 3e-4      # P: fixed
    train.decay, train.warmup = 0.0, 500            # P: no decay; ours: the warm-up
    train.weight_decay = 0.1            # P

    data.sources = ("corpus",)          # yours: a folder of .txt and .jsonl
    data.tokenizer = "tokenizer.json"   # yours: byte-level BPE
    data.shards = 480
    return config


def hybrid(layers):
    """One softmax layer after every seven lightning layers (P); ours: the last of fewer than eight."""
    return "".join("S" if i % 8 == 7 or i == layers - 1 < 7 else "L" for i in range(layers))


def sweep():
    return {"arch": ARCHITECTURES, "size": tuple(SIZES)}
