"""The paper's claims against our rows: figures, and the table of docs/findings.md.

    python benchmarks/findings.py               # reads experiments/*.jsonl; writes experiments/*.png and docs/findings.md

A difference is taken seed by seed, and its interval is a bootstrap over seeds: the 2.5th to the 97.5th percentile of the means
of all resamples (of more than six seeds, of 10,000). Of three seeds that is the lowest to the highest. Where an arm has several
learning rates it is told at its best, of the mean over seeds. A claim says that a difference is above a bound:

    supports        the whole interval is above it
    contradicts     the whole interval is below it
    cannot tell     the bound is within the interval, or there are fewer than three seeds
    not run         there are no rows
"""
import argparse
import collections
import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.ticker
import numpy as np

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- python benchmarks/findings.py -->\n", "<!-- end -->\n"
PAPERS_SLOPE = -6.1         # of log critical batch over log loss: doublings at 2.22, 1.98, 1.77 and 1.58 nats (Fig. 13)
UNIFORM = math.log(256)         # nats of a byte that is not known at all: the loss of a run that diverged


class Claim(NamedTuple):
    text: str
    test: str                   # what was done, with a link
    measured: str = ""
    verdict: str = "not run"


class Interval(NamedTuple):
    mean: float
    low: float
    high: float
    seeds: int

    def told(self, scale=1.0, digits=3, unit="") -> str:
        mean, low, high = (f"{scale * x:.{digits}f}" for x in self[:3])
        return f"{mean}{unit} ({low} to {high})"


def interval(values) -> Interval:
    """The mean over seeds, and where 95 % of the resamples' means are."""
    values = np.array(list(values), float)
    n = len(values)
    picks = (np.array(list(itertools.product(range(n), repeat=n))) if n <= 6
             else np.random.default_rng(0).integers(n, size=(10_000, n)))
    low, high = np.quantile(values[picks].mean(1), (0.025, 0.975), method="inverted_cdf")
    return Interval(float(values.mean()), float(low), float(high), n)


def verdict(found: Interval, above: float = 0.0) -> str:
    if found.seeds < 3 or found.low <= above <= found.high:
        return "cannot tell"
    return "supports" if found.low > above else "contradicts"


def better(one: dict, other: dict) -> Interval:
    """`one` above `other`, seed by seed, of the seeds that both have."""
    return interval(one[seed] - other[seed] for seed in sorted(one.keys() & other.keys()))


def rows(name: str) -> list[dict]:
    path = ROOT / "experiments" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def arms(found: list[dict], names: tuple, score) -> dict:
    """The rows of each arm, by its values of `names`, by seed, at the learning rate whose mean of `score` is highest among
    those with most seeds."""
    by_rate = collections.defaultdict(lambda: collections.defaultdict(dict))
    for row in found:
        by_rate[tuple(row[name] for name in names)][row["lr"]][row["seed"]] = row
    return {arm: max(rates.values(), key=lambda seeds: (len(seeds), np.mean([score(row) for row in seeds.values()])))
            for arm, rates in by_rate.items()}


def over(seeds: dict, value) -> dict:
    return {seed: value(row) for seed, row in seeds.items()}


def one_rate(found: list[dict]) -> str:
    """For a test's words, where its rows have one learning rate alone."""
    rates = sorted({row["lr"] for row in found})
    return f"; at {rates[0]:g} alone" if len(rates) == 1 else ""


# --- recall ---

def answers(row: dict) -> dict[tuple, float]:
    """Accuracy by (pairs, tokens) of "mqar:pairs=4,length=32,few=..." with the most keys, which a run learns last."""
    found = {}
    for source, means in row.get("by_source", {}).items():
        numbers = {name: int(value) for name, value in (part.split("=") for part in source.partition(":")[2].split(","))}
        found[numbers.get("few", 0), numbers["pairs"], numbers["length"]] = means["accuracy"]
    most = max((few for few, *_ in found), default=0)
    return {tuple(where): value for (few, *where), value in found.items() if few == most}


def at(row: dict, where: tuple) -> float:
    """Accuracy on a task; a run that diverged has met nothing."""
    return answers(row).get(where, 0.0)


def recalled(row: dict) -> float:
    return float(np.mean(list(answers(row).values()) or [0.0]))


def accuracy(row: dict) -> float:
    return row.get("accuracy") or 0.0


def recall() -> list[Claim]:
    found = arms(rows("recall"), ("arch", "head_dim"), recalled)
    test = "[recall.py](../experiments/recall.py): MQAR, 8 to 128 pairs in 32 to 512 tokens, 8 layers of width 64"
    test += one_rate(rows("recall"))
    L, hybrid, S = ("LLLLLLLL", 16), ("LLLLLLLS", 16), ("SSSSSSSS", 16)
    parted = Claim("Hybrid and softmax above 0.95 where lightning is below 0.6 (ours)", test)
    return [retrieves(Claim(words, test), found.get(one), found.get(other), above) for words, one, other, above in (
        ("Lightning alone retrieves less than seven lightning layers to one of softmax (Fig. 7, Table 3)", hybrid, L, 0.0),
        ("That hybrid retrieves as well as softmax alone, or better (Fig. 7)", hybrid, S, -0.02),
        ("A larger linear memory helps significantly (section 2.4): lightning, heads of 32 against 8 dims",
         ("LLLLLLLL", 32), ("LLLLLLLL", 8), 0.0),
        ("One softmax layer retrieves as well in the middle as at the end (ours)", ("LLLSLLLL", 16), hybrid, -0.02),
        ("One softmax layer retrieves as well at the beginning as at the end (ours)", ("SLLLLLLL", 16), hybrid, -0.02))
    ] + [told(parted, *apart(*map(found.get, (hybrid, S, L)))) if {hybrid, S, L} <= found.keys() else parted]


def retrieves(claim: Claim, one: dict | None, other: dict | None, above: float = 0.0) -> Claim:
    """Whether one arm recalls more than another, or as much."""
    claim = claim._replace(test=claim.test + f"; a difference of {-above:g} is none" * bool(above))
    if not (one and other):
        return claim
    gap = better(over(one, recalled), over(other, recalled))
    both = " against ".join(each(arm, recalled) for arm in (one, other))
    return told(claim, f"accuracy, mean of all tasks: {both}; {gap.told()} higher", verdict(gap, above))


def apart(hybrid: dict, softmax: dict, lightning: dict) -> tuple[str, str]:
    """The task at which lightning is furthest below the lesser of the others, and whether it parts them as asked."""
    tasks = sorted({where for row in hybrid.values() for where in answers(row)})
    value = {where: [interval(at(row, where) for row in arm.values()) for arm in (hybrid, softmax, lightning)]
             for where in tasks}
    met = [where for where, (h, s, l) in value.items() if min(h.low, s.low) > 0.95 and l.high < 0.6]
    where = max(met or tasks, key=lambda where: min(x.mean for x in value[where][:2]) - value[where][2].mean)
    h, s, l = value[where]
    missed = min(h.high, s.high) < 0.95 or l.low > 0.6
    words = f"{where[0]} pairs in {where[1]} tokens: hybrid {h.told()}, softmax {s.told()}, lightning {l.told()}"
    few = min(h.seeds, s.seeds, l.seeds) < 3
    return words, "cannot tell" if few else "supports" if met else "contradicts" if missed else "cannot tell"


def each(seeds: dict, value) -> str:
    return interval(over(seeds, value).values()).told()


def told(claim: Claim, measured: str, result: str) -> Claim:
    return claim._replace(measured=measured, verdict=result)


def draw_recall(pyplot):
    found = arms(rows("recall"), ("arch", "head_dim"), recalled)
    if not found:
        return None
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), sharey=True, layout="constrained")
    pairs, far = [(n, 4 * n) for n in (8, 16, 32, 64, 128)], [(16, n) for n in (64, 128, 512)]
    for color, arch in enumerate(("LLLLLLLL", "LLLLLLLS", "SSSSSSSS", "LLLSLLLL", "SLLLLLLL")):
        for panel, tasks, which in ((0, pairs, 0), (1, far, 1)):
            if (arch, 16) in found:
                spread(axes[panel], [where[which] for where in tasks],
                       [[at(row, where) for row in found[arch, 16].values()] for where in tasks], f"C{color}", arch)
    for color, n in enumerate((8, 16, 32)):
        if ("LLLLLLLL", n) in found:
            spread(axes[2], [where[0] for where in pairs],
                   [[at(row, where) for row in found["LLLLLLLL", n].values()] for where in pairs], f"C{color + 5}",
                   f"lightning, {8 * n * n:,} numbers a layer")
    for panel, (words, title) in enumerate((("pairs, in 4 times as many tokens", "heads of 16 dims"),
                                            ("tokens that 16 pairs stand in", "heads of 16 dims"),
                                            ("pairs, in 4 times as many tokens", "size of the state"))):
        axes[panel].set(xlabel=words, title=title, ylim=(0, 1.02))
        axes[panel].set_xscale("log", base=2)
        axes[panel].grid(alpha=0.3)
        axes[panel].legend(fontsize=7)
    axes[0].set_ylabel("values recalled, of held-out queries")
    return figure


def hybrid_ratio() -> list[Claim]:
    found = arms(rows("hybrid_ratio"), ("other", "period"), recalled)
    test = "[hybrid_ratio.py](../experiments/hybrid_ratio.py): MQAR, 8 to 64 pairs in 32 to 256 tokens, 16 layers, equal FLOPs"
    test += one_rate(rows("hybrid_ratio"))
    return [retrieves(Claim(words, test), found.get(one), found.get(other), above) for words, one, other, above in (
        ("One softmax layer in eight retrieves as well as every second (section 2.4)", ("L", 8), ("L", 2), -0.02),
        ("One softmax layer in eight retrieves as well as softmax alone (Fig. 7), equal FLOPs", ("L", 8), ("L", 1), -0.02),
        ("One softmax layer in sixteen retrieves less than one in eight (ours)", ("L", 8), ("L", 16), 0.0),
        ("One softmax layer in sixteen retrieves more than none (ours)", ("L", 16), ("L", 0), 0.0),
        ("Between softmax layers lightning retrieves more than windows (Table 4): one in eight", ("L", 8), ("W", 8), 0.0),
        ("Lightning alone retrieves more than windows alone (ours)", ("L", 0), ("W", 0), 0.0))]


def draw_hybrid_ratio(pyplot):
    found = arms(rows("hybrid_ratio"), ("other", "period"), recalled)
    if not found:
        return None
    figure, axes = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    places = (0, 16, 8, 4, 2, 1)
    for color, (other, name) in enumerate((("L", "lightning"), ("W", "windows of 32 tokens"))):
        # both end in softmax alone, which is one arm
        has = {place: found[key] for place, period in enumerate(places)
               if (key := ("L" if period == 1 else other, period)) in found}
        if has:
            spread(axes, list(has), [over(seeds, recalled).values() for seeds in has.values()], f"C{color}",
                   f"the other layers: {name}")
    axes.set(xlabel="softmax layers", ylabel="values recalled, mean of all tasks", ylim=(0, 1.02))
    axes.set_xticks(range(len(places)), ["none", "1/16", "1/8", "1/4", "1/2", "all"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def spread(axes, x, values, color, label):
    """Means over seeds, and their intervals."""
    found = [interval(v) for v in values]
    axes.plot(x, [f.mean for f in found], "o-", color=color, label=label, markersize=3)
    axes.fill_between(x, [f.low for f in found], [f.high for f in found], color=color, alpha=0.15, linewidth=0)


# --- RoPE beyond the length of training ---

NEAR, FAR = "0-255", "1024-2047"


def nats(where: str):
    """A run's nats a byte there; one that diverged knows nothing."""
    return lambda row: (row["by_place"] or {}).get(where, UNIFORM)


def rope_length() -> list[Claim]:
    found = arms(rows("rope_length"), ("pattern", "turned"), minus_loss)
    test = "[rope_length.py](../experiments/rope_length.py): trained at 256 bytes, read to 2,048; {}"
    claims = []
    for pattern, kind in (("LLLS", "the hybrid"), ("S", "softmax alone")):
        none, half, full = (found.get((pattern, turned)) for turned in (0, 8, 16))
        where = test.format(kind)
        claims += [
            reaches(Claim(f"Half RoPE reaches further than was trained, without loss (section 2.4): {kind}",
                          where + "; 0.05 nats are none"), half),
            reaches(Claim(f"No RoPE does (ours): {kind}", where + "; 0.05 nats are none"), none)]
        for words, place, above in (("Half RoPE costs nothing at the length of training", NEAR, -0.01),
                                    ("Half RoPE reaches further than full RoPE", FAR, 0.0)):
            claim = Claim(f"{words}: {kind}", where + "; 0.01 nats are nothing" * bool(above))
            if half and full:
                gap = better(*(over(arm, nats(place)) for arm in (full, half)))
                both = " against ".join(each(arm, nats(place)) for arm in (half, full))
                claim = told(claim, f"nats a byte at {place}: {both}; {gap.told()} lower", verdict(gap, above))
            claims.append(claim)
    return claims


def reaches(claim: Claim, arm: dict | None) -> Claim:
    """Whether the loss far beyond the length of training is that within it, but for 0.05 nats."""
    if not arm:
        return claim
    gap = better(over(arm, nats(NEAR)), over(arm, nats(FAR)))
    return told(claim, f"nats a byte at {FAR}: {each(arm, nats(FAR))}, at {NEAR}: {each(arm, nats(NEAR))}; {gap.told()} lower",
                verdict(gap, -0.05))


def draw_rope_length(pyplot):
    found = arms(rows("rope_length"), ("pattern", "turned"), minus_loss)
    if not found:
        return None
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axes, pattern, title in zip(panels, ("LLLS", "S"), ("the hybrid, LLLS", "softmax alone")):
        for color, (turned, name) in enumerate(((0, "no RoPE"), (8, "half"), (16, "full"))):
            if (pattern, turned) in found:
                seeds = found[pattern, turned].values()
                places = max((row["by_place"] or {} for row in seeds), key=len)
                spread(axes, [int(place.partition("-")[2]) + 1 for place in places],
                       [list(map(nats(place), seeds)) for place in places], f"C{color}", name)
        axes.axvline(256, color="k", linestyle=":", label="trained to here")
        axes.set(xlabel="bytes read, up to", title=title)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("nats a byte")
    return figure


# --- experts against dense ---

def minus_loss(row):
    return -(row["loss"] if row["loss"] is not None else UNIFORM)


def moe_vs_dense() -> list[Claim]:
    found = rows("moe_vs_dense")
    test = "[moe_vs_dense.py](../experiments/moe_vs_dense.py): 16 experts, top-2, against a dense model of the same FLOPs"
    text = Claim("A mixture of experts does more than a dense model at equal FLOPs (Fig. 4): text", test + "; 8 M bytes")
    by_text = arms([row for row in found if row["task"] == "text"], ("kind",), minus_loss)
    if ("moe",) in by_text and ("dense",) in by_text:
        moe, dense = (over(by_text[kind,], minus_loss) for kind in ("moe", "dense"))
        gap = better(moe, dense)
        text = told(text, f"nats a byte: {interval(-x for x in moe.values()).told()} against "
                    f"{interval(-x for x in dense.values()).told()}; {gap.told(digits=4)} lower", verdict(gap))
    claims = [text]
    by_facts = arms([row for row in found if row["task"] == "facts"], ("count", "kind"), accuracy)
    for count in sorted({count for count, _ in by_facts}) or [0]:
        claim = Claim("The same on facts to remember" + (f": {count:,} of them" if count else ""), test)
        if (count, "moe") in by_facts and (count, "dense") in by_facts:
            moe, dense = by_facts[count, "moe"], by_facts[count, "dense"]
            gap = better(over(moe, accuracy), over(dense, accuracy))
            claim = told(claim, f"told right: {each(moe, accuracy)} against {each(dense, accuracy)}; {gap.told()} more",
                         verdict(gap))
        claims.append(claim)
    return claims


def draw_moe_vs_dense(pyplot):
    found = rows("moe_vs_dense")
    facts = arms([row for row in found if row["task"] == "facts"], ("count", "kind"), accuracy)
    text = arms([row for row in found if row["task"] == "text"], ("kind",), minus_loss)
    if not found:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for color, kind in enumerate(("dense", "moe")):
        counts = sorted(count for count, k in facts if k == kind)
        if counts:
            values = [[accuracy(row) for row in facts[count, kind].values()] for count in counts]
            spread(left, counts, values, f"C{color}", kind)
        for number, row in enumerate(text.get((kind,), {}).values()):
            tokens, loss = (np.array(row["course"][name], float) for name in ("tokens", "loss"))
            right.plot(tokens * row["flops"] / row["tokens"], loss, color=f"C{color}", label=kind if not number else None)
    left.set(xlabel="facts, of 16 random bits each", ylabel="told right", title="memory", ylim=(0, None))
    left.set_xscale("log", base=2)
    right.set(xlabel="FLOPs of training", ylabel="nats a byte, of training", title="text, a line a seed", xscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


# --- norms ---

def norm() -> list[Claim]:
    found = arms(rows("norm"), ("form", "layers"), minus_loss)
    test = "[norm.py](../experiments/norm.py): loss on text after 300 steps"
    claims = []
    for layers in sorted({layers for _, layers in found}) or [48]:
        for other, words in (("post", "DeepNorm reaches a lower loss than plain post-norm (section 2.2; DeepNorm)"),
                             ("pre", "DeepNorm reaches a lower loss than pre-norm (Table 5)")):
            one, two = found.get(("deepnorm", layers)), found.get((other, layers))
            claim = Claim(f"{words}: {layers} layers", test + one_rate([r for r in rows("norm") if r["layers"] == layers]))
            if one and two:
                gap = better(over(one, minus_loss), over(two, minus_loss))
                failed = [sum(row["loss"] is None or row["loss"] > 3 for row in arm.values()) for arm in (one, two)]
                words = f"; failed {failed[0]} of {len(one)} and {failed[1]} of {len(two)}" if any(failed) else ""
                claim = told(claim, f"nats a byte: {each(one, lambda row: -minus_loss(row))} against "
                             f"{each(two, lambda row: -minus_loss(row))}; {gap.told()} lower{words}", verdict(gap))
            claims.append(claim)
    return claims


def draw_norm(pyplot):
    found = arms(rows("norm"), ("form", "layers"), minus_loss)
    if not found:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    deepest = max(layers for _, layers in found)
    for color, form in enumerate(("deepnorm", "pre", "post")):
        depths = sorted(layers for f, layers in found if f == form)
        spread(left, depths, [[-minus_loss(row) for row in found[form, n].values()] for n in depths], f"C{color}", form)
        for number, row in enumerate(found.get((form, deepest), {}).values()):
            right.plot([math.nan if x is None else x for x in row["layer_norms"]], color=f"C{color}",
                       label=form if not number else None)
    left.set(xlabel="layers", ylabel="nats a byte, held out", title="a run that diverged counts as log 256")
    right.set(xlabel="layer", ylabel="norm of its gradient", title=f"{deepest} layers, last steps, a line a seed", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


# --- router ---

def router() -> list[Claim]:
    found = collections.defaultdict(dict)
    for row in rows("router"):
        found[row["capacity"], row["shards"]][row["seed"]] = row
    test = "[router.py](../experiments/router.py): routing of trained models, one capacity against one for each of {} shards"
    claims, most = [], max((shards for _, shards in found), default=32)
    for capacity in sorted({c for c, _ in found if c}) or [1.25]:
        claim = Claim(f"A global capacity drops fewer tokens (section 2.1): factor {capacity}", test.format(most))
        whole, cut = found.get((capacity, 1)), found.get((capacity, most))
        if whole and cut:
            one, two = (over(x, lambda row: row["dropped"]) for x in (cut, whole))
            gap = better(one, two)
            loss = better(*(over(x, lambda row: row["loss"]) for x in (cut, whole)))
            both = " against ".join(interval(x.values()).told(100, 2) for x in (two, one))
            claim = told(claim, f"dropped %: {both}; {gap.told(100, 2)} fewer, and {loss.told(digits=4)} nats",
                         verdict(gap))
        claims.append(claim)
    return claims


def draw_router(pyplot):
    found = collections.defaultdict(list)
    for row in rows("router"):
        if row["capacity"]:
            found[row["shards"], row["capacity"]].append(row)
    if not found:
        return None
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    whole = [row["loss"] for row in rows("router") if not row["capacity"]]
    for color, shards in enumerate(sorted({shards for shards, _ in found})):
        capacities = sorted(c for s, c in found if s == shards)
        for axes, name, scale in zip(panels, ("dropped", "loss"), (100, 1)):
            spread(axes, capacities, [[scale * row[name] for row in found[shards, c]] for c in capacities], f"C{color}",
                   "global" if shards == 1 else f"each of {shards} shards")
    panels[1].axhline(np.mean(whole), color="k", linestyle=":", label="nothing dropped")
    for axes, words in zip(panels, ("dropped assignments, %", "nats a byte, held out")):
        axes.set(xlabel="capacity factor", ylabel=words)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


# --- needles, critical batch, padding ---

def needle() -> list[Claim]:
    path = ROOT / "experiments" / "results" / "needle.jsonl"
    scores = collections.defaultdict(lambda: collections.defaultdict(list))
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        scores[row["kind"], row["length"]][row["seed"]].append(row["score"])
    claims, test = [], "[needle.py](../experiments/needle.py), [page](needle.md): three kinds, trained to 1,024 tokens"
    for length, words in ((1024, "at the length of training"), (16384, "at 16 times that length")):
        for other in ("softmax", "lightning"):
            claim = Claim(f"The hybrid retrieves better than {other} alone (section 2.2.2, Fig. 7), {words}", test)
            both = [over(scores.get((kind, length), {}), np.mean) for kind in ("hybrid", other)]
            if all(both):
                gap = better(*both)
                claim = told(claim, f"right %: {interval(both[0].values()).told(100, 0)} against "
                             f"{interval(both[1].values()).told(100, 0)}; {gap.told(100, 0)} more", verdict(gap))
            claims.append(claim)
    return claims


def noise(row: dict) -> list[tuple[float, float]]:
    """(loss, noise scale in tokens) along a run, from the norms of micro-batches' gradients and of their mean's.

    Of batches of b and B tokens E|G_b|^2 = |G|^2 + S / b: two equations for S and |G|^2, whose quotient is the noise scale
    (McCandlish et al., arXiv 1812.06162, appendix A). Parts of a run where noise hides the gradient (|G|^2 <= 0) tell nothing.
    """
    big = row["tokens"] / row["steps"]
    small = big / row["micro"]
    found = []
    parts = list(zip(*(row["course"][name] for name in ("loss", "micro_norm", "grad_norm"))))
    for loss, one, many in parts[len(parts) // 10:]:        # in the first tenth the learning rate still rises
        if None in (loss, one, many):
            continue
        signal = (big * many ** 2 - small * one ** 2) / (big - small)
        spread = (one ** 2 - many ** 2) / (1 / small - 1 / big)
        if signal > 0 and spread > 0:
            found.append((loss, spread / signal))
    return found


def slope(points) -> float:
    """Of log noise scale over log loss."""
    loss, scale = np.log(np.array(points)).T
    return float(np.polyfit(loss, scale, 1)[0])


def by_seed(found: list[dict]) -> dict:
    """All sizes' points of a seed."""
    points = collections.defaultdict(list)
    for row in found:
        points[row["seed"]] += noise(row)
    return points


def critical_batch() -> list[Claim]:
    test = "[critical_batch.py](../experiments/critical_batch.py): gradient noise scale of three sizes as loss^-p"
    claims = [Claim("The critical batch grows as the loss falls (Fig. 13)", test),
              Claim("It grows as loss^-6.1, or faster (the slope of Fig. 13's four points)", test)]
    found = rows("critical_batch")
    powers = {seed: -slope(points) for seed, points in by_seed(found).items() if len(points) > 2}
    if powers:
        of_size = [(dim, interval(-slope(noise(row)) for row in found if row["dim"] == dim and len(noise(row)) > 2))
                   for dim in sorted({row["dim"] for row in found})]
        words = f"p = {interval(powers.values()).told(digits=2)} of all together; " + ", ".join(
            f"{power.told(digits=1)} at width {dim}" for dim, power in of_size)
        claims = [told(claims[0], words, verdict(interval(powers.values()))),
                  told(claims[1], words, verdict(interval(powers.values()), -PAPERS_SLOPE))]
    return claims


def draw_critical_batch(pyplot):
    found = rows("critical_batch")
    if not found:
        return None
    figure, axes = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    every = []
    for color, dim in enumerate(sorted({row["dim"] for row in found})):
        points = [point for row in found if row["dim"] == dim for point in noise(row)]
        every += points
        if points:
            axes.loglog(*zip(*points), ".", color=f"C{color}", label=f"width {dim}")
    if len(every) > 2:
        loss, scale = np.log(np.array(every)).T
        ends = np.array([loss.min(), loss.max()])
        for power, style, words in ((slope(every), "-", "fitted"), (PAPERS_SLOPE, ":", "the paper's slope")):
            axes.plot(np.exp(ends), np.exp(scale.mean() + power * (ends - loss.mean())), "k" + style, linewidth=1,
                      label=f"loss^{power:.1f}, {words}")
    axes.set(xlabel="nats a byte, of training", ylabel="gradient noise scale, tokens", title="all seeds")
    axes.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(0.2))
    axes.xaxis.set_major_formatter("{x:.1f}")
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.invert_xaxis()
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return figure


def padding() -> list[Claim]:
    found = collections.defaultdict(dict)
    for row in rows("padding"):
        found[row["median"]][row["seed"]] = row
    test = "`python benchmarks/padding.py`: counted on 1,000 lognormal lengths a seed, median {}"
    claims = []
    for median in sorted(found) or [512]:
        cells = found.get(median, {})
        both = [(f"Packing needs less than samples padded to 256 (sections 3.2.2, 4.2): median {median}", "blocks", "packed"),
                (f"Blocks of 32 to 256 pad less than 256 alone (section 3.3.3): median {median}", "blocks", "levels")]
        for words, more, less in both:
            claim = Claim(words, test.format(median))
            if cells:
                one, two = ({seed: row[name] for seed, row in cells.items()} for name in (more, less))
                gap = better(one, two)
                claim = told(claim, f"padding, % of the tokens: {interval(two.values()).told(100, 1)} against "
                             f"{interval(one.values()).told(100, 1)}; {gap.told(100, 1)} less", verdict(gap))
            claims.append(claim)
    return claims


def length() -> list[Claim]:
    found = collections.defaultdict(dict)
    for row in rows("length"):
        if row["kind"] == "L":
            found[row["tokens"]][row["seed"]] = row["tokens_per_s"]
    claim = Claim("Training speed does not fall with the length (section 2.2.2.4)",
                  "`python benchmarks/length.py`: one lightning layer, forward and backward, on CPU cores; passes stand for "
                  "seeds; a loss of 5 % is none")
    if len(found) < 2:
        return [claim]
    near, far = min(found), max(found)
    kept = interval(found[far][n] / found[near][n] for n in sorted(found[near].keys() & found[far].keys()))
    return [told(claim, f"of the tokens/s at {near:,} tokens {kept.told(100, 0, ' %')} are kept at {far:,}",
                 verdict(kept, 0.95))]


PARTS = {"Retrieval": (recall, hybrid_ratio, needle), "Length": (rope_length,), "Experts": (moe_vs_dense, router),
         "Training": (norm, critical_batch), "Cost": (padding, length)}
FIGURES = {"recall": draw_recall, "hybrid_ratio": draw_hybrid_ratio, "rope_length": draw_rope_length,
           "moe_vs_dense": draw_moe_vs_dense, "norm": draw_norm, "router": draw_router, "critical_batch": draw_critical_batch}


def table() -> str:
    lines = []
    for title, functions in PARTS.items():
        lines += [f"\n## {title}\n", "| the paper's claim | our test | what came out | |", "|---|---|---|---|"]
        lines += [f"| {c.text} | {c.test} | {c.measured or 'not run'} | **{c.verdict}** |" for f in functions for c in f()]
    names = [name for name in FIGURES if rows(name)]
    figures = "".join(f"\n![{name}](../experiments/{name}.png)\n" for name in names)
    return "\n".join(lines).lstrip("\n") + "\n" + figures


def page(text: str) -> str:
    """The page with its table as the rows have it."""
    head, _, rest = text.partition(BEGIN)
    return head + BEGIN + table() + END + rest.partition(END)[2]


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    matplotlib.use("Agg")
    from matplotlib import pyplot

    for name, draw in FIGURES.items():
        if figure := draw(pyplot):
            figure.savefig(ROOT / "experiments" / f"{name}.png", dpi=110, metadata={"Software": None})
            print(f"figure: experiments/{name}.png")
    path = ROOT / "docs" / "findings.md"
    path.write_text(page(path.read_text()))
    print(f"page: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
