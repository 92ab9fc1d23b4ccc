"""`mmx memory`: what a sequence takes in memory, and rooflines of prefill and decode.

    weights   parameters x 2 bytes (bfloat16) or 1 (int8)
    state     what layers keep of a sequence whatever its length, as lightning layers do
    cache     what layers keep of each token, as softmax layers do, in the dtype of the computation
    step      at least max(FLOPs / peak, bytes / bandwidth) of all devices: a roofline, not a measurement

The same geometry with softmax layers only, and DeepSeek-V3's latent cache, are reported beside it. No array is created.
"""
import dataclasses
import math
import re
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from mmx import config
from mmx.analysis.counts import cache_bytes, count_params, flops_forward
from mmx.analysis.deepseek import DeepSeekV3
from mmx.chips import CHIPS, Chip
from mmx.config import ConfigError

WEIGHTS = {"bf16": 2, "int8": 1}            # bytes a parameter; the paper runs inference in 8 bits (section 2.4)
BATCHES = (1, 8, 64)                        # sequences that decode together
CLAIM = ("The paper claims an MFU over 75 % on H20 in end-to-end inference (arXiv 2501.08313, section 3). The figures here are "
         "bounds from the model's FLOPs and bytes.")


class Footprint(NamedTuple):
    """What a model, and one sequence in it, take in memory."""
    params: int             # number of parameters
    state: int              # bytes of a sequence's state, whatever its length
    per_token: int          # bytes of its cache for each token

    def sequence(self, length: int) -> int:
        """Bytes of state and cache of a sequence of `length` tokens."""
        return self.state + self.per_token * length


DEEPSEEK = Footprint(DeepSeekV3().params_total, 0, DeepSeekV3().cache)      # 70,272 bytes a token: arXiv 2505.09343, table 1


class Step(NamedTuple):
    """The least seconds that computing and moving take; the larger is the bound."""
    compute: float
    move: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.move)

    @property
    def bound(self) -> str:
        """What limits the step: "compute" or "memory"."""
        return "compute" if self.compute >= self.move else "memory"

    @property
    def mfu(self) -> float:
        """The largest possible model FLOP utilization."""
        return self.compute / self.seconds


def footprint(m: config.Model) -> Footprint:
    """The footprint of a model, with its cache in the dtype of the computation."""
    kept = cache_bytes(m)
    return Footprint(count_params(m).total, kept.state, kept.per_token)


def all_softmax(m: config.Model) -> config.Model:
    """The same geometry with softmax layers only."""
    return dataclasses.replace(m, pattern="S")


def params_read(m: config.Model, tokens: int) -> float:
    """The expected number of parameters that a step of `tokens` tokens reads.

    The embedding does not count, because few of its rows are read. Of the experts, the expected number that the tokens select
    counts if each token draws top_k experts uniformly. All other parameters count.
    """
    counts, idle = count_params(m), m.experts - m.top_k
    expert = (counts.total - counts.vision - counts.active_all) / idle if idle else 0
    selected = m.experts * (1 - (1 - m.top_k / m.experts) ** tokens)
    return counts.active_all - m.vocab * m.dim + (selected - m.top_k) * expert


def prefill(m: config.Model, chip: Chip, count: int, length: int, weight: int = 1) -> Step:
    """The roofline of reading a prompt of `length` tokens at once on `count` chips, with `weight` bytes a parameter.

    Weights are read once, state and cache are written once.
    """
    moved = params_read(m, length) * weight + footprint(m).sequence(length)
    return _step(flops_forward(m, length) * length, moved, chip, count)


def decode(m: config.Model, chip: Chip, count: int, length: int, batch: int, weight: int = 1) -> Step:
    """The roofline of one token for each of `batch` sequences of `length` tokens: caches are read, states read and written."""
    of = footprint(m)
    moved = params_read(m, batch) * weight + batch * (of.sequence(length) + of.state + of.per_token)
    # The last token of T attends to T keys, as many as the mean of a causal sequence of 2 T - 1.
    return _step(flops_forward(m, 2 * (length + 1) - 1) * batch, moved, chip, count)


def _step(flops, moved, chip, count) -> Step:
    return Step(flops / (count * chip.peak), moved / (count * chip.bandwidth))


def fitting_weights(m: config.Model, chip: Chip, count: int, length: int, batch: int = 1) -> list[str]:
    """The forms of weights that fit on the chips beside `batch` sequences; activations are not counted."""
    of = footprint(m)
    return [form for form, size in WEIGHTS.items() if of.params * size + batch * of.sequence(length) <= count * chip.memory]


def pods(text: str) -> list[tuple[str, int]]:
    """(chip, number of chips) of each entry in "h20:8,v6e:32"."""
    parts = [re.fullmatch(r"(\w+):([1-9][0-9]{0,5})", part.strip()) for part in text.split(",")]
    if not all(part and part[1] in CHIPS for part in parts):
        raise ConfigError(f"--chips {text} must be CHIP:COUNT with commas, such as h20:8,v6e:32; chips: {', '.join(CHIPS)}")
    return [(part[1], int(part[2])) for part in parts]


def report(m: config.Model, lengths: list[int], chips: list[tuple[str, int]]) -> dict:
    """All figures that `show` prints, in bytes and seconds; rooflines with int8 weights and bfloat16 products."""
    models = {"model": footprint(m), "softmax": footprint(all_softmax(m)), "deepseek_v3": DEEPSEEK}
    found = {"models": {name: {form: of.params * size for form, size in WEIGHTS.items()}
                        | {"state": of.state, "cache_per_token": of.per_token} for name, of in models.items()},
             "sequence": [{"length": T} | {name: of.sequence(T) for name, of in models.items()} for T in lengths],
             "prefill": [], "decode": []}
    for name, count in chips:
        for T in lengths:
            row = {"chip": name, "count": count, "length": T}
            step = prefill(m, CHIPS[name], count, T)
            found["prefill"].append(row | {"seconds_per_token": step.seconds / T, **_figures(step),
                                           "fits": fitting_weights(m, CHIPS[name], count, T)})
            for batch in BATCHES:
                step = decode(m, CHIPS[name], count, T, batch)
                found["decode"].append(row | {"batch": batch, "seconds_per_token": step.seconds / batch, **_figures(step),
                                              "fits": fitting_weights(m, CHIPS[name], count, T, batch)})
    return found


def _figures(step: Step) -> dict:
    return {"seconds": step.seconds, "compute": step.compute, "memory": step.move, "bound": step.bound, "mfu": step.mfu}


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
    read = Table("chips", "prompt", "fits in", "us a token", "s in total", "bound by", "MFU at most",
                 title="Roofline of prefill, one prompt, int8 weights, bfloat16 products")
    for row in found["prefill"]:
        read.add_row(_chips(row), f"{row['length']:,}", ", ".join(row["fits"]) or "neither",
                     f"{row['seconds_per_token'] * 1e6:,.1f}", f"{row['seconds']:,.3g}", row["bound"], f"{row['mfu']:.1%}")
    made = Table("chips", "tokens before", *(f"{batch} sequence{'s' * (batch > 1)}" for batch in BATCHES),
                 title="Roofline of decode, int8 weights: ms a step, bound, MFU at most; -: out of memory")
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
    """Plots memory over length, and the bound on prefill's MFU over length, to `path`."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    first, last = (math.log2(T) for T in (min(*lengths, 128), max(lengths)))
    lengths = sorted({*lengths, *(round(2 ** (first + (last - first) * i / 64)) for i in range(65))})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for label, of in (("this model", footprint(m)), ("all softmax", footprint(all_softmax(m))), ("DeepSeek-V3", DEEPSEEK)):
        left.plot(lengths, [of.sequence(T) / 1e9 for T in lengths], label=f"{label}: {of.per_token:,} B a token")
    left.axhline(footprint(m).params / 1e9, color="grey", linestyle=":", label="weights, int8")
    left.set(xscale="log", yscale="log", xlabel="length, tokens", ylabel="memory, GB", title="State and cache of one sequence")
    left.legend()
    for name, count in chips:
        right.plot(lengths, [100 * prefill(m, CHIPS[name], count, T).mfu for T in lengths], label=f"{count} {name}")
    right.axhline(75, color="grey", linestyle=":", label="the paper's claim, H20: over 75 %")
    right.set(xscale="log", xlabel="prompt, tokens", ylabel="largest MFU, %", ylim=(0, 105),
              title="Roofline of prefill, int8 weights")
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
