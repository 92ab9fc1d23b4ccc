"""The claims, the paper's and ours, each of the rows of an experiment in experiments/."""
import collections
import math
import operator

import numpy as np

from experiments.findings.evidence import (
    UNIFORM,
    Arm,
    Claim,
    Interval,
    Measure,
    arms,
    compared,
    fixed,
    interval,
    loss,
    minus_loss,
    over,
    rates,
    rows,
    verdict,
)

PAPERS_BATCHES = ((2.22, 16e6), (1.98, 32e6), (1.77, 64e6), (1.58, 128e6))        # doubled at these losses, tokens (Fig. 13)
# The frequency of a byte tells 3.02 nats of the validation text; of needles a fifth stand at the very end.
UNLEARNED, QUARTER, ALL = 2.9, 0.25, 0.995
NATS = Measure("nats a byte", lower=True, nothing=UNLEARNED)
RIGHT = Measure("right %", nothing=QUARTER, all=ALL, scale=100, digits=0)
RECALLED = Measure("accuracy, mean of all tasks", nothing=QUARTER, all=ALL)
IDS = Measure("value ids told right", nothing=QUARTER, all=ALL)
DROPPED = Measure("dropped %", lower=True, scale=100, digits=2)
FADED = Measure("orders of magnitude lost from the last quarter of the layers to the first", lower=True, digits=2)
PADDED = Measure("padding, % of the tokens", lower=True, scale=100, digits=1)


# --- recall ---

def answers(row: dict) -> dict[tuple, float]:
    """Accuracy by (pairs, tokens) of "mqar:pairs=4,length=32,few=..." with the most keys, which a run learns last."""
    found = {}
    for source, means in row.get("by_source", {}).items():
        numbers = {name: int(value) for name, value in (part.split("=") for part in source.partition(":")[2].split(","))}
        found[numbers.get("few", 0), numbers["pairs"], numbers["length"]] = means["accuracy"]
    most = max((few for few, *_ in found), default=0)
    return {tuple(where): value for (few, *where), value in found.items() if few == most}


def answered(where: tuple):
    """A run's accuracy on a task; one that diverged has met nothing."""
    return lambda row: answers(row).get(where, 0.0)


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
        ("Seven lightning layers and one of softmax retrieve as well as softmax alone (Fig. 7)", hybrid | softmax, -0.02),
        ("A larger linear memory helps significantly (section 2.4): lightning by the size of its heads, with which parameters "
         "and FLOPs grow too", {"32 dims": ("LLLLLLLL", 32), "8 dims": ("LLLLLLLL", 8)}, 0.02),
        ("The softmax layer does as well in the middle (ours)", {"4th of 8": ("LLLSLLLL", 16)} | last, -0.02),
        ("The softmax layer does as well at the beginning (ours)", {"first": ("SLLLLLLL", 16)} | last, -0.02))]
    kinds = {name: found.get(key) for name, key in (hybrid | softmax | pure).items()}
    parted = Claim("Hybrid and softmax above 0.95 where lightning is below 0.6, all seeds, at some task (ours)", test)
    if all(kinds.values()):
        parted = Claim(parted.text, test + rates(kinds), *apart(*(arm.seeds for arm in kinds.values())))
    return [*claims, parted]


def retrieves(claim: Claim, found: dict, pair: dict, bound: float) -> Claim:
    return compared(claim, RECALLED, {name: (found.get(key), recalled) for name, key in pair.items()}, bound)


def apart(hybrid: dict, softmax: dict, lightning: dict) -> tuple[str, str]:
    """The task at which lightning is furthest below the lesser of the others, and whether any parts them as asked."""
    tasks = sorted({where for arm in (hybrid, softmax, lightning) for row in arm.values() for where in answers(row)})
    if not tasks:           # all diverged
        return "", "cannot tell"
    value = {where: [interval(map(answered(where), arm.values())) for arm in (hybrid, softmax, lightning)] for where in tasks}
    met = [where for where, (h, s, l) in value.items() if min(h.low, s.low) > 0.95 and l.high < 0.6]
    where = max(met or tasks, key=lambda where: min(x.mean for x in value[where][:2]) - value[where][2].mean)
    h, s, l = value[where]
    missed = all(min(h.high, s.high) < 0.95 or l.low > 0.6 for h, s, l in value.values())
    words = f"{where[0]} pairs in {where[1]} tokens: hybrid {h.told()}, softmax {s.told()}, lightning {l.told()}"
    few = min(h.seeds, s.seeds, l.seeds) < 3
    return words, "cannot tell" if few else "supports" if met else "contradicts" if missed else "cannot tell"


def hybrid_ratio() -> list[Claim]:
    found = arms(rows("hybrid_ratio"), ("other", "period"), recalled)
    test = "[hybrid_ratio.py](../experiments/hybrid_ratio.py): MQAR, 8 to 64 pairs in 32 to 256 tokens, 16 layers, equal FLOPs"
    eighth = {"1/8": ("L", 8)}
    return [retrieves(Claim(words, test), found, pair, bound) for words, pair, bound in (
        ("One softmax layer in eight retrieves as well as softmax alone (Fig. 7)", eighth | {"softmax": ("L", 1)}, -0.02),
        ("One softmax layer in eight retrieves as well as every second (ours)", eighth | {"1/2": ("L", 2)}, -0.02),
        ("One softmax layer in eight retrieves as well as every fourth (ours)", eighth | {"1/4": ("L", 4)}, -0.02),
        ("One softmax layer in eight retrieves more than one in sixteen (ours)", eighth | {"1/16": ("L", 16)}, 0.02),
        ("One softmax layer in sixteen retrieves more than none (ours)", {"1/16": ("L", 16), "none": ("L", 0)}, 0.02),
        ("Between softmax layers, one in eight, lightning retrieves more than windows of 32 (Table 4)",
         {"lightning": ("L", 8), "windows": ("W", 8)}, 0.02),
        *((f"Between softmax layers, one in {period}, lightning retrieves more than windows (ours)",
           {"lightning": ("L", period), "windows": ("W", period)}, 0.02)
          for period in (2, 4, 16)),
        ("Lightning alone retrieves more than windows alone (ours)", {"lightning": ("L", 0), "windows": ("W", 0)}, 0.02))]


# --- beyond the length of training ---

TRAINED, BEYOND = "0-255", ("256-511", "512-1023", "1024-2047")
FURTHER = "reaches further than was trained, without loss"
AS_FULL = "Half RoPE costs nothing against full RoPE within the trained length"
MORE_THAN_FULL = "Half RoPE keeps more than full RoPE beyond the trained length (ours)"


def nats(where: str):
    """A run's nats a byte there; one that diverged knows nothing."""
    return lambda row: (row["by_place"] or {}).get(where, UNIFORM)


def best_before(row: dict) -> float:
    """The lowest of the parts but the last: the first bytes have little before them, and cost more for that alone."""
    return min(nats(place)(row) for place in (TRAINED, *BEYOND[:-1]))


def rope_length() -> list[Claim]:
    found = arms(rows("rope_length"), ("pattern", "turned"), minus_loss)
    claims = []
    for pattern, kind in (("LLLS", "the hybrid"), ("S", "softmax alone")):
        test = f"[rope_length.py](../experiments/rope_length.py): trained at 256 bytes, read to 2,048; {kind}"
        none, half, full = (found.get((pattern, turned)) for turned in (0, 8, 16))
        for words, arm in ((f"Half RoPE {FURTHER} (section 2.4)", half), (f"No RoPE {FURTHER} (ours)", none)):
            pair = {f"bytes {BEYOND[-1]}": (arm, nats(BEYOND[-1])), "the best part before": (arm, best_before)}
            claims.append(compared(Claim(f"{words}: {kind}", test), NATS, pair, -0.05))
        for words, place, bound in ((f"{AS_FULL} (ours)", TRAINED, -0.01),
                                    *((f"{MORE_THAN_FULL}, bytes {place}", place, 0.0) for place in BEYOND)):
            pair = {"half": (half, nats(place)), "full": (full, nats(place))}
            claims.append(compared(Claim(f"{words}: {kind}", test), NATS, pair, bound))
    return claims


def rights(found: list[dict], *names: str) -> dict[tuple, Arm]:
    """Arms by their names and the length, a seed's row its examples' mean."""
    scores = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in found:
        scores[*(row[name] for name in names), row["length"]][row["seed"]].append(row["score"])
    return {arm: Arm({seed: {"score": float(np.mean(values))} for seed, values in seeds.items()}, "0.004 alone")
            for arm, seeds in scores.items()}


def needle() -> list[Claim]:
    found = rights(rows("needle"), "kind")
    test = "[needle.py](../experiments/needle.py), [page](needle.md): trained to 1,024 tokens; each seed is asked the same ten"
    return [compared(Claim(f"The hybrid retrieves more than {other} alone (section 2.2.2, Fig. 7), {words}", test), RIGHT,
                     {name: (found.get((name, length)), "score") for name in ("hybrid", other)})
            for length, words in ((1024, "at the length of training"), (16384, "at 16 times that length"))
            for other in ("softmax", "lightning")]


def needle_rope() -> list[Claim]:
    found = rights(rows("needle_rope"), "kind", "turned")
    claims = []
    for kind, name in (("hybrid", "the hybrid"), ("softmax", "softmax alone")):
        test = (f"[needle_rope.py](../experiments/needle_rope.py): a needle, trained at 256 bytes, asked at up to 2,048; "
                f"{name}; each seed is asked the same 50 a length")
        for words, pair, bound in (
                (f"Half RoPE {FURTHER} (section 2.4)", {"at 2,048": (16, 2048), "at 256": (16, 256)}, -0.05),
                (f"No RoPE {FURTHER} (ours)", {"at 2,048": (0, 2048), "at 256": (0, 256)}, -0.05),
                (f"{AS_FULL} (ours)", {"half": (16, 256), "full": (32, 256)}, -0.05),
                *((f"{MORE_THAN_FULL}, at {n:,}", {"half": (16, n), "full": (32, n)}, 0.0) for n in (512, 1024, 2048))):
            pair = {name: (found.get((kind, *key)), "score") for name, key in pair.items()}
            claims.append(compared(Claim(f"{words}: needle, {name}", test), RIGHT, pair, bound))
    return claims


# --- experts ---

def moe_vs_dense() -> list[Claim]:
    test = "[moe_vs_dense.py](../experiments/moe_vs_dense.py): 16 experts, top-2, against a dense model of the same FLOPs"
    text, facts = by_task()
    first = Claim("A mixture of experts does more than a dense model at equal FLOPs (Fig. 4): text", test + "; 8 M bytes")
    pair = {"MoE": (text.get(("moe",)), loss), "dense": (text.get(("dense",)), loss)}
    return [compared(first, NATS, pair)] + [
        compared(Claim(f"A mixture of experts remembers more of {count:,} facts, after equal steps (ours)", test), IDS,
                 {"MoE": (facts.get((count, "moe")), accuracy), "dense": (facts.get((count, "dense")), accuracy)})
        for count in sorted({count for count, _ in facts}) or [65536]]


def by_task() -> tuple[dict, dict]:
    """Arms of text by kind, and of facts by count and kind."""
    text, facts = ([row for row in rows("moe_vs_dense") if row["task"] == task] for task in ("text", "facts"))
    return arms(text, ("kind",), minus_loss), arms(facts, ("count", "kind"), accuracy)


def router() -> list[Claim]:
    """Of the fewest and the most shards; the figure has those between."""
    found = fixed(rows("router"), "capacity", "shards", rate="0.005 alone")
    shards = sorted({shards for _, shards in found} - {1}) or [32]
    test = "[router.py](../experiments/router.py): routing of held-out text by trained models, one capacity or one a shard"
    claims = []
    for capacity in sorted({c for c, _ in found if c}) or [1.25]:
        for many in sorted({shards[0], shards[-1]}):
            claim = Claim(f"A global capacity drops fewer tokens (section 2.1): factor {capacity}, against {many} shards", test)
            both = {"one": found.get((capacity, 1)), f"{many} shards": found.get((capacity, many))}
            dropped, cost = (compared(claim, measure, {name: (arm, key) for name, arm in both.items()})
                             for measure, key in ((DROPPED, "dropped"), (NATS._replace(digits=4), "loss")))
            claims.append(dropped._replace(measured=f"{dropped.measured}; {cost.measured}") if cost.measured else dropped)
    return claims


# --- training ---

def norm() -> list[Claim]:
    found = arms(rows("norm"), ("form", "layers"), minus_loss)
    test = "[norm.py](../experiments/norm.py): text, 300 steps"
    claims = []
    for layers in sorted({layers for _, layers in found}) or [48]:
        deep, pre, post = (found.get((form, layers)) for form in ("deepnorm", "pre", "post"))
        for words, name, other in (
                ("DeepNorm reaches a lower loss than plain post-norm (DeepNorm's paper)", "post-norm", post),
                ("DeepNorm does better than pre-norm (Table 5, by benchmarks; here by loss)", "pre-norm", pre)):
            claim = compared(Claim(f"{words}: {layers} layers", test), NATS, {"DeepNorm": (deep, loss), name: (other, loss)})
            for who, arm in (("DeepNorm", deep), (name, other)) if claim.measured else ():
                if failed := sum(loss(row) > UNLEARNED for row in arm.seeds.values()):
                    claim = claim._replace(measured=f"{claim.measured}; {who} failed {failed} of {len(arm.seeds)} times")
            claims.append(claim)
        claims.append(compared(
            Claim(f"DeepNorm's gradient reaches the first layers, plain post-norm's fades (ours): {layers} layers", test),
            FADED, {"DeepNorm": (deep, faded), "post-norm": (post, faded)}))
    return claims


def faded(row: dict) -> float:
    """Orders of magnitude between the norms of the last and the first quarter of the layers' gradients."""
    norms = [math.nan if x is None else x for x in row["layer_norms"]]
    quarter = len(norms) // 4
    if not quarter:
        return math.nan
    first, last = (max(float(np.mean(part)), np.finfo(np.float32).tiny) for part in (norms[:quarter], norms[-quarter:]))
    return math.log10(last / first)


def noise(row: dict) -> list[tuple[float, float]]:
    """(loss, noise scale in tokens) along a run, from the norms of micro-batches' gradients and of their mean's.

    Of batches of b and B tokens E|G_b|^2 = |G|^2 + S / b: two equations for S and |G|^2, whose quotient is the noise scale
    (McCandlish et al., arXiv 1812.06162, appendix A). Parts of a run where noise hides the gradient (|G|^2 <= 0) tell nothing.
    """
    big = row["tokens"] / row["steps"]
    small = big / row["micro"]
    found = []
    parts = list(zip(*(row["course"].get(name, []) for name in ("loss", "micro_norm", "grad_norm"))))
    for nats, one, many in parts[len(parts) // 10:]:        # in the first tenth the learning rate still rises
        if None in (nats, one, many):
            continue
        signal = (big * many ** 2 - small * one ** 2) / (big - small)
        spread = (one ** 2 - many ** 2) / (1 / small - 1 / big)
        if signal > 0 and spread > 0:
            found.append((nats, spread / signal))
    return found


def slope(points) -> float:
    """Of log noise scale over log loss."""
    return float(np.polyfit(*np.log(np.array(points)).T, 1)[0])


def powers() -> dict[int, dict[int, float]]:
    """p of a noise scale that goes as loss^-p, by width, by seed."""
    found = collections.defaultdict(dict)
    for row in rows("critical_batch"):
        if len(points := noise(row)) > 2:
            found[row["dim"]][row["seed"]] = -slope(points)
    return dict(sorted(found.items()))


def power(found: dict[int, dict[int, float]]) -> Interval:
    """The mean over widths, of the seeds that all have."""
    seeds = set.intersection(*map(set, found.values())) if found else ()
    return interval(np.mean([of_size[seed] for of_size in found.values()]) for seed in sorted(seeds))


def critical_batch() -> list[Claim]:
    test = ("[critical_batch.py](../experiments/critical_batch.py): of single runs on bytes, the gradient noise scale, which "
            "stands for the critical batch, as loss^-p; rate 0.003 alone")
    claims = [Claim("The critical batch grows as the loss falls (Fig. 13)", test),
              Claim("At these widths it grows as loss^-6.1, or faster (the slope of Fig. 13's four points)", test)]
    if found := powers():
        mean, widths = power(found), list(found)
        more = interval(found[widths[-1]][seed] - found[widths[0]][seed]
                        for seed in sorted(found[widths[-1]].keys() & found[widths[0]].keys()))
        words = f"p: {mean.told(digits=1)}, mean of {len(found)} widths; " + ", ".join(
            f"width {dim} {interval(of_size.values()).told(digits=1)}" for dim, of_size in found.items())
        words += f"; {widths[-1]} less {widths[0]} {more.told(digits=1, sign='+')}" * (len(found) > 1)
        claims = [claim._replace(measured=words, verdict=verdict(mean, bound))
                  for claim, bound in zip(claims, (0, -slope(PAPERS_BATCHES)))]
    return claims


# --- cost ---

def padding() -> list[Claim]:
    found = fixed(rows("padding"), "median")
    claims = []
    for median in sorted(median for median, in found) or [512]:
        test = f"`python experiments/measure/padding.py`: counted on 1,000 lognormal lengths a seed, median {median}"
        arm = found.get((median,))
        for words, name, more in (
                ("Packing needs less than samples padded to 256, as the paper's kernel has them (ours)", "packed", ""),
                ("Blocks of 32 to 256 pad less than 256 alone (section 3.3.3)", "levels",
                 "; it cannot pad more: what is asked is how much less")):
            claims.append(compared(Claim(f"{words}: median {median}", test + more), PADDED,
                                   {name: (arm, name), "256": (arm, "blocks")}))
    return claims


def length() -> list[Claim]:
    """Over the lengths of the paper, 1,024 to 65,536, and over all of ours."""
    found = {key: over(arm, operator.itemgetter("tokens_per_s"))
             for (kind, key), arm in fixed(rows("length"), "kind", "length").items() if kind == "L"}
    test = ("`python benchmarks/length.py`: one lightning layer, forward and backward, at equal tokens a call, on CPU cores; "
            "passes stand for seeds; a loss of 5 % is none")
    claims = []
    for far, words in ((65536, "(section 2.2.2.4)"), (max({131072, *found}), "(ours)")):
        claim = Claim(f"Training speed does not fall with the length, to {far:,} tokens {words}", test)
        near, away = found.get(min(found, default=0), {}), found.get(far, {}) if len(found) > 1 else {}
        kept = interval(away[n] / near[n] for n in sorted(near.keys() & away.keys()))
        claims.append(claim._replace(
            measured=f"of the tokens/s at {min(found):,} tokens {kept.told(100, 0, ' %')} are kept",
            verdict=verdict(kept, 0.95)) if kept.seeds else claim)
    return claims


PARTS = {"Retrieval": (recall, hybrid_ratio, needle), "Length": (rope_length, needle_rope),
         "Experts": (moe_vs_dense, router), "Training": (norm, critical_batch), "Cost": (padding, length)}
