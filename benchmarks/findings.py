"""The paper's claims against our rows: figures, and the table of docs/findings.md.

    python benchmarks/findings.py               # reads experiments/*.jsonl; writes experiments/*.png and docs/findings.md

A difference is taken seed by seed, and its interval is a bootstrap over seeds: the 2.5th to the 97.5th percentile of the means
of all resamples (of more than six seeds, of 10,000). Of three seeds that is the lowest to the highest. Where an arm has several
learning rates it is told at its best, of the mean over seeds. A claim says of two arms that the first has more of something, or
less, by a bound:

    supports        the whole interval of the difference is beyond it
    contradicts     the whole interval is short of it
    cannot tell     the bound is within the interval, or there are fewer than three seeds
    not run         there are no rows
"""
import argparse
import collections
import hashlib
import itertools
import json
import math
import operator
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.ticker
import numpy as np

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- python benchmarks/findings.py -->\n", "<!-- end -->\n"
PAPERS_BATCHES = ((2.22, 16e6), (1.98, 32e6), (1.77, 64e6), (1.58, 128e6))        # doubled at these losses, tokens (Fig. 13)
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

    def told(self, scale=1.0, digits=3, unit="", sign="") -> str:
        mean, low, high = (f"{scale * x:{sign}.{digits}f}" for x in self[:3])
        return f"{mean}{unit} ({low} to {high})"


class Arm(NamedTuple):
    seeds: dict                 # the row of each seed
    rate: str                   # the learning rate, and of which


def interval(values) -> Interval:
    """The mean over seeds, and where 95 % of the resamples' means are."""
    values = np.array(list(values), float)
    n = len(values)
    if not n:
        return Interval(math.nan, math.nan, math.nan, 0)
    picks = (np.array(list(itertools.product(range(n), repeat=n))) if n <= 6
             else np.random.default_rng(0).integers(n, size=(10_000, n)))
    low, high = np.quantile(values[picks].mean(1), (0.025, 0.975), method="inverted_cdf")
    return Interval(float(values.mean()), float(low), float(high), n)


def verdict(found: Interval, above: float = 0.0) -> str:
    if found.seeds < 3:
        return "cannot tell"
    return "supports" if found.low > above else "contradicts" if found.high < above else "cannot tell"


def better(one: dict, other: dict) -> Interval:
    """`one` above `other`, seed by seed, of the seeds that both have."""
    return interval(one[seed] - other[seed] for seed in sorted(one.keys() & other.keys()))


def compared(claim: Claim, what: str, pair: dict, bound: float = 0.0, lower: bool = False, scale: float = 1.0,
             digits: int = 3) -> Claim:
    """The claim that of two arms, {name: (arm, a row's value, or its name)}, the first has more of `what`, by over `bound`.

    `lower`: it has less. A bound below 0: it has as much, but for that.
    """
    test = claim.test + rates({name: arm for name, (arm, _) in pair.items() if arm})
    test += f"; {abs(scale * bound):g} {'less' if (bound < 0) != lower else 'more'} is none" * bool(bound)
    values = {name: over(arm, value if callable(value) else operator.itemgetter(value)) for name, (arm, value) in pair.items()}
    if not all(values.values()):
        return claim._replace(test=test)
    one, other = values.values()
    found = ", ".join(f"{name} {interval(seeds.values()).told(scale, digits)}" for name, seeds in values.items())
    return Claim(claim.text, test, f"{what}: {found}: {better(one, other).told(scale, digits, sign='+')}",
                 verdict(better(other, one) if lower else better(one, other), bound))


def over(arm: Arm | None, value) -> dict:
    """A number for each seed."""
    return {seed: value(row) for seed, row in arm.seeds.items()} if arm else {}


def rates(named: dict[str, Arm]) -> str:
    """For a test's words: the learning rates of arms, once where they are the same."""
    told = {name: arm.rate for name, arm in named.items() if arm.rate}
    if len(set(told.values())) == 1:
        return f"; rate {next(iter(told.values()))}"
    return "; rates: " + ", ".join(f"{name} {rate}" for name, rate in told.items()) if told else ""


def rows(name: str) -> list[dict]:
    path = ROOT / "experiments" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def arms(found: list[dict], names: tuple, score) -> dict[tuple, Arm]:
    """Each arm, by its values of `names`, at the learning rate whose mean of `score` is highest among those with most seeds."""
    by_rate = collections.defaultdict(lambda: collections.defaultdict(dict))
    for row in found:
        by_rate[tuple(row[name] for name in names)][row["lr"]][row["seed"]] = row
    best = {arm: max(tried, key=lambda lr: (len(tried[lr]), np.mean([score(row) for row in tried[lr].values()])))
            for arm, tried in by_rate.items()}
    return {arm: Arm(tried[best[arm]], _rate(best[arm], tried)) for arm, tried in by_rate.items()}


def _rate(best: float, tried) -> str:
    return f"{best:g} of " + ", ".join(f"{lr:g}" for lr in sorted(tried)) if len(tried) > 1 else f"{best:g} alone"


def fixed(found: list[dict], *names: str, rate: str = "") -> dict[tuple, Arm]:
    """Arms whose rows tell no learning rate."""
    by_arm = collections.defaultdict(dict)
    for row in found:
        by_arm[tuple(row[name] for name in names)][row["seed"]] = row
    return {arm: Arm(seeds, rate) for arm, seeds in by_arm.items()}


def loss(row: dict) -> float:
    """Nats; a run that diverged knows nothing."""
    return row["loss"] if row["loss"] is not None else UNIFORM


def minus_loss(row: dict) -> float:
    return -loss(row)


def sha256(name: str) -> str:
    """Of an experiment's rows; its figure has it, so that a test can tell whether it is of these rows."""
    return hashlib.sha256((ROOT / "experiments" / f"{name}.jsonl").read_bytes()).hexdigest()


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
    pure, hybrid, softmax = {"lightning": ("LLLLLLLL", 16)}, {"hybrid": ("LLLLLLLS", 16)}, {"softmax": ("SSSSSSSS", 16)}
    last = {"last": ("LLLLLLLS", 16)}
    claims = [retrieves(Claim(words, test), found, pair, bound) for words, pair, bound in (
        ("Seven lightning layers and one of softmax retrieve more than lightning alone (Fig. 7)", hybrid | pure, 0.02),
        ("That hybrid retrieves as well as softmax alone, or better (Fig. 7)", hybrid | softmax, -0.02),
        ("A larger linear memory helps significantly (section 2.4): lightning by the size of its heads",
         {"32 dims": ("LLLLLLLL", 32), "8 dims": ("LLLLLLLL", 8)}, 0.02),
        ("The softmax layer does as well in the middle (ours)", {"4th of 8": ("LLLSLLLL", 16)} | last, -0.02),
        ("The softmax layer does as well at the beginning (ours)", {"first": ("SLLLLLLL", 16)} | last, -0.02))]
    kinds = {name: found.get(key) for name, key in (hybrid | softmax | pure).items()}
    parted = Claim("Hybrid and softmax above 0.95 where lightning is below 0.6 (ours)", test)
    if all(kinds.values()):
        parted = Claim(parted.text, test + rates(kinds), *apart(*(arm.seeds for arm in kinds.values())))
    return [*claims, parted]


def retrieves(claim: Claim, found: dict, pair: dict, bound: float) -> Claim:
    pair = {name: (found.get(key), recalled) for name, key in pair.items()}
    return compared(claim, "accuracy, mean of all tasks", pair, bound)


def apart(hybrid: dict, softmax: dict, lightning: dict) -> tuple[str, str]:
    """The task at which lightning is furthest below the lesser of the others, and whether it parts them as asked."""
    tasks = sorted({where for arm in (hybrid, softmax, lightning) for row in arm.values() for where in answers(row)})
    if not tasks:           # all diverged
        return "", "cannot tell"
    value = {where: [interval(at(row, where) for row in arm.values()) for arm in (hybrid, softmax, lightning)]
             for where in tasks}
    met = [where for where, (h, s, l) in value.items() if min(h.low, s.low) > 0.95 and l.high < 0.6]
    where = max(met or tasks, key=lambda where: min(x.mean for x in value[where][:2]) - value[where][2].mean)
    h, s, l = value[where]
    missed = min(h.high, s.high) < 0.95 or l.low > 0.6
    words = f"{where[0]} pairs in {where[1]} tokens: hybrid {h.told()}, softmax {s.told()}, lightning {l.told()}"
    few = min(h.seeds, s.seeds, l.seeds) < 3
    return words, "cannot tell" if few else "supports" if met else "contradicts" if missed else "cannot tell"


def draw_recall(pyplot):
    found = arms(rows("recall"), ("arch", "head_dim"), recalled)
    if not found:
        return None
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), sharey=True, layout="constrained")
    pairs, far = [(n, 4 * n) for n in (8, 16, 32, 64, 128)], [(16, n) for n in (64, 128, 512)]
    for color, (arch, style) in enumerate((("LLLLLLLL", "o-"), ("LLLLLLLS", "o-"), ("SSSSSSSS", "o-"), ("LLLSLLLL", "s--"),
                                           ("SLLLLLLL", "s--"))):
        for panel, tasks, which in ((0, pairs, 0), (1, far, 1)):
            if (arch, 16) in found:
                values = [[at(row, where) for row in found[arch, 16].seeds.values()] for where in tasks]
                spread(axes[panel], [where[which] for where in tasks], values, f"C{color}", arch, style)
    for color, n in enumerate((8, 16, 32)):
        if ("LLLLLLLL", n) in found:
            spread(axes[2], [where[0] for where in pairs],
                   [[at(row, where) for row in found["LLLLLLLL", n].seeds.values()] for where in pairs], f"C{color + 5}",
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
    eighth = {"1/8": ("L", 8)}
    return [retrieves(Claim(words, test), found, pair, bound) for words, pair, bound in (
        ("One softmax layer in eight retrieves as well as every second (section 2.4)", eighth | {"1/2": ("L", 2)}, -0.02),
        ("One softmax layer in eight retrieves as well as every fourth (section 2.4)", eighth | {"1/4": ("L", 4)}, -0.02),
        ("One softmax layer in eight retrieves as well as softmax alone (Fig. 7)", eighth | {"softmax": ("L", 1)}, -0.02),
        ("One softmax layer in eight retrieves more than one in sixteen (ours)", eighth | {"1/16": ("L", 16)}, 0.02),
        ("One softmax layer in sixteen retrieves more than none (ours)", {"1/16": ("L", 16), "none": ("L", 0)}, 0.02),
        ("Between softmax layers, one in eight, lightning retrieves more than windows of 32 (Table 4)",
         {"lightning": ("L", 8), "windows": ("W", 8)}, 0.02),
        *((f"The same, one in {period} (ours)", {"lightning": ("L", period), "windows": ("W", period)}, 0.02)
          for period in (2, 4, 16)),
        ("Lightning alone retrieves more than windows alone (ours)", {"lightning": ("L", 0), "windows": ("W", 0)}, 0.02))]


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
            spread(axes, list(has), [over(arm, recalled).values() for arm in has.values()], f"C{color}",
                   f"the other layers: {name}")
    axes.set(xlabel="softmax layers", ylabel="values recalled, mean of all tasks", ylim=(0, 1.02))
    axes.set_xticks(range(len(places)), ["none", "1/16", "1/8", "1/4", "1/2", "all"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def spread(axes, x, values, color, label, style="o-"):
    """Means over seeds, and their intervals."""
    found = [interval(v) for v in values]
    axes.plot(x, [f.mean for f in found], style, color=color, label=label, markersize=3)
    axes.fill_between(x, [f.low for f in found], [f.high for f in found], color=color, alpha=0.15, linewidth=0)


# --- RoPE beyond the length of training ---

NEAR, FAR = "0-255", "1024-2047"


def nats(where: str):
    """A run's nats a byte there; one that diverged knows nothing."""
    return lambda row: (row["by_place"] or {}).get(where, UNIFORM)


def rope_length() -> list[Claim]:
    found = arms(rows("rope_length"), ("pattern", "turned"), minus_loss)
    claims, what = [], "nats a byte"
    for pattern, kind in (("LLLS", "the hybrid"), ("S", "softmax alone")):
        test = f"[rope_length.py](../experiments/rope_length.py): trained at 256 bytes, read to 2,048; {kind}"
        none, half, full = (found.get((pattern, turned)) for turned in (0, 8, 16))
        for words, arm in (("Half RoPE reaches further than was trained, without loss (section 2.4)", half),
                           ("No RoPE does (ours)", none)):
            pair = {f"bytes {place}": (arm, nats(place)) for place in (FAR, NEAR)}
            claims.append(compared(Claim(f"{words}: {kind}", test), what, pair, -0.05, lower=True))
        for words, place, bound in (("Half RoPE costs nothing against full RoPE within the trained length", NEAR, -0.01),
                                    ("Half RoPE reaches further than full RoPE", FAR, 0.0)):
            pair = {"half": (half, nats(place)), "full": (full, nats(place))}
            claims.append(compared(Claim(f"{words}: {kind}", f"{test}; bytes {place}"), what, pair, bound, lower=True))
    return claims


def draw_rope_length(pyplot):
    found = arms(rows("rope_length"), ("pattern", "turned"), minus_loss)
    if not found:
        return None
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axes, pattern, title in zip(panels, ("LLLS", "S"), ("the hybrid, LLLS", "softmax alone")):
        for color, (turned, name) in enumerate(((0, "no RoPE"), (8, "half"), (16, "full"))):
            if (pattern, turned) in found:
                seeds = found[pattern, turned].seeds.values()
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

def moe_vs_dense() -> list[Claim]:
    test = "[moe_vs_dense.py](../experiments/moe_vs_dense.py): 16 experts, top-2, against a dense model of the same FLOPs"
    text, facts = by_task()
    first = Claim("A mixture of experts does more than a dense model at equal FLOPs (Fig. 4): text", test + "; 8 M bytes")
    pair = {"MoE": (text.get(("moe",)), loss), "dense": (text.get(("dense",)), loss)}
    return [compared(first, "nats a byte", pair, lower=True)] + [
        compared(Claim(f"The same on facts to remember, {count:,} of them", test), "told right",
                 {"MoE": (facts.get((count, "moe")), accuracy), "dense": (facts.get((count, "dense")), accuracy)})
        for count in sorted({count for count, _ in facts}) or [65536]]


def by_task() -> tuple[dict, dict]:
    """Arms of text by kind, and of facts by count and kind."""
    text, facts = ([row for row in rows("moe_vs_dense") if row["task"] == task] for task in ("text", "facts"))
    return arms(text, ("kind",), minus_loss), arms(facts, ("count", "kind"), accuracy)


def draw_moe_vs_dense(pyplot):
    text, facts = by_task()
    if not (text or facts):
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for color, kind in enumerate(("dense", "moe")):
        counts = sorted(count for count, k in facts if k == kind)
        if counts:
            values = [[accuracy(row) for row in facts[count, kind].seeds.values()] for count in counts]
            spread(left, counts, values, f"C{color}", kind)
        for number, row in enumerate(text[kind,].seeds.values() if (kind,) in text else ()):
            tokens, nats = (np.array(row["course"].get(name, []), float) for name in ("tokens", "loss"))
            right.plot(tokens * row["flops"] / row["tokens"], nats, color=f"C{color}", label=kind if not number else None)
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
    test = "[norm.py](../experiments/norm.py): text, 300 steps"
    claims = []
    for layers in sorted({layers for _, layers in found}) or [48]:
        deep, pre, post = (found.get((form, layers)) for form in ("deepnorm", "pre", "post"))
        for words, name, other in (("DeepNorm reaches a lower loss than plain post-norm (DeepNorm's paper)", "post-norm", post),
                                   ("DeepNorm reaches a lower loss than pre-norm (Table 5)", "pre-norm", pre)):
            pair = {"DeepNorm": (deep, loss), name: (other, loss)}
            claim = compared(Claim(f"{words}: {layers} layers", test), "nats a byte", pair, lower=True)
            failed = {name: sum(value(row) > 3 for row in arm.seeds.values()) for name, (arm, value) in pair.items() if arm}
            words = "".join(f"; {name} failed {n} of {len(pair[name][0].seeds)} times" for name, n in failed.items() if n)
            claims.append(claim._replace(measured=claim.measured + words))
        claims.append(compared(
            Claim(f"DeepNorm's gradient reaches the first layers, plain post-norm's fades (ours): {layers} layers", test),
            "orders of magnitude lost from the last quarter of the layers to the first",
            {"DeepNorm": (deep, faded), "post-norm": (post, faded)}, lower=True, digits=2))
    return claims


def faded(row: dict) -> float:
    """Orders of magnitude between the norms of the last and the first quarter of the layers' gradients."""
    norms = [math.nan if x is None else x for x in row["layer_norms"]]
    quarter = len(norms) // 4
    return math.log10(np.mean(norms[-quarter:]) / np.mean(norms[:quarter])) if quarter else math.nan


def draw_norm(pyplot):
    found, best = (arms(rows("norm"), names, minus_loss) for names in (("form", "layers", "lr"), ("form", "layers")))
    if not found:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    deepest, tried = max(layers for _, layers, _ in found), sorted({lr for *_, lr in found})
    for color, form in enumerate(("deepnorm", "pre", "post")):
        for lr, style in zip(tried, ("o-", "s--")):
            depths = sorted(layers for f, layers, rate in found if (f, rate) == (form, lr))
            if depths:
                spread(left, depths, [[loss(row) for row in found[form, n, lr].seeds.values()] for n in depths], f"C{color}",
                       f"{form}, rate {lr:g}", style)
        arm = best.get((form, deepest))
        for number, row in enumerate(arm.seeds.values() if arm else ()):
            right.plot([math.nan if x is None else x for x in row["layer_norms"]], color=f"C{color}",
                       label=f"{form}, rate {arm.rate}" if not number else None)
    left.set(xlabel="layers", ylabel="nats a byte, held out", title="a run that diverged counts as log 256")
    right.set(xlabel="layer", ylabel="norm of its gradient", title=f"{deepest} layers, last steps, a line a seed", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


# --- router ---

def router() -> list[Claim]:
    found = fixed(rows("router"), "capacity", "shards", rate="0.005 alone")
    most = max((shards for _, shards in found), default=32)
    test = "[router.py](../experiments/router.py): routing of held-out text by trained models, one capacity or one a shard"
    claims = []
    for capacity in sorted({c for c, _ in found if c}) or [1.25]:
        claim = Claim(f"A global capacity drops fewer tokens (section 2.1): factor {capacity}", test)
        both = {"one": found.get((capacity, 1)), f"{most} shards": found.get((capacity, most))}
        dropped, nats = ({name: (arm, key) for name, arm in both.items()} for key in ("dropped", "loss"))
        words = compared(claim, "; nats a byte", nats, digits=4).measured
        claim = compared(claim, "dropped %", dropped, lower=True, scale=100, digits=2)
        claims.append(claim._replace(measured=claim.measured + words))
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
    found = rights(rows("needle"), "kind")
    test = "[needle.py](../experiments/needle.py), [page](needle.md): trained to 1,024 tokens; ten examples a seed"
    return [compared(Claim(f"The hybrid retrieves more than {other} alone (section 2.2.2, Fig. 7), {words}", test), "right %",
                     {name: (found.get((name, length)), "score") for name in ("hybrid", other)}, scale=100, digits=0)
            for length, words in ((1024, "at the length of training"), (16384, "at 16 times that length"))
            for other in ("softmax", "lightning")]


def needle_rope() -> list[Claim]:
    found = rights(rows("needle_rope"), "kind", "turned")
    claims = []
    for kind, name in (("hybrid", "the hybrid"), ("softmax", "softmax alone")):
        test = f"[needle_rope.py](../experiments/needle_rope.py): a needle, trained at 256 bytes, asked at up to 2,048; {name}"
        for words, pair, bound in (
                ("Half RoPE reaches further than was trained, without loss (section 2.4)",
                 {"at 2,048": (16, 2048), "at 256": (16, 256)}, -0.05),
                ("No RoPE does (ours)", {"at 2,048": (0, 2048), "at 256": (0, 256)}, -0.05),
                ("Half RoPE costs nothing against full RoPE at the trained length",
                 {"half": (16, 256), "full": (32, 256)}, -0.05),
                ("Half RoPE reaches further than full RoPE", {"half": (16, 2048), "full": (32, 2048)}, 0.0)):
            pair = {name: (found.get((kind, *key)), "score") for name, key in pair.items()}
            claims.append(compared(Claim(f"{words}: needle, {name}", test), "right %", pair, bound, scale=100, digits=0))
    return claims


def draw_needle(pyplot):
    found = rights(rows("needle"), "kind", "depth")
    kinds = [kind for kind in ("hybrid", "softmax", "lightning") if kind in {kind for kind, *_ in found}]
    return maps(pyplot, [[({key[1:]: arm for key, arm in found.items() if key[0] == kind}, kind) for kind in kinds]], "1,024")


def draw_needle_rope(pyplot):
    found = rights(rows("needle_rope"), "kind", "turned", "depth")
    kinds, turns = (sorted({key[n] for key in found}) for n in (0, 1))
    return maps(pyplot, [[({key[2:]: arm for key, arm in found.items() if key[:2] == (kind, turned)},
                           f"{kind}, {turned} of 32 dims turn") for turned in turns] for kind in kinds], "256")


def maps(pyplot, panels: list[list[tuple[dict, str]]], trained: str):
    """Right answers by depth and length: a row of panels each of arms by (depth, length), with their title."""
    if not any(panels):
        return None
    figure, axes = pyplot.subplots(len(panels), len(panels[0]), figsize=(3.6 * len(panels[0]), 0.6 + 2.4 * len(panels)),
                                   layout="constrained", sharex=True, sharey=True, squeeze=False)
    for place, (found, title) in zip(axes.flat, itertools.chain(*panels)):
        depths, lengths = (sorted({key[n] for key in found}) for n in (0, 1))
        grid = [[100 * interval(over(found.get((depth, n)), operator.itemgetter("score")).values()).mean for n in lengths]
                for depth in depths]
        image = place.imshow(grid, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        for row, column in itertools.product(range(len(depths)), range(len(lengths))):
            place.text(column, row, f"{grid[row][column]:.0f}", ha="center", va="center")
        place.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        place.set_yticks(range(len(depths)), depths)
        place.set_title(title)
    for place in axes[-1]:
        place.set_xlabel(f"tokens (trained to {trained})")
    for place in axes[:, 0]:
        place.set_ylabel("depth %")
    figure.colorbar(image, ax=axes, label="right answers %, mean over seeds")
    return figure


def rights(found: list[dict], *names: str) -> dict[tuple, Arm]:
    """Arms by their names and the length, a seed's row its examples' mean."""
    scores = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in found:
        scores[*(row[name] for name in names), row["length"]][row["seed"]].append(row["score"])
    return {arm: Arm({seed: {"score": float(np.mean(values))} for seed, values in seeds.items()}, "0.004 alone")
            for arm, seeds in scores.items()}


def noise(row: dict) -> list[tuple[float, float]]:
    """(loss, noise scale in tokens) along a run, from the norms of micro-batches' gradients and of their mean's.

    Of batches of b and B tokens E|G_b|^2 = |G|^2 + S / b: two equations for S and |G|^2, whose quotient is the noise scale
    (McCandlish et al., arXiv 1812.06162, appendix A). Parts of a run where noise hides the gradient (|G|^2 <= 0) tell nothing.
    """
    big = row["tokens"] / row["steps"]
    small = big / row["micro"]
    found = []
    parts = list(zip(*(row["course"].get(name, []) for name in ("loss", "micro_norm", "grad_norm"))))
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


def critical_batch() -> list[Claim]:
    test = "[critical_batch.py](../experiments/critical_batch.py): a run's gradient noise scale as loss^-p; rate 0.003 alone"
    claims = [Claim("The critical batch grows as the loss falls (Fig. 13)", test),
              Claim("It grows as loss^-6.1, or faster (the slope of Fig. 13's four points)", test)]
    powers = collections.defaultdict(dict)      # by width, by seed
    for row in rows("critical_batch"):
        if len(points := noise(row)) > 2:
            powers[row["dim"]][row["seed"]] = -slope(points)
    if powers:
        seeds = set.intersection(*(set(seeds) for seeds in powers.values()))
        mean = interval(np.mean([of_size[seed] for of_size in powers.values()]) for seed in seeds)
        words = f"p: {mean.told(digits=1)}, mean of {len(powers)} widths; " + ", ".join(
            f"width {dim} {interval(of_size.values()).told(digits=1)}" for dim, of_size in sorted(powers.items()))
        claims = [claim._replace(measured=words, verdict=verdict(mean, bound))
                  for claim, bound in zip(claims, (0, -slope(PAPERS_BATCHES)))]
    return claims


def draw_critical_batch(pyplot):
    found = rows("critical_batch")
    if not found:
        return None
    figure, (ours, papers) = pyplot.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 2), layout="constrained")
    every = []
    for color, dim in enumerate(sorted({row["dim"] for row in found})):
        points = [point for row in found if row["dim"] == dim for point in noise(row)]
        every += points
        if points:
            ours.loglog(*zip(*points), ".", color=f"C{color}", label=f"width {dim}")
    papers.loglog(*zip(*PAPERS_BATCHES), "o", color="C3", label="batch doubled")
    for axes, points, words in ((ours, every, "gradient noise scale"), (papers, PAPERS_BATCHES, "critical batch")):
        if len(points) > 2:
            loss, scale = np.log(np.array(points)).T
            ends = np.array([loss.min(), loss.max()])
            for power, style, of in ((slope(every), "-", "ours, widths pooled"), (slope(PAPERS_BATCHES), ":", "the paper's")):
                axes.plot(np.exp(ends), np.exp(scale.mean() + power * (ends - loss.mean())), "k" + style, linewidth=1,
                          label=f"loss^{power:.1f}, {of}")
        axes.set(xlabel="nats a token, of training", ylabel=f"{words}, tokens")
        axes.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(0.2))
        axes.xaxis.set_major_formatter("{x:.1f}")
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.invert_xaxis()
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    ours.set(title="all seeds; a token is a byte")
    papers.set(title="the paper's (Fig. 13)")
    return figure


def padding() -> list[Claim]:
    found = fixed(rows("padding"), "median")
    claims = []
    for median in sorted(median for median, in found) or [512]:
        test = f"`python benchmarks/padding.py`: counted on 1,000 lognormal lengths a seed, median {median}"
        arm = found.get((median,))
        for words, name in (("Packing needs less than samples padded to 256, as the paper's kernel has them (ours)", "packed"),
                            ("Blocks of 32 to 256 pad less than 256 alone (section 3.3.3)", "levels")):
            claims.append(compared(Claim(f"{words}: median {median}", test), "padding, % of the tokens",
                                   {name: (arm, name), "256": (arm, "blocks")}, lower=True, scale=100, digits=1))
    return claims


def draw_padding(pyplot):
    found = fixed(rows("padding"), "median")
    if not found:
        return None
    figure, axes = pyplot.subplots(figsize=(5.5, 3.2), layout="constrained")
    for place, (name, words) in enumerate((("blocks", "samples to 256"), ("levels", "to 32 to 256"),
                                           ("ring", "to 16, for a ring of 8"), ("packed", "packed"))):
        shares = [interval(over(arm, operator.itemgetter(name)).values()) for arm in found.values()]
        means = [100 * share.mean for share in shares]
        errors = [[100 * (share.mean - share.low) for share in shares], [100 * (share.high - share.mean) for share in shares]]
        axes.bar(np.arange(len(found)) + 0.2 * (place - 1.5), means, 0.18, yerr=errors, label=words)
    axes.set_xticks(range(len(found)), [f"median {median:,}" for median, in found])
    axes.set(yscale="log", ylabel="padding, % of the tokens")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)
    return figure


def length() -> list[Claim]:
    found = {key: arm for (kind, key), arm in fixed(rows("length"), "kind", "length").items() if kind == "L"}
    claim = Claim("Training speed does not fall with the length (section 2.2.2.4)",
                  "`python benchmarks/length.py`: one lightning layer, forward and backward, at equal tokens a call, on CPU "
                  "cores; passes stand for seeds; a loss of 5 % is none")
    if len(found) < 2:
        return [claim]
    near, far = (over(found[pick(found)], operator.itemgetter("tokens_per_s")) for pick in (min, max))
    kept = interval(far[n] / near[n] for n in sorted(near.keys() & far.keys()))
    return [claim._replace(measured=f"of the tokens/s at {min(found):,} tokens {kept.told(100, 0, ' %')} are kept at "
                                    f"{max(found):,}", verdict=verdict(kept, 0.95))]


def draw_length(pyplot):
    found = fixed(rows("length"), "kind", "length")
    if not found:
        return None
    figure, axes = pyplot.subplots(figsize=(5.5, 3.2), layout="constrained")
    for color, (kind, name) in enumerate((("L", "lightning"), ("S", "softmax"))):
        lengths = sorted(n for own, n in found if own == kind)
        speeds = [over(found[kind, n], operator.itemgetter("tokens_per_s")).values() for n in lengths]
        spread(axes, lengths, speeds, f"C{color}", name)
    axes.set(xscale="log", yscale="log", xlabel="tokens of a sequence", ylabel="tokens/s",
             title="one layer, forward and backward, equal tokens a call")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


PARTS = {"Retrieval": ("recall", "hybrid_ratio", "needle"), "Length": ("rope_length", "needle_rope"),
         "Experts": ("moe_vs_dense", "router"), "Training": ("norm", "critical_batch"), "Cost": ("padding", "length")}
CLAIMS = {"recall": recall, "hybrid_ratio": hybrid_ratio, "needle": needle, "rope_length": rope_length,
          "needle_rope": needle_rope, "moe_vs_dense": moe_vs_dense, "router": router, "norm": norm,
          "critical_batch": critical_batch, "padding": padding, "length": length}
FIGURES = {"recall": draw_recall, "hybrid_ratio": draw_hybrid_ratio, "needle": draw_needle, "rope_length": draw_rope_length,
           "needle_rope": draw_needle_rope, "moe_vs_dense": draw_moe_vs_dense, "norm": draw_norm, "router": draw_router,
           "critical_batch": draw_critical_batch, "padding": draw_padding, "length": draw_length}


def table() -> str:
    lines = []
    for title, names in PARTS.items():
        lines += [f"## {title}\n", "| the paper's claim | our test | what came out | |", "|---|---|---|---|"]
        claims = [claim for name in names for claim in CLAIMS[name]()]
        lines += [f"| {c.text} | {c.test} | {c.measured or 'not run'} | **{c.verdict}** |" for c in claims]
        lines += [f"\n![{name}](../experiments/{name}.png)" for name in names if name in FIGURES and rows(name)] + [""]
    return "\n".join(lines)


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
            figure.savefig(ROOT / "experiments" / f"{name}.png", dpi=110, metadata={"Software": None, "Rows": sha256(name)})
            print(f"figure: experiments/{name}.png")
    path = ROOT / "docs" / "findings.md"
    path.write_text(page(path.read_text()))
    print(f"page: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
