"""What an experiment is: frozen dataclasses, built once from a ConfigDict at the door.

An experiment file's `get_config()` starts from `default()` and sets what it changes; the package never sees the
ConfigDict again after `build`. Counts (parameters, FLOPs, checkpoint tensors) are properties: derived, not repeated.
Imports no jax, so that data, scaling and a laptop without a device can read any config.
"""
import bisect
import dataclasses
import difflib
import itertools
import json
import math
import re

from ml_collections import ConfigDict

AUX_FORMS = ("switch", "paper", "hf")
SCHEDULES = ("wsd", "cosine", "stepwise")
INITS = ("deepnorm", "xavier", "fan_in")
NUMBERS = "numbers:"            # a tokenizer without a file, before how many ids it has
MOST_LAYERS, MOST_HEADS, MOST_PIXELS = 10_000, 65_536, 1 << 26      # of a model, and of the tiles that an image is cut into
MOST = 1 << 40                  # of any whole number
HERE = ("impl", "chunk", "remat", "keep_arrived", "token_groups", "ragged")     # of a model: how it is computed, not what


class ConfigError(ValueError):
    """A mistake in a config that the user can mend; the message is one line."""
    code = 2        # of the process that it ends


GRIDS = tuple((rows, columns) for rows in range(1, 7) for columns in range(1, (6, 6, 6, 4, 3, 3)[rows - 1] + 1))


@dataclasses.dataclass(frozen=True)
class Vision:
    """MiniMax-VL-01's image side (model.md section 8): a ViT of each tile, a projector of two layers. The released one has
    24 layers; none: a model of text alone."""
    layers: int = 0
    dim: int = 1024                 # J
    heads: int = 16                 # A
    hidden: int = 4096              # U, of the ViT's MLPs
    tile: int = 336                 # Y = X, pixels
    patch: int = 14                 # pixels; (tile / patch)^2 patches a tile
    # (rows, columns) of tiles to choose from; none: the whole image as one tile
    grids: tuple = dataclasses.field(default=GRIDS, repr=False)
    norm_eps: float = 1e-5
    token: int = 200_025            # stands in a text for each place of an image

    def validate(self, vocab: int):
        v = self
        for name in ("dim", "heads", "hidden", "tile", "patch"):
            _require(getattr(v, name) > 0, f"model.vision.{name}={getattr(v, name)} must be positive")
        _require(v.layers >= 0, f"model.vision.layers={v.layers} must be positive, or 0 for text alone")
        _require(v.dim % v.heads == 0, f"model.vision.heads={v.heads} does not divide model.vision.dim={v.dim}")
        _require(v.layers <= MOST_LAYERS, f"model.vision.layers={v.layers} is more than {MOST_LAYERS:,}")
        _require(v.tile % v.patch == 0, f"model.vision.patch={v.patch} does not divide model.vision.tile={v.tile}")
        _require(v.norm_eps > 0, f"model.vision.norm_eps={v.norm_eps} must be positive")
        _require(all(isinstance(g, tuple) and len(g) == 2 and all(type(n) is int and n > 0 for n in g) for g in v.grids),
                 f"model.vision.grids={v.grids} must be pairs of positive rows and columns")
        _require(max([rows * columns for rows, columns in v.grids], default=1) * v.tile ** 2 <= MOST_PIXELS,
                 f"model.vision.tile={v.tile}: the largest of model.vision.grids has more than {MOST_PIXELS:,} pixels")
        _require(not v.layers or 0 <= v.token < vocab,
                 f"model.vision.token={v.token} is no id of model.vocab={vocab}")

    @property
    def side(self) -> int:
        """Patches of a tile, in a row and in a column."""
        return self.tile // self.patch

    def extents(self, dim: int) -> dict[str, int]:
        """The letters' extents in parameters, beside a text model of width `dim`; Y and X are a patch's."""
        return {"Y": self.patch, "X": self.patch, "Z": 3, "P": self.side ** 2 + 1, "J": self.dim, "A": self.heads,
                "K": self.dim // self.heads, "U": self.hidden, "O": dim, "D": dim, "L": self.layers}

    @property
    def params(self) -> int:
        """Of the ViT."""
        if not self.layers:
            return 0
        layer = 4 * self.dim * (self.dim + 1) + 4 * self.dim + 2 * self.dim * self.hidden + self.hidden + self.dim
        return self.layers * layer + self.dim * (3 * self.patch ** 2 + 1 + self.side ** 2 + 1 + 2)

    def params_projector(self, dim: int) -> int:
        """Of the projector into `dim`, and the newline."""
        return dim * (self.dim + 1) + dim * (dim + 1) + dim if self.layers else 0

    def flops_tile(self, dim: int) -> float:
        """Forward FLOPs of one tile's way into a text model of width `dim`: two per matrix parameter and place that it touches,
        4 P^2 J a layer for scores and values."""
        if not self.layers:
            return 0
        places, patches = self.side ** 2 + 1, self.side ** 2
        layer = 2 * places * (4 * self.dim ** 2 + 2 * self.dim * self.hidden) + 4 * places ** 2 * self.dim
        return self.layers * layer + 2 * patches * (3 * self.patch ** 2 * self.dim + self.dim * dim + dim ** 2)

    @property
    def checkpoint_tensors(self) -> int:
        return 16 * self.layers + 10 if self.layers else 0


@dataclasses.dataclass(frozen=True)
class Model:
    """MiniMax-Text-01's shape (model.md section 1). Zero in an alpha means DeepNorm's (2 x layers)^(1/4), in pre-norm 1."""
    vocab: int = 264                # bytes, bos, eos, pad and five spare ids
    dim: int = 256                  # D
    layers: int = 8
    pattern: str = "LLLLLLLS"       # L lightning, S softmax, W softmax in a window; repeated layers / len(pattern) times
    window: int = 256               # tokens that a token of a W layer sees, itself included
    heads: int = 8                  # H, both layer kinds
    kv_heads: int = 2               # G, softmax layers
    head_dim: int = 32              # K = V
    rotary_dim: int = 16            # leading part of head_dim that RoPE turns, softmax layers
    rope_theta: float = 10_000.0
    experts: int = 8                # E
    top_k: int = 2
    expert_dim: int = 512           # F
    capacity: float = 0.0           # tokens an expert takes, over tokens x top_k / experts; 0 drops none
    transport: float = 0.0          # slots to each device of the expert axis, over the even share; 0: all that could be needed
    token_groups: int = 1           # parts of a device's tokens whose exchange runs under one another's experts
    ragged: bool = False            # tokens travel by ragged all-to-all (TPU and GPU), transport bounds all peers' together
    aux: str = "switch"             # load-balancing loss: switch E sum(f P), paper (1/E) sum(f m), hf over all layers
    aux_weight: float = 0.01        # paper section 4.2
    z_weight: float = 0.0           # router z-loss, mean of logsumexp(logits)^2
    norm_eps: float = 1e-5
    head_norm_eps: float = 1e-6     # the norm inside lightning attention (model.md section 3)
    postnorm: bool = True           # the residual is the normed input, with DeepNorm's alpha; False: pre-norm, the input itself
    alpha_lightning: float = 0.0    # residual factors: alpha x residual + beta x branch
    alpha_softmax: float = 0.0
    alpha_moe: float = 0.0
    beta_lightning: float = 1.0
    beta_softmax: float = 1.0
    beta_moe: float = 1.0
    context: int = 8192             # longest sequence meant; written to config.json, bounds nothing
    init: str = "deepnorm"          # deepnorm (xavier with gain (8 x layers)^(-1/4) on v, out and FFN), xavier or fan_in
    embed_std: float = 0.02         # standard deviation of the embedding's initial values
    dtype: str = "float32"          # of computation; parameters keep theirs
    remat: bool = False             # recompute a layer's activations in the backward pass
    keep_arrived: bool = False      # with remat: keep what experts were sent, so that tokens travel no second time
    impl: str = ""                  # lightning attention: xla, tpu, gpu or triton; empty picks
    chunk: int = 0                  # lightning attention's tokens per chunk; 0 picks
    vision: Vision = Vision()

    def __post_init__(self):
        for name in ("alpha_lightning", "alpha_softmax", "alpha_moe"):
            if getattr(self, name) == 0:
                object.__setattr__(self, name, (2 * self.layers) ** 0.25 if self.postnorm else 1.0)

    def validate(self):
        m = self
        for name in ("vocab", "dim", "layers", "heads", "kv_heads", "head_dim", "experts", "top_k", "expert_dim"):
            _require(getattr(m, name) > 0, f"model.{name}={getattr(m, name)} must be positive")
        for name, most in (("layers", MOST_LAYERS), ("heads", MOST_HEADS)):
            _require(getattr(m, name) <= most, f"model.{name}={getattr(m, name)} is more than {most:,}")
        _require(m.pattern and set(m.pattern) <= set("LSW"),
                 f"model.pattern={m.pattern!r} may hold only L (lightning), S (softmax) and W (softmax in a window)")
        _require(m.window > 0, f"model.window={m.window} must be positive")
        _require(m.layers % len(m.pattern) == 0,
                 f"model.pattern={m.pattern!r} has {len(m.pattern)} letters, which does not divide model.layers={m.layers}")
        _require(m.heads % m.kv_heads == 0, f"model.kv_heads={m.kv_heads} does not divide model.heads={m.heads}")
        _require(0 <= m.rotary_dim <= m.head_dim and m.rotary_dim % 2 == 0,
                 f"model.rotary_dim={m.rotary_dim} must be even and at most model.head_dim={m.head_dim}")
        _require(m.top_k <= m.experts, f"model.top_k={m.top_k} is more than model.experts={m.experts}")
        _require(m.capacity >= 0, f"model.capacity={m.capacity} must be 0 (no dropping) or positive")
        _require(m.transport >= 0, f"model.transport={m.transport} must be 0 (as many slots as could be needed) or positive")
        _require(m.token_groups > 0, f"model.token_groups={m.token_groups} must be positive")
        _choice("model.aux", m.aux, AUX_FORMS)
        _choice("model.init", m.init, INITS)
        _choice("model.dtype", m.dtype, ("float32", "bfloat16", "float64"))
        for name in ("rope_theta", "norm_eps", "head_norm_eps"):
            _require(getattr(m, name) > 0, f"model.{name}={getattr(m, name)} must be positive")
        _require(m.chunk >= 0, f"model.chunk={m.chunk} must be at least 1, or 0 to pick")
        _choice("model.impl", m.impl, ("", "xla", "tpu", "gpu", "triton"))
        m.vision.validate(m.vocab)

    def anywhere(self) -> "Model":
        """The same function, which machines of other kinds than it was trained on compute too."""
        return dataclasses.replace(self, **{name: getattr(Model, name) for name in HERE})

    @property
    def groups(self) -> int:
        """L: how many times the pattern repeats."""
        return self.layers // len(self.pattern)

    @property
    def layer_kinds(self) -> str:
        """One letter a layer, over all layers."""
        return self.pattern * self.groups

    @property
    def log_decay(self) -> tuple[tuple[float, ...], ...]:
        """Minus the released decay slope, [layers][heads]: -slope_h (1 - l/(layers-1) + 1e-5) (model.md section 3)."""
        last = max(self.layers - 1, 1)
        return tuple(tuple(-s * (1 - l / last + 1e-5) for s in alibi_slopes(self.heads)) for l in range(self.layers))

    def _mixer_params(self, kind: str) -> int:
        width = self.heads * self.head_dim
        if kind == "L":
            return 5 * self.dim * width + width          # q, k, v, gate, out; norm over all heads
        return 2 * self.dim * (width + self.kv_heads * self.head_dim)

    def _layer_params(self, kind: str, experts: int) -> int:
        return self._mixer_params(kind) + 2 * self.dim + self.experts * self.dim + 3 * experts * self.dim * self.expert_dim

    @property
    def params_total(self) -> int:
        """All parameters, embedding, head and vision included."""
        layers = sum(self._layer_params(k, self.experts) for k in self.layer_kinds)
        return 2 * self.vocab * self.dim + self.dim + layers + self.params_vision

    @property
    def params_vision(self) -> int:
        """Of the ViT and the projector: what no token touches."""
        return self.vision.params + self.vision.params_projector(self.dim)

    @property
    def params_active(self) -> int:
        """Parameters a token touches, without embedding and head: the published "45.9 B active"."""
        return self.dim + sum(self._layer_params(k, self.top_k) for k in self.layer_kinds)

    @property
    def params_active_all(self) -> int:
        """Parameters a token touches, with embedding and head."""
        return self.params_active + 2 * self.vocab * self.dim

    @property
    def checkpoint_tensors(self) -> int:
        """Tensors in the released checkpoint layout (model.md section 6)."""
        return 3 + self.layers * (3 + 3 * self.experts) + 4 * self.layers + self.vision.checkpoint_tensors

    def flops_forward(self, length: int) -> float:
        """Forward FLOPs per token at the mean of a causal sequence of `length` tokens.

        Two per matrix parameter touched (embedding lookup and norms: none); softmax scores and values 4 H K (length+1)/2,
        in a window fewer; lightning in recurrent form 4 H K V (state update and read-out).
        """
        width, norms = self.heads * self.head_dim, 2 * self.layers * self.dim + self.dim
        norms += self.layer_kinds.count("L") * width
        matrices = self.params_active + self.vocab * self.dim - norms
        seen = min(self.window, length)
        keys = {"L": 0, "S": (length + 1) / 2, "W": seen - seen * (seen - 1) / 2 / max(length, 1)}   # means over it
        softmax = sum(4 * width * keys[kind] for kind in self.layer_kinds)
        lightning = self.layer_kinds.count("L") * 4 * width * self.head_dim
        return 2 * matrices + softmax + lightning

    def flops_training(self, length: int) -> float:
        """Forward and backward FLOPs per token, without recomputation; of an image's tiles see `Vision.flops_tile`."""
        return 3 * self.flops_forward(length)

    def flops_companion(self, length: int) -> float:
        """Forward and backward FLOPs per token as the paper's Table 1 and its companion (arXiv 2406.16690, appendix A) count.

        By depth, width d and heads h alone: a layer has 4 d^2 parameters in its mixer and 8 d^2 in its dense feed-forward part
        (which is 8 d / 3 wide), six FLOPs each; softmax sees all `length` keys, lightning has chunks of d / h tokens and a gate
        of rank d / h; 20 d are norms and activations. Embedding and head: none. With more than one expert, whom neither
        counts, the feed-forward part is the router and the experts taken.
        """
        d = self.dim
        ffn = 8 * d ** 2 if self.experts == 1 else 3 * self.top_k * d * self.expert_dim + self.experts * d
        mixers = {"S": 12 * d * length, "W": 12 * d * min(length, self.window), "L": 36 * d ** 2 / self.heads}
        return sum(6 * (4 * d ** 2 + ffn) + 20 * d + mixers[kind] for kind in self.layer_kinds)


@dataclasses.dataclass(frozen=True)
class Train:
    """Optimization. A step is one optimizer update."""
    steps: int = 1000
    seconds: float = 0.0            # stop after this much training time, the schedule following the clock; 0: by steps
    batch: int = 8                  # sequences a micro-batch
    length: int = 512               # T, tokens a sequence
    ramp: tuple = ()                # ((tokens seen, micro-batches a step), ...): batch ramp by gradient accumulation
    init_from: str = ""             # start from the parameters of this workdir, checkpoints/STEP or Hugging Face directory
    init_vision: str = ""           # and from the ViT, without its projector, of this one
    freeze: tuple = ()              # parts of the parameters that stay as they are: "groups", "vision", "vision.layers"
    vision_lr: float = 1.0          # learning rate of what sees (ViT, projector), over that of the rest
    contrastive: float = 0.0        # weight of the contrastive loss of captioned images beside the captions' (CoCa)
    lr: float = 3e-3                # peak learning rate
    lr_end: float = 0.0             # last learning rate
    schedule: str = "wsd"           # wsd (linear warm-up, stable, decay), cosine, stepwise
    warmup: int = 100               # steps of linear warm-up, any schedule
    decay: float = 0.2              # wsd: last share of the run that decays
    decay_form: str = "linear"      # wsd's and stepwise's last part: linear, exponential or sqrt (1 - sqrt)
    rates: tuple = ()               # stepwise: ((tokens seen, learning rate), ...), the last one decaying to lr_end
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1       # matrices only
    clip: float = 1.0               # global gradient norm; 0: none
    loss_chunk: int = 2048          # rows of logits [rows, vocab] that exist at a time
    log_every: int = 10             # steps
    eval_every: int = 0             # steps; 0: never (`mmx eval` reads all of the validation text)
    eval_bytes: int = 65_536        # of validation text at eval_every; 0: all
    sample_every: int = 0           # steps; 0: never
    sample_prompt: str = "The state of the Union"
    tensorboard: bool = True
    seed: int = 0

    def micro_batches(self, tokens: int) -> int:
        """In the step that begins after `tokens`."""
        return latest(self.ramp, tokens) if self.ramp else 1

    def tokens_seen(self, step: int) -> int:
        """Tokens before step number `step` (from 0): a walk over the ramp's stages."""
        tokens, stages = 0, self.ramp or ((0, 1),)
        for (_, count), (end, _) in itertools.pairwise(stages):
            size = count * self.batch * self.length
            steps = min(step, max(0, -(-(end - tokens) // size)))
            tokens, step = tokens + steps * size, step - steps
        return tokens + step * stages[-1][1] * self.batch * self.length

    def validate(self):
        _choice("train.schedule", self.schedule, SCHEDULES)
        _choice("train.decay_form", self.decay_form, ("linear", "exponential", "sqrt"))
        for name in ("steps", "batch", "length", "log_every", "loss_chunk"):
            _require(getattr(self, name) > 0, f"train.{name}={getattr(self, name)} must be positive")
        for name in ("seconds", "lr", "lr_end", "warmup", "eps", "weight_decay", "clip", "eval_every", "eval_bytes",
                     "sample_every", "vision_lr", "contrastive"):
            _require(getattr(self, name) >= 0, f"train.{name}={getattr(self, name)} must be 0 or more")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"train.{name}={getattr(self, name)} must be from 0 to below 1")
        _require(0 <= self.seed < 2 ** 32, f"train.seed={self.seed} must be from 0 to 2^32 - 1")
        _require(is_text(self.sample_prompt), f"train.sample_prompt={self.sample_prompt!a} is no text: it is not UTF-8")
        _require(0 <= self.decay <= 1, f"train.decay={self.decay} is a share of the run, from 0 to 1")
        for name, kinds in (("ramp", int), ("rates", (int, float))):
            points = getattr(self, name)
            _require(all(isinstance(p, tuple) and len(p) == 2 and type(p[0]) is int and isinstance(p[1], kinds)
                         and p[1] > 0 for p in points), f"train.{name}={points} must be pairs of tokens, a whole "
                     f"number, and a positive {'count' if name == 'ramp' else 'rate'}")
            _require([p[0] for p in points] == sorted({p[0] for p in points}) and (not points or points[0][0] == 0),
                   f"train.{name}={points} must start at 0 tokens and rise")
        _require(self.schedule != "stepwise" or self.rates, "train.schedule='stepwise' needs train.rates")
        _require(not (self.seconds and self.ramp), "train.seconds does not go with train.ramp")
        _require(all(isinstance(name, str) for name in self.freeze), f"train.freeze={self.freeze} must be names")


@dataclasses.dataclass(frozen=True)
class Data:
    """Documents. Each source is "sotu" (embedded), "scenes", "maps" or "words" (`mmx.data.scenes`), or a path to .txt, .jsonl
    (texts, prompts with completions, either with images, ids with targets) or a folder of them."""
    sources: tuple = ("sotu",)
    lengths: tuple = ()             # ((least, below), ...), one a source: tokens of its training documents; (9, 0): 9 or more
    weights: tuple = ()             # ((step, (weight, ...)), ...): mixture that changes by step; empty: by size
    interpolate: bool = False       # the mixture moves linearly from each of these steps to the next, not at once
    tokenizer: str = "bytes"        # numbers:COUNT, or a path to a tokenizer.json
    shards: int = 8                 # virtual shards: fixes the stream, whatever the number of hosts
    seed: int = 0

    @property
    def tokenizer_file(self) -> str:
        """Empty where the tokenizer is none."""
        return tokenizer_file(self.tokenizer)

    def validate(self):
        _require(self.sources, "data.sources is empty: name 'sotu' or a path")
        _require(all(isinstance(s, str) for s in self.sources), f"data.sources={self.sources} must be names")
        _require(0 <= self.seed < 2 ** 32, f"data.seed={self.seed} must be from 0 to 2^32 - 1")
        _require(self.shards > 0, f"data.shards={self.shards} must be positive")
        for point in self.weights:
            ok = (isinstance(point, tuple) and len(point) == 2 and type(point[0]) is int and isinstance(point[1], tuple)
                  and len(point[1]) == len(self.sources) and all(isinstance(w, (int, float)) for w in point[1]))
            _require(ok, f"data.weights has {point}, needs (step, one weight a source) pairs; {len(self.sources)} sources")
            _require(all(0 <= w < math.inf for w in point[1]) and any(point[1]),
                     f"data.weights={point[1]} from step {point[0]}: weights are 0 or more, and not all 0")
        ranges = all(isinstance(p, tuple) and len(p) == 2 and all(type(n) is int for n in p) and 0 <= p[0] and
                     (p[1] == 0 or p[0] < p[1]) for p in self.lengths)
        _require(ranges and len(self.lengths) in (0, len(self.sources)), f"data.lengths={self.lengths} needs a pair of tokens, "
                 f"at least and below (0: no end), for each of {len(self.sources)} sources")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int = 500                # steps; also at the end and on SIGTERM
    keep: int = 2
    verify: bool = True             # whether what is restored is compared with its checksums first: all of it is read twice

    def validate(self):
        _require(self.every > 0 and self.keep > 0, "checkpoint.every and checkpoint.keep must be positive")


@dataclasses.dataclass(frozen=True)
class Guard:
    """What a run does where its loss or gradient is no number, and where its loss leaps."""
    skips: int = 10                 # most steps in a row that are left out because loss or gradient is no number
    spike: float = 0.0              # nats above the median of the last losses that take it back to its last checkpoint; 0: none
    window: int = 50                # last losses
    beyond: int = 0                 # steps whose data is left out after a spike, beside those from the checkpoint to it
    rollbacks: int = 3              # most from one checkpoint

    def validate(self):
        for name, least in (("skips", 0), ("spike", 0), ("window", 1), ("beyond", 0), ("rollbacks", 1)):
            _require(getattr(self, name) >= least, f"guard.{name}={getattr(self, name)} must be {least} or more")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices by axis; at most one -1, which takes what is left."""
    slice: int = dataclasses.field(default=1, kw_only=True)     # rows alone, across slices that a slow network joins
    edp: int = -1                   # expert data parallel: rows; weights and optimizer state are cut over it too (FSDP)
    ep: int = 1                     # expert parallel: rows, and experts
    etp: int = 1                    # expert tensor parallel: heads, experts' hidden parts, vocabulary; time between them
    seq: int = 1                    # context parallel: time

    def validate(self):
        sizes = dataclasses.astuple(self)
        _require(all(s == -1 or s > 0 for s in sizes) and sizes.count(-1) <= 1,
                 f"mesh {dataclasses.asdict(self)}: axes are positive, at most one is -1")


@dataclasses.dataclass(frozen=True)
class Experiment:
    model: Model = Model()
    train: Train = Train()
    data: Data = Data()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    mesh: Mesh = Mesh()


SECTIONS = {f.name: f.type for f in dataclasses.fields(Experiment)}


def tokenizer_file(name: str) -> str:
    """The tokenizer.json that a tokenizer's name is, or nothing."""
    return "" if name == "bytes" or name.startswith(NUMBERS) else name


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi slopes; a head count that is no power of two takes the rest from the even places of the next ladder."""
    def ladder(n):
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]
    m = 1 << (heads.bit_length() - 1)
    return ladder(m) + ladder(2 * m)[::2][:heads - m]


def default() -> ConfigDict:
    """A ConfigDict with every key at its default: experiments and overrides start here."""
    return ConfigDict({name: _as_dict(kind()) | _zero_alphas(name) for name, kind in SECTIONS.items()})


def _as_dict(section) -> dict:
    """As dataclasses.asdict, but tuples stay tuples."""
    values = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    return {name: _as_dict(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}


def _zero_alphas(name: str) -> dict:
    """Alphas stay unresolved until `build`, so that an override of model.layers moves them too."""
    return {f"alpha_{kind}": 0.0 for kind in ("lightning", "softmax", "moe")} if name == "model" else {}


def build(config: ConfigDict | dict) -> Experiment:
    """The frozen experiment of a ConfigDict (or a plain dict); unknown keys and wrong types raise ConfigError."""
    config = config.to_dict() if isinstance(config, ConfigDict) else config
    _known("", config, SECTIONS)
    parts = {name: _section(name, config.get(name, {}), kind) for name, kind in SECTIONS.items()}
    for part in parts.values():
        part.validate()
    experiment = Experiment(**parts)
    _require(not experiment.train.contrastive or experiment.model.vision.layers,
             f"train.contrastive={experiment.train.contrastive} needs images: set model.vision.layers")
    return experiment


def _section(name: str, values: dict, kind: type):
    _require(isinstance(values, dict), f"config.{name} must be a section, got {values!r}")
    kinds = {f.name: f.type for f in dataclasses.fields(kind)}
    _known(name + ".", values, kinds)
    return kind(**{key: (_section if dataclasses.is_dataclass(kinds[key]) else typed)(f"{name}.{key}", value, kinds[key])
                   for key, value in values.items()})


def sections(experiment: Experiment) -> dict:
    """Plain, as it is kept; a model without vision, or with the window that is the default, does not say so, as before."""
    values = dataclasses.asdict(experiment)
    if not experiment.model.vision.layers:
        del values["model"]["vision"]
    if experiment.model.window == Model.window:
        del values["model"]["window"]
    return values


def to_json(experiment: Experiment) -> str:
    return json.dumps(sections(experiment), indent=1)


def from_json(text: str) -> Experiment:
    return build(json.loads(text))


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: a shell's bytes that are not UTF-8 come as lone surrogates."""
    return value.encode("utf-8", "ignore").decode() == value


def lengths(text: str) -> list[int]:
    """Tokens of "512,1k,4M", each once, in that order; 1k is 1,024 and 1M is 1,048,576."""
    parts = [re.fullmatch(r"([0-9]{1,10})([km]?)", part.strip().lower()) for part in text.split(",")]
    found = [int(part[1]) * {"": 1, "k": 2 ** 10, "m": 2 ** 20}[part[2]] if part else 0 for part in parts]
    _require(all(found), f"--lengths {text!r:.200} does not parse: give tokens with commas, as 512,1k,4M (1k = 1,024)")
    return list(dict.fromkeys(found))


def latest(points, at):
    """What ((begin, value), ...) says at `at`: the value of the last that has begun."""
    return points[bisect.bisect_right([begin for begin, _ in points], at) - 1][1]


def nearest(key: str, known) -> str:
    """'; did you mean X?' or the list of what there is."""
    close = difflib.get_close_matches(key[:100], known, 1, 0.5)     # of long ones difflib makes many times as much
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def _known(prefix, values, known):
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown config key {prefix}{key:.200}{nearest(key, known)}")


def typed(key, value, kind):
    """`value` as the field's type: an int serves as a float, a list as a tuple; nothing else is bent."""
    if kind is tuple and isinstance(value, (list, tuple)):
        return tuple(typed(key, v, tuple) if isinstance(v, (list, tuple)) else v for v in value)
    if kind is float and type(value) is int and abs(value) < 2 ** 1023:
        return float(value)
    _require(type(value) is not int or kind is not int or abs(value) < MOST, f"config key {key} needs a number below 2^40")
    _require(type(value) is kind, f"config key {key} needs {kind.__name__}, got {value!r:.200}")
    if kind is float:
        _require(math.isfinite(value), f"config key {key} needs a finite number, got {value!r}")
    return value


def _choice(key, value, allowed):
    _require(value in allowed, f"{key}={value!r} is none of {', '.join(map(repr, allowed))}")


def _require(condition, message):
    if not condition:
        raise ConfigError(message)
