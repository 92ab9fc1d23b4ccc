"""`mmx memory`: what a sequence costs in memory, and the roofline of reading it in and of making tokens behind it.

    weights   parameters x 2 bytes (bfloat16) or 1 (int8)
    state     lightning layers x heads x head_dim^2 x 4 bytes (float32), whatever the length
    cache     softmax layers x keys and values x kv_heads x head_dim a token, in the dtype of computation
    step      at least max(FLOPs / peak, bytes / bandwidth) of all its devices: a roofline, nothing is measured

beside the same geometry of softmax layers alone, and DeepSeek-V3's latent cache. Counts follow from the config; no JAX.
"""
import dataclasses
import math
import re
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from mmx import config
from mmx.analysis.deepseek import DeepSeekV3
from mmx.chips import CHIPS, Chip
from mmx.config import ConfigError

WEIGHTS = {"bf16": 2, "int8": 1}            # bytes a parameter; the paper holds its model in 8 bits, too (section 2.4)
BATCHES = (1, 8, 64)                        # sequences that decode together
# A token's 70,272 bytes its authors state as well (arXiv 2505.09343, table 1).
DEEPSEEK = {"weights": DeepSeekV3().params_total, "state": 0, "cache": DeepSeekV3().cache}
CLAIM = ("The paper claims an MFU over 75 % on H20 in end-to-end inference (arXiv 2501.08313, section 3). Figures here are "
         "bounds by the model's FLOPs and bytes.")


class Step(NamedTuple):
    """The least seconds that computing and moving take; the larger is the bound."""
    compute: float
    move: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.move)

    @property
    def by(self) -> str:
        return "compute" if self.compute >= self.move else "memory"

    @property
    def mfu(self) -> float:
        return self.compute / self.seconds


def held(m: config.Model) -> dict[str, float]:
    """Parameters; bytes of a sequence's state; bytes of its cache a token."""
    kinds, size = m.layer_kinds, {"bfloat16": 2, "float32": 4, "float64": 8}[m.dtype]
    return {"weights": m.params_total, "state": kinds.count("L") * m.heads * m.head_dim ** 2 * max(size, 4),
            "cache": sum(kind != "L" for kind in kinds) * 2 * m.kv_heads * m.head_dim * size}


def twin(m: config.Model) -> config.Model:
    """The same geometry, of softmax layers alone."""
    return dataclasses.replace(m, pattern="S")


def sequence(of: dict[str, float], length: int) -> float:
    """Bytes of state and cache of one sequence; `of` as `held` gives it."""
    return of["state"] + of["cache"] * length


def params_read(m: config.Model, tokens: int) -> float:
    """Parameters that a step of `tokens` tokens reads: all but the embedding, of whose rows it looks up few, and of the
    experts as many as `tokens` even draws of top_k are expected to hit."""
    idle = m.experts - m.top_k
    expert = (m.params_total - m.params_vision - m.params_active_all) / idle if idle else 0
    hit = m.experts * (1 - (1 - m.top_k / m.experts) ** tokens)
    return m.params_active_all - m.vocab * m.dim + (hit - m.top_k) * expert


def prefill(m: config.Model, chip: Chip, count: int, length: int, weight: int = 1) -> Step:
    """A prompt of `length` tokens, all at once: weights are read once, state and cache written once."""
    moved = params_read(m, length) * weight + sequence(held(m), length)
    return _step(m.flops_forward(length) * length, moved, chip, count)


def decode(m: config.Model, chip: Chip, count: int, length: int, batch: int, weight: int = 1) -> Step:
    """A token of each of `batch` sequences behind `length` others: the cache is read, states are read and written."""
    of = held(m)
    moved = params_read(m, batch) * weight + batch * (sequence(of, length) + of["state"] + of["cache"])
    # The token at place T sees T keys, as many as the mean of a causal sequence of 2 T - 1 does.
    return _step(m.flops_forward(2 * (length + 1) - 1) * batch, moved, chip, count)


def _step(flops, moved, chip, count) -> Step:
    return Step(flops / (count * chip.peak), moved / (count * chip.bandwidth))


def fits(m: config.Model, chip: Chip, count: int, length: int, batch: int = 1) -> list[str]:
    """The forms of weights that the devices hold beside so many sequences; activations are not counted."""
    of = held(m)
    return [form for form, size in WEIGHTS.items()
            if of["weights"] * size + batch * sequence(of, length) <= count * chip.memory]


def pods(text: str) -> list[tuple[str, int]]:
    """(chip, how many) of "h20:8,v6e:32"."""
    parts = [re.fullmatch(r"(\w+):([1-9][0-9]{0,5})", part.strip()) for part in text.split(",")]
    if not all(part and part[1] in CHIPS for part in parts):
        raise ConfigError(f"--chips {text}: give CHIP:COUNT with commas, such as h20:8,v6e:32; chips are {', '.join(CHIPS)}")
    return [(part[1], int(part[2])) for part in parts]


def report(m: config.Model, lengths: list[int], chips: list[tuple[str, int]]) -> dict:
    """All figures of `show`, in bytes and seconds; the rooflines are of int8 weights and bfloat16 products."""
    models = {"model": held(m), "softmax": held(twin(m)), "deepseek_v3": DEEPSEEK}
    found = {"models": {name: {form: of["weights"] * size for form, size in WEIGHTS.items()}
                        | {"state": of["state"], "cache_per_token": of["cache"]} for name, of in models.items()},
             "sequence": [{"length": T} | {name: sequence(of, T) for name, of in models.items()} for T in lengths],
             "prefill": [], "decode": []}
    for name, count in chips:
        for T in lengths:
            row = {"chip": name, "count": count, "length": T}
            step = prefill(m, CHIPS[name], count, T)
            found["prefill"].append(row | {"seconds_per_token": step.seconds / T, **_told(step),
                                           "fits": fits(m, CHIPS[name], count, T)})
            for batch in BATCHES:
                step = decode(m, CHIPS[name], count, T, batch)
                found["decode"].append(row | {"batch": batch, "seconds_per_token": step.seconds / batch, **_told(step),
                                              "fits": fits(m, CHIPS[name], count, T, batch)})
    return found


def _told(step: Step) -> dict:
    return {"seconds": step.seconds, "compute": step.compute, "memory": step.move, "bound": step.by, "mfu": step.mfu}


def show(found: dict, title: str):
    """Prints tables of a report."""
    gb = lambda size: f"{size / 1e9:,.2f} GB"
    memory = Table("", "this model", "all softmax", "DeepSeek-V3", title=title)
    for form in WEIGHTS:
        memory.add_row(f"weights, {form}", *(gb(of[form]) for of in found["models"].values()))
    memory.add_row("state of a sequence", *(gb(of["state"]) for of in found["models"].values()))
    memory.add_row("cache a token", *(f"{of['cache_per_token']:,} B" for of in found["models"].values()), end_section=True)
    for row in found["sequence"]:
        memory.add_row(f"state and cache, {row['length']:,} tokens", *(gb(row[name]) for name in found["models"]))
    read = Table("chips", "prompt", "fits in", "us a token", "s in all", "bound by", "MFU at most",
                 title="Roofline of prefill, one prompt, int8 weights, bfloat16 products")
    for row in found["prefill"]:
        read.add_row(_chips(row), f"{row['length']:,}", ", ".join(row["fits"]) or "neither",
                     f"{row['seconds_per_token'] * 1e6:,.1f}", f"{row['seconds']:,.3g}", row["bound"], f"{row['mfu']:.1%}")
    made = Table("chips", "behind", *(f"{batch} sequence{'s' * (batch > 1)}" for batch in BATCHES),
                 title="Roofline of decode, int8 weights: ms a step, bound by, MFU at most; - does not fit")
    for i in range(0, len(found["decode"]), len(BATCHES)):
        rows = found["decode"][i:i + len(BATCHES)]
        made.add_row(_chips(rows[0]), f"{rows[0]['length']:,}", *(
            f"{row['seconds'] * 1e3:,.2f} {row['bound']} {row['mfu']:.1%}" if row["fits"] else "-" for row in rows))
    for table in (memory, read, made):
        Console().print(table)
    print(CLAIM)


def _chips(row) -> str:
    return f"{row['count']} {row['chip']}"


def plot(m: config.Model, lengths: list[int], chips: list[tuple[str, int]], path: Path) -> Path:
    """Memory over length, and the bound on prefill's MFU over length, as a picture at `path`."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    first, last = (math.log2(T) for T in (min(*lengths, 128), max(lengths)))
    lengths = sorted({*lengths, *(round(2 ** (first + (last - first) * i / 64)) for i in range(65))})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for label, of in (("this model", held(m)), ("all softmax", held(twin(m))), ("DeepSeek-V3", DEEPSEEK)):
        left.plot(lengths, [sequence(of, T) / 1e9 for T in lengths], label=f"{label}: {of['cache']:,} B a token")
    left.axhline(m.params_total / 1e9, color="grey", linestyle=":", label="weights, int8")
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="GB", title="State and cache of one sequence")
    left.legend()
    for name, count in chips:
        right.plot(lengths, [100 * prefill(m, CHIPS[name], count, T).mfu for T in lengths], label=f"{count} {name}")
    right.axhline(75, color="grey", linestyle=":", label="the paper's claim, H20: over 75 %")
    right.set(xscale="log", xlabel="tokens of the prompt", ylabel="MFU at most, %", ylim=(0, 105),
              title="Roofline of prefill, int8 weights")
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
