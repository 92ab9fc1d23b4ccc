"""Every key of an experiment, with its type, default, unit and bounds.

The comment of a field is its entry in docs/configuration.md (`python -m mmx.config.reference`).
"""
import dataclasses
import itertools
import math

from mmx.config.errors import require, require_choice
from mmx.config.parsing import is_text, value_at

AUX_FORMS = ("switch", "paper", "hf")
SCHEDULES = ("wsd", "cosine", "stepwise")
DECAY_FORMS = ("linear", "exponential", "sqrt")
INITS = ("deepnorm", "xavier", "fan_in")
DTYPES = ("float32", "bfloat16", "float64")
IMPLS = ("", "xla", "tpu", "gpu", "triton")
NUMBERS = "numbers:"                # prefix of a tokenizer without a file, followed by its number of ids
MOST_LAYERS = 10_000
# largest values of keys of Model: with larger ones, JAX's int32 arithmetic would overflow or tracing would take minutes
LIMITS = {"layers": MOST_LAYERS, "heads": 65_536, "head_dim": 16_384, "experts": 65_536, "vocab": 2**31 - 1,
          "window": 2**31 - 1}
MOST_PIXELS = 1 << 26               # largest number of pixels of all tiles of an image
# keys of Model that change the speed and the memory only, not the function
IMPLEMENTATION_KEYS = ("impl", "chunk", "remat", "keep_arrived", "token_groups", "ragged")
GRIDS = tuple((rows, columns) for rows in range(1, 7) for columns in range(1, (6, 6, 6, 4, 3, 3)[rows - 1] + 1))


@dataclasses.dataclass(frozen=True)
class Vision:
    """MiniMax-VL-01's image encoder: a ViT for each tile, and a projector of two layers (docs/model.md section 8)."""
    layers: int = 0                 # [layers] depth of the ViT; the released model has 24; 0: a text model
    dim: int = 1024                 # J, width of the ViT
    heads: int = 16                 # A, number of heads of the ViT
    hidden: int = 4096              # U, width of the ViT's MLPs
    tile: int = 336                 # [pixels] height and width of a tile
    patch: int = 14                 # [pixels] height and width of a patch; a tile has (tile / patch)^2 patches
    # allowed grids of tiles: ((rows, columns), ...); an image is cut into one of them, and also becomes one tile as a whole;
    # (): only the whole image
    grids: tuple = dataclasses.field(default=GRIDS, repr=False)
    norm_eps: float = 1e-5          # epsilon of the ViT's layer norms
    token: int = 200_025            # id of an image token; the embeddings of image tokens come from the ViT

    def validate(self, vocab: int):
        v = self
        for name in ("dim", "heads", "hidden", "tile", "patch"):
            require(getattr(v, name) > 0, f"model.vision.{name}={getattr(v, name)} must be positive")
        require(v.layers >= 0, f"model.vision.layers={v.layers} must be positive, or 0 for a text model")
        require(v.dim % v.heads == 0, f"model.vision.dim={v.dim} must be divisible by model.vision.heads={v.heads}")
        require(v.layers <= MOST_LAYERS, f"model.vision.layers={v.layers} must be at most {MOST_LAYERS:,}")
        require(v.tile % v.patch == 0, f"model.vision.tile={v.tile} must be divisible by model.vision.patch={v.patch}")
        require(v.norm_eps > 0, f"model.vision.norm_eps={v.norm_eps} must be positive")
        require(all(isinstance(g, tuple) and len(g) == 2 and all(type(n) is int and n > 0 for n in g) for g in v.grids),
                f"model.vision.grids={v.grids} must be pairs of positive rows and columns")
        require(max([rows * columns for rows, columns in v.grids], default=1) * v.tile ** 2 <= MOST_PIXELS,
                f"model.vision.tile={v.tile}: the largest of model.vision.grids has more than {MOST_PIXELS:,} pixels")
        require(not v.layers or 0 <= v.token < vocab,
                f"model.vision.token={v.token} must be a token id, from 0 to below model.vocab={vocab}")

    @property
    def patches_per_side(self) -> int:
        """Patches in a row of a tile, and in a column."""
        return self.tile // self.patch


@dataclasses.dataclass(frozen=True)
class Model:
    """The decoder's shape and function (docs/model.md section 1), and how it is computed; `mmx.model.Model` is the module."""
    vocab: int = 264                # W, number of token ids; default: 256 bytes, bos, eos, pad and five unused ids
    dim: int = 256                  # D, width
    layers: int = 8                 # [layers] depth
    # layer kinds: L lightning, S softmax, W softmax in a window; the pattern repeats layers / len(pattern) times
    pattern: str = "LLLLLLLS"
    window: int = 256               # [tokens] number of tokens that a token of a W layer attends to, itself included
    heads: int = 8                  # H, query heads of every layer
    kv_heads: int = 2               # G, key-value heads of softmax layers
    head_dim: int = 32              # K = V, width of a head
    rotary_dim: int = 16            # number of leading dims of a head that RoPE rotates in softmax and window layers
    rope_theta: float = 10_000.0    # base of RoPE's frequencies
    experts: int = 8                # E, number of experts in a layer
    top_k: int = 2                  # number of experts that process a token
    expert_dim: int = 512           # F, hidden width of an expert
    # capacity factor: an expert accepts at most capacity * (tokens of the batch * top_k / experts) tokens and drops the
    # others; padding does not count; 0: no dropping
    capacity: float = 0.0
    # buffer factor of the all-to-all that sends each token to its top_k experts. A device sends at most
    # transport * (its tokens * top_k / mesh.ep) token copies to each device and drops the others; 0: enough for any routing
    transport: float = 0.0
    # number of groups into which a device splits its tokens. While experts compute one group, the next is exchanged, so that
    # communication overlaps with compute
    token_groups: int = 1
    # send tokens to experts by a ragged all-to-all (TPU and GPU), without padding; transport * (tokens of a device * top_k)
    # then limits the token copies that a device receives in all
    ragged: bool = False
    # form of the load-balancing loss: switch, paper or hf (docs/model.md section 5)
    aux: str = "switch"
    aux_weight: float = 0.01        # weight of the load-balancing loss (paper section 4.2)
    z_weight: float = 0.0           # weight of the router z-loss, mean of logsumexp(logits)^2
    norm_eps: float = 1e-5          # epsilon of RMSNorm
    head_norm_eps: float = 1e-6     # epsilon of the norm in lightning attention (docs/model.md section 3)
    postnorm: bool = True           # True: the residual is the normed input (DeepNorm); False: the input itself (pre-norm)
    # factor of the residual of lightning layers; 0: (2 * layers)^(1/4) as in DeepNorm if postnorm is True, otherwise 1
    alpha_lightning: float = 0.0
    alpha_softmax: float = 0.0      # the same for softmax and window layers
    alpha_moe: float = 0.0          # the same for the mixture of experts
    beta_lightning: float = 1.0     # factor of the attention output of lightning layers
    beta_softmax: float = 1.0       # the same for softmax and window layers
    beta_moe: float = 1.0           # factor of the experts' output
    # [tokens] longest intended sequence, max_position_embeddings of exported checkpoints; longer sequences are also accepted
    context: int = 8192
    # initial values: xavier; fan_in; deepnorm: xavier, with v, attention output and expert matrices times (8 * layers)^(-1/4)
    init: str = "deepnorm"
    embed_std: float = 0.02         # standard deviation of the embedding's initial values
    dtype: str = "float32"          # dtype of the computation: float32, bfloat16 or float64; trained parameters are float32
    remat: bool = False             # recompute each layer's activations in the backward pass
    # with remat: store the tokens that arrived at the devices of their experts, so that the backward pass does not exchange
    # them again; needs more memory
    keep_arrived: bool = False
    impl: str = ""                  # lightning attention kernel: xla, tpu, gpu or triton; empty: by platform
    chunk: int = 0                  # [tokens] chunk of lightning attention; 0: chosen by the kernel
    vision: Vision = Vision()

    def __post_init__(self):
        for name in ("alpha_lightning", "alpha_softmax", "alpha_moe"):
            if getattr(self, name) == 0:
                object.__setattr__(self, name, (2 * self.layers) ** 0.25 if self.postnorm else 1.0)

    def validate(self):
        m = self
        for name in ("vocab", "dim", "layers", "window", "heads", "kv_heads", "head_dim", "experts", "top_k", "expert_dim",
                     "token_groups", "context"):
            require(getattr(m, name) > 0, f"model.{name}={getattr(m, name)} must be positive")
        for name, most in LIMITS.items():
            require(getattr(m, name) <= most, f"model.{name}={getattr(m, name)} must be at most {most:,}")
        require(m.pattern.isascii() and m.pattern.isalpha(), f"model.pattern={m.pattern!r} must be letters, one for each layer")
        require(m.layers % len(m.pattern) == 0,
                f"model.layers={m.layers} must be divisible by the {len(m.pattern)} letters of model.pattern={m.pattern!r}")
        require(m.heads % m.kv_heads == 0, f"model.heads={m.heads} must be divisible by model.kv_heads={m.kv_heads}")
        require(0 <= m.rotary_dim <= m.head_dim and m.rotary_dim % 2 == 0,
                f"model.rotary_dim={m.rotary_dim} must be even and at most model.head_dim={m.head_dim}")
        require(m.top_k <= m.experts, f"model.top_k={m.top_k} must be at most model.experts={m.experts}")
        require(m.capacity >= 0, f"model.capacity={m.capacity} must be positive, or 0 for no dropping")
        require(m.transport >= 0, f"model.transport={m.transport} must be positive, or 0 for room for any routing")
        require_choice("model.aux", m.aux, AUX_FORMS)
        require_choice("model.init", m.init, INITS)
        require_choice("model.dtype", m.dtype, DTYPES)
        for name in ("rope_theta", "norm_eps", "head_norm_eps"):
            require(getattr(m, name) > 0, f"model.{name}={getattr(m, name)} must be positive")
        require(m.chunk >= 0, f"model.chunk={m.chunk} must be positive, or 0 to let the kernel choose")
        require_choice("model.impl", m.impl, IMPLS)
        m.vision.validate(m.vocab)

    def portable(self) -> "Model":
        """The same model with IMPLEMENTATION_KEYS at their defaults, so that any machine can run it."""
        return dataclasses.replace(self, **{name: getattr(Model, name) for name in IMPLEMENTATION_KEYS})

    @property
    def groups(self) -> int:
        """Axis L: how many times the pattern repeats."""
        return self.layers // len(self.pattern)

    @property
    def layer_kinds(self) -> str:
        """One letter a layer, over all layers."""
        return self.pattern * self.groups


@dataclasses.dataclass(frozen=True)
class Train:
    """Optimization. A step is one optimizer update."""
    steps: int = 1000               # [steps] length of the whole run
    # [seconds] stop after this training time instead of train.steps; the schedule then follows the clock; 0: stop by steps
    seconds: float = 0.0
    batch: int = 8                  # [sequences] B, rows of a micro-batch; a step has one micro-batch unless train.ramp is set
    length: int = 512               # [tokens] T, length of a row
    # batch ramp by gradient accumulation: ((tokens, count), ...); after `tokens` tokens of training, each step has `count`
    # micro-batches
    ramp: tuple = ()
    # start from the parameters of this workdir, checkpoints/STEP, Hugging Face directory, or hf://ORG/NAME
    init_from: str = ""
    init_vision: str = ""           # start the ViT, without its projector, from this checkpoint
    # parameters that are not trained, by their path: "groups" (all decoder layers), "vision", "vision.layers", ...
    freeze: tuple = ()
    vision_lr: float = 1.0          # factor of the learning rate for the ViT and the projector
    contrastive: float = 0.0        # weight of a contrastive loss between images and their captions (CoCa)
    lr: float = 3e-3                # peak learning rate
    lr_end: float = 0.0             # final learning rate
    schedule: str = "wsd"           # wsd (warm-up, stable, decay), cosine or stepwise
    warmup: int = 100               # [steps] length of the linear warm-up, in every schedule
    decay: float = 0.2              # wsd and stepwise: fraction of the run, at its end, in which the learning rate decays
    decay_form: str = "linear"      # shape of that decay: linear, exponential, or sqrt: 1 - sqrt(fraction of the decay done)
    # stepwise: ((tokens, rate), ...); after `tokens` tokens of training, the learning rate is `rate`; the last decays to lr_end
    rates: tuple = ()
    beta1: float = 0.9              # AdamW's decay of the first moment
    beta2: float = 0.95             # AdamW's decay of the second moment
    eps: float = 1e-8               # AdamW's epsilon
    weight_decay: float = 0.1       # AdamW's weight decay, applied to matrices only
    clip: float = 1.0               # largest global gradient norm; 0: no clipping
    loss_chunk: int = 2048          # [tokens] number of tokens whose logits are in memory at a time
    log_every: int = 10             # [steps] number of steps between TensorBoard entries
    eval_every: int = 0             # [steps] number of steps between evaluations on held-out documents; 0: never
    eval_bytes: int = 65_536        # [bytes] those evaluations read the first eval_bytes of held-out documents; 0: all
    sample_every: int = 0           # [steps] number of steps between samples; 0: never
    sample_prompt: str = "The state of the Union"   # prompt of those samples
    tensorboard: bool = True        # write TensorBoard files
    seed: int = 0                   # random seed of the initial parameters

    def micro_batches(self, tokens: int) -> int:
        """Micro-batches of the step that begins after `tokens` tokens."""
        return value_at(self.ramp, tokens) if self.ramp else 1

    def tokens_seen(self, step: int) -> int:
        """Tokens before step number `step` (from 0), counted through the stages of the ramp."""
        tokens, stages = 0, self.ramp or ((0, 1),)
        for (_, count), (end, _) in itertools.pairwise(stages):
            size = count * self.batch * self.length
            steps = min(step, max(0, -(-(end - tokens) // size)))
            tokens, step = tokens + steps * size, step - steps
        return tokens + step * stages[-1][1] * self.batch * self.length

    def validate(self):
        require_choice("train.schedule", self.schedule, SCHEDULES)
        require_choice("train.decay_form", self.decay_form, DECAY_FORMS)
        for name in ("steps", "batch", "length", "log_every", "loss_chunk"):
            require(getattr(self, name) > 0, f"train.{name}={getattr(self, name)} must be positive")
        for name in ("seconds", "lr", "lr_end", "warmup", "weight_decay", "clip", "eval_every", "eval_bytes",
                     "sample_every", "vision_lr", "contrastive"):
            require(getattr(self, name) >= 0, f"train.{name}={getattr(self, name)} must be 0 or more")
        require(self.eps >= 1e-37, f"train.eps={self.eps} must be at least 1e-37: a gradient of 0 would be divided by 0")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"train.{name}={getattr(self, name)} must be from 0 to below 1")
        require(0 <= self.seed < 2 ** 32, f"train.seed={self.seed} must be from 0 to 2^32 - 1")
        require(is_text(self.sample_prompt), f"train.sample_prompt={self.sample_prompt!a} must be UTF-8 text")
        require(0 <= self.decay <= 1, f"train.decay={self.decay} must be a share of the run, from 0 to 1")
        for name, kinds in (("ramp", int), ("rates", (int, float))):
            points = getattr(self, name)
            require(all(isinstance(p, tuple) and len(p) == 2 and type(p[0]) is int and isinstance(p[1], kinds)
                        and 0 < p[1] < math.inf for p in points), f"train.{name}={points} must be pairs of tokens, a whole "
                    f"number, and a positive {'count' if name == 'ramp' else 'rate'}")
            require([p[0] for p in points] == sorted({p[0] for p in points}) and (not points or points[0][0] == 0),
                    f"train.{name}={points} must start at 0 tokens, with the tokens increasing")
        require(self.schedule != "stepwise" or self.rates, "train.schedule='stepwise' needs train.rates")
        require(not (self.seconds and self.ramp), "train.seconds and train.ramp cannot be combined: use train.steps")
        require(all(isinstance(name, str) for name in self.freeze), f"train.freeze={self.freeze} must be names")


@dataclasses.dataclass(frozen=True)
class Data:
    """Documents and how they are read."""
    # "sotu" (the embedded corpus), paths of .txt files, .jsonl files or folders, or generated data (docs/data.md)
    sources: tuple = ("sotu",)
    # ((least, limit), ...), one pair for each source: it trains on documents of at least `least` and fewer than `limit`
    # tokens; limit 0: no upper limit; (): all documents
    lengths: tuple = ()
    # ((step, (weight of each source, ...)), ...): mixture weights from that step on; (): in proportion to the numbers of rows
    weights: tuple = ()
    interpolate: bool = False       # change the weights linearly between the steps of data.weights, not at once
    # "bytes", the path of a tokenizer.json, or "numbers:COUNT" for generated tasks: a text is a list of decimal ids below COUNT
    tokenizer: str = "bytes"
    # number of shards that the rows are divided into; a process reads some of them. The order of the data depends on this
    # number, but not on the number of processes
    shards: int = 8
    seed: int = 0                   # random seed of the order of the data
    # columns of .jsonl and .parquet files: "text=NAME" or "prompt=NAME,completion=NAME"; "": by their usual names
    columns: str = ""
    cache: str = ""                 # folder of the tokenized sources; "": mmx/data in the user's cache folder

    @property
    def tokenizer_file(self) -> str:
        """The path of the tokenizer.json; empty for a tokenizer without a file."""
        return tokenizer_file(self.tokenizer)

    def validate(self):
        require(self.sources, "data.sources is empty: name 'sotu' or a path")
        require(all(isinstance(s, str) for s in self.sources), f"data.sources={self.sources} must be names")
        require(0 <= self.seed < 2 ** 32, f"data.seed={self.seed} must be from 0 to 2^32 - 1")
        require(self.shards > 0, f"data.shards={self.shards} must be positive")
        for point in self.weights:
            valid = (isinstance(point, tuple) and len(point) == 2 and type(point[0]) is int and isinstance(point[1], tuple)
                     and len(point[1]) == len(self.sources) and all(isinstance(w, (int, float)) for w in point[1]))
            require(valid, f"data.weights has {point}, needs (step, (weight of each source)); {len(self.sources)} sources")
            require(all(0 <= w < math.inf for w in point[1]) and any(point[1]),
                    f"data.weights={point[1]} from step {point[0]}: weights must be 0 or more, and not all 0")
        ranges = all(isinstance(p, tuple) and len(p) == 2 and all(type(n) is int for n in p) and 0 <= p[0] and
                     (p[1] == 0 or p[0] < p[1]) for p in self.lengths)
        require(ranges and len(self.lengths) in (0, len(self.sources)),
                f"data.lengths={self.lengths} needs a pair of tokens, at least and below (0: no limit), for each of "
                f"{len(self.sources)} sources")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When a run is saved."""
    every: int = 500                # [steps] number of steps between checkpoints; one is also saved at the end and on SIGTERM
    keep: int = 2                   # [checkpoints] number of the newest checkpoints that stay on disk
    verify: bool = True             # compare a checkpoint with its checksums before restoring it, which reads it twice

    def validate(self):
        require(self.every > 0 and self.keep > 0, "checkpoint.every and checkpoint.keep must be positive")


@dataclasses.dataclass(frozen=True)
class Guard:
    """What a run does when its loss is not finite or jumps."""
    # [steps] a step with a non-finite loss or gradient is skipped, up to this many in a row; the next one rolls the run back
    # if spike is set, and ends it otherwise
    skips: int = 10
    spike: float = 0.0              # [nats] a loss this far above the median of recent losses rolls the run back; 0: never
    window: int = 50                # [steps] number of recent losses that the median covers
    # [steps] a rollback skips the data of the steps up to the spike, and of this many further steps
    beyond: int = 0
    rollbacks: int = 3              # [rollbacks] up to this many to one checkpoint; the next spike ends the run

    def validate(self):
        for name, least in (("skips", 0), ("spike", 0), ("window", 1), ("beyond", 0), ("rollbacks", 1)):
            require(getattr(self, name) >= least, f"guard.{name}={getattr(self, name)} must be {least} or more")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Number of devices along each mesh axis (paper section 3.1). One axis may be -1: it gets all remaining devices."""
    slice: int = dataclasses.field(default=1, kw_only=True)     # [devices] data parallel across pod slices: splits the batch
    edp: int = -1                   # [devices] expert data parallel: splits the batch, parameters and optimizer state (FSDP)
    ep: int = 1                     # [devices] expert parallel: splits the batch and the experts
    # [devices] expert tensor parallel: inside a layer it splits heads, experts' hidden width and vocabulary; between layers it
    # splits the tokens of a sequence
    etp: int = 1
    seq: int = 1                    # [devices] sequence parallel: splits the tokens of a sequence

    def validate(self):
        sizes = dataclasses.astuple(self)
        require(all(s == -1 or s > 0 for s in sizes) and sizes.count(-1) <= 1,
                f"mesh {dataclasses.asdict(self)}: sizes must be positive, at most one may be -1")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All sections of a config."""
    model: Model = Model()
    train: Train = Train()
    data: Data = Data()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    mesh: Mesh = Mesh()


SECTIONS = {f.name: f.type for f in dataclasses.fields(Experiment)}
# Keys that older versions did not have, and their defaults. A key at its default is not written, so that config.json files and
# hashes of older sweeps stay valid.
LATER_KEYS = {"model": {"window": Model.window}, "data": {"columns": Data.columns, "cache": Data.cache}}


def tokenizer_file(name: str) -> str:
    """The path of the tokenizer.json that a tokenizer's name gives; empty for a tokenizer without a file."""
    return "" if name == "bytes" or name.startswith(NUMBERS) else name
