"""The paper's model ladder: softmax, lightning and hybrid models, dense, 70M to 7B, compared by loss over FLOPs.

    mmx config experiments/ladder.py:softmax,410M           # parameters, FLOPs
    mmx sweep --config experiments/ladder.py --out ladder --executor slurm --slurm partition=gpu,gpus_per_node=8

Question: which architecture has the lowest loss at equal FLOPs? Protocol: 300B tokens for each model, rows of 8,192 tokens, 4M
tokens per step, one fixed learning rate for all. The training loss is used in place of the test loss.
We did not train these models. The file documents shapes, counts and schedules. The FLOPs of a step, counted by
`flops_companion`, equal the published ones. Corpus and tokenizer are not public: data.sources and data.tokenizer are paths to
your own. In the comments, "P" is the paper (arXiv 2501.08313, section 2.2.2) and "S" its companion (arXiv 2406.16690, Table 7),
which has the same softmax and lightning runs. "Ours" is our choice where neither states a value. Our blocks are those of
MiniMax-01: DeepNorm, and a full-rank gate.
"""
from mmx.config import ConfigError, default

ARCHITECTURES = ("softmax", "lightning", "hybrid")
SIZES = {       # S: layers, width, heads, dense feed-forward width; the head dim is 128
    "70M": (6, 512, 4, 1_536), "160M": (12, 768, 6, 2_048), "410M": (26, 1_024, 8, 2_816),
    "1B": (32, 1_536, 12, 4_096),       # S prints 16 and 5,632, but its FLOPs need 12 heads, its 906.2M parameters 4,096
    "3B": (35, 2_560, 20, 6_912), "7B": (32, 4_096, 32, 11_008),
}


def get_config(arch="hybrid", size="410M"):
    if arch not in ARCHITECTURES or size not in SIZES:
        raise ConfigError(f"unknown model {arch},{size}: give one of {', '.join(ARCHITECTURES)} and one of {', '.join(SIZES)}")
    config = default()
    model, train, data = config.model, config.train, config.data

    model.layers, model.dim, model.heads, model.expert_dim = SIZES[size]
    if (arch, size) == ("lightning", "410M"):
        model.layers = 25               # S
    model.pattern = {"softmax": "S", "lightning": "L", "hybrid": hybrid_pattern(model.layers)}[arch]
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


def hybrid_pattern(layers):
    """Returns a pattern with a softmax layer after every seven lightning layers (P); below 8 layers the last one (ours)."""
    return "".join("S" if i % 8 == 7 or i == layers - 1 < 7 else "L" for i in range(layers))


def sweep():
    return {"arch": ARCHITECTURES, "size": tuple(SIZES)}
