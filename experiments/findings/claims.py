"""The paper's claims and ours. Each function tests the claims of one experiment and is named like its file of rows."""
import collections
import math
import operator
from collections.abc import Callable

import numpy as np

from experiments.findings.evidence import (
    UNIFORM,
    Arm,
    Claim,
    Interval,
    Measure,
    arms_at_one_rate,
    best_arms,
    compare,
    format_rates,
    interval,
    loss,
    negative_loss,
    read_rows,
    values_by_seed,
    verdict,
)

PAPERS_BATCHES = ((2.22, 16e6), (1.98, 32e6), (1.77, 64e6), (1.58, 128e6))        # (loss in nats, tokens), paper Fig. 13
# Byte frequencies alone give a loss of 3.02 nats on the validation text. A fifth of the needles are at the very end.
UNLEARNED, QUARTER, ALL = 2.9, 0.25, 0.995
NATS = Measure("nats per byte", lower=True, floor=UNLEARNED)
CORRECT_ANSWERS = Measure("correct answers, %", floor=QUARTER, ceiling=ALL, scale=100, digits=0)
ACCURACY = Measure("accuracy, mean over all tasks", floor=QUARTER, ceiling=ALL)
CORRECT_IDS = Measure("share of value ids predicted correctly", floor=QUARTER, ceiling=ALL)
DROPPED = Measure("dropped assignments, %", lower=True, scale=100, digits=2)
FADING = Measure("log10(gradient norm in the last quarter of the layers / in the first quarter)", lower=True, digits=2)
PADDING = Measure("padding, % of the real tokens", lower=True, scale=100, digits=1)


# --- recall ---

def accuracy_by_task(row: dict) -> dict[tuple, float]:
    """{(pairs, tokens): accuracy} of a row whose sources are named "mqar:pairs=4,length=32,few=...".

    Uses the tasks with the most keys, which the last stage of a run trains on.
    """
    found = {}
    for source, means in row.get("by_source", {}).items():
        numbers = {name: int(value) for name, value in (part.split("=") for part in source.partition(":")[2].split(","))}
        found[numbers.get("few", 0), numbers["pairs"], numbers["length"]] = means["accuracy"]
    most = max((few for few, *_ in found), default=0)
    return {tuple(task): value for (few, *task), value in found.items() if few == most}


def accuracy_on(task: tuple) -> Callable:
    """A function of a row: its accuracy on a task; 0 for a run that diverged."""
    return lambda row: accuracy_by_task(row).get(task, 0.0)


def mean_accuracy(row: dict) -> float:
    return float(np.mean(list(accuracy_by_task(row).values()) or [0.0]))


def accuracy(row: dict) -> float:
    return row.get("accuracy") or 0.0


def recall() -> list[Claim]:
    found = best_arms(read_rows("recall"), ("arch", "head_dim"), mean_accuracy)
    test = "[recall.py](../experiments/recall.py): MQAR, 8 to 128 pairs in 32 to 512 tokens, 8 layers of width 64"
    lightning, hybrid, softmax = ({"lightning": ("LLLLLLLL", 16)}, {"hybrid 7:1": ("LLLLLLLS", 16)},
                                  {"softmax": ("SSSSSSSS", 16)})
    last = {"last layer": ("LLLLLLLS", 16)}
    claims = [compare_accuracy(Claim(text, test), found, pair, bound) for text, pair, bound in (
        ("The hybrid of seven lightning layers and one softmax layer retrieves more than lightning alone (Fig. 7)",
         hybrid | lightning, 0.02),
        ("The hybrid of seven lightning layers and one softmax layer retrieves as well as softmax alone (Fig. 7)",
         hybrid | softmax, -0.02),
        ("A larger state of linear attention helps significantly (section 2.4): lightning alone with larger heads, which "
         "also add parameters and FLOPs", {"32 dims per head": ("LLLLLLLL", 32), "8 dims per head": ("LLLLLLLL", 8)}, 0.02),
        ("The hybrid's softmax layer works as well in the middle as at the end (ours)",
         {"fourth layer": ("LLLSLLLL", 16)} | last, -0.02),
        ("The hybrid's softmax layer works as well at the beginning as at the end (ours)",
         {"first layer": ("SLLLLLLL", 16)} | last, -0.02))]
    kinds = {name: found.get(key) for name, key in (hybrid | softmax | lightning).items()}
    separate = Claim("On some task, hybrid and softmax are above 0.95 and lightning is below 0.6 in all seeds (ours)", test)
    if all(kinds.values()):
        separate = Claim(separate.text, test + format_rates(kinds), *separation(*(arm.seeds for arm in kinds.values())))
    return [*claims, separate]


def compare_accuracy(claim: Claim, found: dict, pair: dict, bound: float) -> Claim:
    return compare(claim, ACCURACY, {name: (found.get(key), mean_accuracy) for name, key in pair.items()}, bound)


def separation(hybrid: dict, softmax: dict, lightning: dict) -> tuple[str, str]:
    """Tests whether hybrid and softmax are above 0.95 on a task where lightning is below 0.6.

    Args:
      hybrid, softmax, lightning: {seed: row} of each arm.
    Returns:
      the accuracies on the task where lightning is furthest below the worse of the other two, and the verdict.
    """
    tasks = sorted({task for arm in (hybrid, softmax, lightning) for row in arm.values() for task in accuracy_by_task(row)})
    if not tasks:           # all runs diverged
        return "", "cannot tell"
    value = {task: [interval(map(accuracy_on(task), arm.values())) for arm in (hybrid, softmax, lightning)] for task in tasks}
    separating = [task for task, (h, s, l) in value.items() if min(h.low, s.low) > 0.95 and l.high < 0.6]
    task = max(separating or tasks, key=lambda task: min(x.mean for x in value[task][:2]) - value[task][2].mean)
    h, s, l = value[task]
    none_separates = all(min(h.high, s.high) < 0.95 or l.low > 0.6 for h, s, l in value.values())
    text = f"{task[0]} pairs in {task[1]} tokens: hybrid 7:1 {h.format()}, softmax {s.format()}, lightning {l.format()}"
    if min(h.seeds, s.seeds, l.seeds) < 3:
        return text, "cannot tell"
    return text, "supports" if separating else "contradicts" if none_separates else "cannot tell"


def hybrid_ratio() -> list[Claim]:
    found = best_arms(read_rows("hybrid_ratio"), ("other", "period"), mean_accuracy)
    test = "[hybrid_ratio.py](../experiments/hybrid_ratio.py): MQAR, 8 to 64 pairs in 32 to 256 tokens, 16 layers, equal FLOPs"
    eighth = {"1 in 8 layers": ("L", 8)}
    return [compare_accuracy(Claim(text, test), found, pair, bound) for text, pair, bound in (
        ("One softmax layer in 8 retrieves as well as softmax alone (Fig. 7)", eighth | {"softmax": ("L", 1)}, -0.02),
        ("One softmax layer in 8 retrieves as well as one in 2 (ours)", eighth | {"1 in 2 layers": ("L", 2)}, -0.02),
        ("One softmax layer in 8 retrieves as well as one in 4 (ours)", eighth | {"1 in 4 layers": ("L", 4)}, -0.02),
        ("One softmax layer in 8 retrieves more than one in 16 (ours)", eighth | {"1 in 16 layers": ("L", 16)}, 0.02),
        ("One softmax layer in 16 retrieves more than none (ours)",
         {"1 in 16 layers": ("L", 16), "no softmax layer": ("L", 0)}, 0.02),
        *((f"With one softmax layer in {period}, lightning in the other layers retrieves more than softmax in windows of 32 "
           f"tokens {source}", {"lightning": ("L", period), "window": ("W", period)}, 0.02)
          for period, source in ((8, "(Table 4)"), (2, "(ours)"), (4, "(ours)"), (16, "(ours)"))),
        ("Lightning alone retrieves more than softmax in windows alone (ours)",
         {"lightning": ("L", 0), "window": ("W", 0)}, 0.02))]


# --- beyond the length of training ---

TRAINED, BEYOND = "0-255", ("256-511", "512-1023", "1024-2047")
EXTRAPOLATES = "works as well beyond the training length as within it"
NO_COST = "Half RoPE works as well as full RoPE within the training length"
BETTER_BEYOND = "Half RoPE is better than full RoPE beyond the training length (ours)"


def loss_in(span: str) -> Callable:
    """A function of a row: its loss over a span of bytes; UNIFORM for a run that diverged."""
    return lambda row: (row["by_place"] or {}).get(span, UNIFORM)


def lowest_earlier_loss(row: dict) -> float:
    """The lowest loss of all spans but the last. It need not be the first span, whose bytes have little text before them."""
    return min(loss_in(span)(row) for span in (TRAINED, *BEYOND[:-1]))


def rope_length() -> list[Claim]:
    found = best_arms(read_rows("rope_length"), ("pattern", "turned"), negative_loss)
    claims = []
    for pattern, kind in (("LLLS", "hybrid 3:1"), ("S", "softmax alone")):
        test = f"[rope_length.py](../experiments/rope_length.py): trained on 256 bytes, evaluated to 2,048; {kind}"
        none, half, full = (found.get((pattern, turned)) for turned in (0, 8, 16))
        for text, arm in ((f"Half RoPE {EXTRAPOLATES} (section 2.4)", half), (f"No RoPE {EXTRAPOLATES} (ours)", none)):
            pair = {f"bytes {BEYOND[-1]}:": (arm, loss_in(BEYOND[-1])),
                    f"lowest of bytes {', '.join((TRAINED, *BEYOND[:-1]))}:": (arm, lowest_earlier_loss)}
            claims.append(compare(Claim(f"{text}: {kind}", test), NATS, pair, -0.05))
        for text, span, bound in ((f"{NO_COST} (ours)", TRAINED, -0.01),
                                  *((f"{BETTER_BEYOND}, bytes {span}", span, 0.0) for span in BEYOND)):
            pair = {"half": (half, loss_in(span)), "full": (full, loss_in(span))}
            claims.append(compare(Claim(f"{text}: {kind}", test), NATS, pair, bound))
    return claims


def needle_arms(rows: list[dict], *fields: str) -> dict[tuple, Arm]:
    """Groups rows by the values of `fields` and the prompt's length. A seed's score is the mean over its examples."""
    scores = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        scores[*(row[name] for name in fields), row["length"]][row["seed"]].append(row["score"])
    return {arm: Arm({seed: {"score": float(np.mean(values))} for seed, values in seeds.items()}, "0.004 (no other tried)")
            for arm, seeds in scores.items()}


def needle() -> list[Claim]:
    found = needle_arms(read_rows("needle"), "kind")
    test = ("[needle.py](../experiments/needle.py), [page](needle.md): trained on up to 1,024 tokens; ten questions per "
            "length, the same for all seeds")
    return [compare(Claim(f"The hybrid retrieves more than {other} alone (section 2.2.2, Fig. 7), {where}", test),
                    CORRECT_ANSWERS, {name: (found.get((name, length)), "score") for name in ("hybrid", other)})
            for length, where in ((1024, "at the training length"), (16384, "at 16 times the training length"))
            for other in ("softmax", "lightning")]


def needle_rope() -> list[Claim]:
    found = needle_arms(read_rows("needle_rope"), "kind", "turned")
    claims = []
    for kind, name in (("hybrid", "hybrid 3:1"), ("softmax", "softmax alone")):
        test = (f"[needle_rope.py](../experiments/needle_rope.py): needles, trained on 256 bytes, evaluated to 2,048; "
                f"{name}; 50 questions per length, the same for all seeds")
        for text, pair, bound in (
                (f"Half RoPE {EXTRAPOLATES} (section 2.4)", {"at 2,048 bytes:": (16, 2048), "at 256 bytes:": (16, 256)}, -0.05),
                (f"No RoPE {EXTRAPOLATES} (ours)", {"at 2,048 bytes:": (0, 2048), "at 256 bytes:": (0, 256)}, -0.05),
                (f"{NO_COST} (ours)", {"half": (16, 256), "full": (32, 256)}, -0.05),
                *((f"{BETTER_BEYOND}, at {n:,}", {"half": (16, n), "full": (32, n)}, 0.0) for n in (512, 1024, 2048))):
            pair = {label: (found.get((kind, *key)), "score") for label, key in pair.items()}
            claims.append(compare(Claim(f"{text}: needles, {name}", test), CORRECT_ANSWERS, pair, bound))
    return claims


# --- experts ---

def moe_vs_dense() -> list[Claim]:
    test = "[moe_vs_dense.py](../experiments/moe_vs_dense.py): 16 experts, top-2, against a dense model with the same FLOPs"
    facts_test = test + "; a fact is a key with a value of 16 random bits"
    text, facts = arms_by_task()
    first = Claim("A mixture of experts is better than a dense model at equal FLOPs (Fig. 4): text", test + "; 8 M bytes")
    pair = {"MoE": (text.get(("moe",)), loss), "dense": (text.get(("dense",)), loss)}
    return [compare(first, NATS, pair)] + [
        compare(Claim(f"A mixture of experts remembers more of {count:,} facts after the same number of steps (ours)",
                      facts_test),
                CORRECT_IDS,
                {"MoE": (facts.get((count, "moe")), accuracy), "dense": (facts.get((count, "dense")), accuracy)})
        for count in sorted({count for count, _ in facts}) or [65536]]


def arms_by_task() -> tuple[dict, dict]:
    """The arms of moe_vs_dense: on text, by kind; on facts, by number of facts and kind."""
    text, facts = ([row for row in read_rows("moe_vs_dense") if row["task"] == task] for task in ("text", "facts"))
    return best_arms(text, ("kind",), negative_loss), best_arms(facts, ("count", "kind"), accuracy)


def router() -> list[Claim]:
    """Claims for the smallest and the largest number of shards; the figure has the others too."""
    found = arms_at_one_rate(read_rows("router"), "capacity", "shards", rate="0.005 (no other tried)")
    counts = sorted({shards for _, shards in found} - {1}) or [32]
    test = "[router.py](../experiments/router.py): held-out text, one capacity for the batch or one for each shard of its rows"
    claims = []
    for capacity in sorted({c for c, _ in found if c}) or [1.25]:
        for shards in sorted({counts[0], counts[-1]}):
            claim = Claim(
                f"A global capacity drops fewer tokens (section 2.1): capacity factor {capacity}, {shards} shards", test)
            pair = {"global": found.get((capacity, 1)), f"{shards} shards": found.get((capacity, shards))}
            dropped, cost = (compare(claim, measure, {name: (arm, field) for name, arm in pair.items()})
                             for measure, field in ((DROPPED, "dropped"), (NATS._replace(digits=4), "loss")))
            claims.append(dropped._replace(measured=f"{dropped.measured}; {cost.measured}") if cost.measured else dropped)
    return claims


# --- training ---

def norm() -> list[Claim]:
    found = best_arms(read_rows("norm"), ("form", "layers"), negative_loss)
    test = "[norm.py](../experiments/norm.py): text, 300 steps"
    claims = []
    for layers in sorted({layers for _, layers in found}) or [48]:
        deep, pre, post = (found.get((form, layers)) for form in ("deepnorm", "pre", "post"))
        for text, name, other in (
                ("DeepNorm reaches a lower loss than plain post-norm (DeepNorm's paper)", "post-norm", post),
                ("DeepNorm is better than pre-norm (Table 5 compares benchmark scores; here the loss)", "pre-norm", pre)):
            claim = compare(Claim(f"{text}: {layers} layers", test), NATS, {"DeepNorm": (deep, loss), name: (other, loss)})
            for label, arm in (("DeepNorm", deep), (name, other)) if claim.measured else ():
                if failed := sum(loss(row) > UNLEARNED for row in arm.seeds.values()):
                    claim = claim._replace(measured=f"{claim.measured}; {label} failed to train in {failed} of "
                                                    f"{len(arm.seeds)} seeds")
            claims.append(claim)
        claims.append(compare(
            Claim("The gradient reaches the first layers with DeepNorm and vanishes with plain post-norm (ours): "
                  f"{layers} layers", test),
            FADING, {"DeepNorm": (deep, gradient_fading), "post-norm": (post, gradient_fading)}))
    return claims


def gradient_fading(row: dict) -> float:
    """log10 of the mean gradient norm of the last quarter of the layers, relative to the first quarter."""
    norms = [math.nan if x is None else x for x in row["layer_norms"]]
    quarter = len(norms) // 4
    if not quarter:
        return math.nan
    first, last = (max(float(np.mean(part)), np.finfo(np.float32).tiny) for part in (norms[:quarter], norms[-quarter:]))
    return math.log10(last / first)


def noise_scales(row: dict) -> list[tuple[float, float]]:
    """(loss, gradient noise scale in tokens) along a run (McCandlish et al., arXiv 1812.06162, appendix A).

    A batch of b tokens has E|G_b|^2 = |G|^2 + S / b. The squared norms of one micro-batch's gradient and of the whole batch's
    gradient give two equations for S and |G|^2; the noise scale is S / |G|^2. Parts of a run with |G|^2 <= 0 are left out:
    there, noise hides the gradient.
    """
    whole = row["tokens"] / row["steps"]
    micro = whole / row["micro"]
    found = []
    parts = list(zip(*(row["course"].get(name, []) for name in ("loss", "micro_norm", "grad_norm"))))
    for nats, micro_norm, whole_norm in parts[len(parts) // 10:]:       # the learning rate still rises in the first tenth
        if None in (nats, micro_norm, whole_norm):
            continue
        signal = (whole * whole_norm ** 2 - micro * micro_norm ** 2) / (whole - micro)
        noise = (micro_norm ** 2 - whole_norm ** 2) / (1 / micro - 1 / whole)
        if signal > 0 and noise > 0:
            found.append((nats, noise / signal))
    return found


def log_log_slope(points) -> float:
    """Slope of log noise scale over log loss."""
    return float(np.polyfit(*np.log(np.array(points)).T, 1)[0])


def exponents_by_width() -> dict[int, dict[int, float]]:
    """{width: {seed: p}} where the noise scale is proportional to loss^-p."""
    found = collections.defaultdict(dict)
    for row in read_rows("critical_batch"):
        if len(points := noise_scales(row)) > 2:
            found[row["dim"]][row["seed"]] = -log_log_slope(points)
    return dict(sorted(found.items()))


def mean_exponent(found: dict[int, dict[int, float]]) -> Interval:
    """The mean exponent over widths, for the seeds that every width has."""
    seeds = set.intersection(*map(set, found.values())) if found else ()
    return interval(np.mean([by_seed[seed] for by_seed in found.values()]) for seed in sorted(seeds))


def critical_batch() -> list[Claim]:
    test = ("[critical_batch.py](../experiments/critical_batch.py): runs on bytes; the gradient noise scale, an estimate of "
            "the critical batch, is fitted as loss^-p; learning rate 0.003 (no other tried)")
    bounds = 0, -log_log_slope(PAPERS_BATCHES)
    texts = ("The critical batch grows as the loss falls (Fig. 13)",
             "In these small models, the critical batch grows at least as fast as loss^-6.1, the fit to the four points of "
             "Fig. 13")
    claims = [Claim(text, f"{test}; claim: mean of p above {bound:.2g}") for text, bound in zip(texts, bounds)]
    if found := exponents_by_width():
        mean, widths = mean_exponent(found), list(found)
        difference = interval(found[widths[-1]][seed] - found[widths[0]][seed]
                              for seed in sorted(found[widths[-1]].keys() & found[widths[0]].keys()))
        text = f"p, mean of {len(found)} widths: {mean.format(digits=1)}; " + ", ".join(
            f"width {dim}: {interval(by_seed.values()).format(digits=1)}" for dim, by_seed in found.items())
        if len(found) > 1:
            text += f"; width {widths[-1]} minus width {widths[0]}: {difference.format(digits=1, sign='+')}"
        claims = [claim._replace(measured=text, verdict=verdict(mean, bound))
                  for claim, bound in zip(claims, bounds)]
    return claims


# --- cost ---

def padding() -> list[Claim]:
    found = arms_at_one_rate(read_rows("padding"), "median")
    claims = []
    for median in sorted(median for median, in found) or [512]:
        test = f"`python experiments/measure/padding.py`: 1,000 log-normal lengths per seed with a median of {median:,} tokens"
        arm = found.get((median,))
        for text, name, field in (
                ("Packing adds less padding than the paper's kernel, which rounds each sample up to 256 tokens (ours)",
                 "packed", "packed"),
                ("Blocks of 32 to 256 tokens add less padding than blocks of 256 alone (section 3.3.3). They cannot add more, "
                 "so only the size of the difference is informative", "blocks of 32 to 256", "levels")):
            claims.append(compare(Claim(f"{text}: median {median:,}", test), PADDING,
                                  {name: (arm, field), "blocks of 256": (arm, "blocks")}))
    return claims


def length() -> list[Claim]:
    """Claims for the paper's lengths (1,024 to 65,536 tokens) and for all of ours."""
    found = {n: values_by_seed(arm, operator.itemgetter("tokens_per_s"))
             for (kind, n), arm in arms_at_one_rate(read_rows("length"), "kind", "length").items() if kind == "L"}
    test = ("`python benchmarks/length.py`: one lightning layer, forward and backward, equal tokens per call, on CPU cores; "
            "repeated passes instead of seeds; claim: relative speed above 95 %")
    claims = []
    for longest, source in ((65536, "(section 2.2.2.4)"), (max({131072, *found}), "(ours)")):
        claim = Claim(f"Training speed does not fall with the sequence length, up to {longest:,} tokens {source}", test)
        short, long = found.get(min(found, default=0), {}), found.get(longest, {}) if len(found) > 1 else {}
        kept = interval(long[n] / short[n] for n in sorted(short.keys() & long.keys()))
        claims.append(claim._replace(
            measured=f"speed relative to {min(found):,} tokens: {kept.format(100, 0, ' %')}",
            verdict=verdict(kept, 0.95)) if kept.seeds else claim)
    return claims


PARTS = {"Retrieval": (recall, hybrid_ratio, needle), "Length": (rope_length, needle_rope),
         "Experts": (moe_vs_dense, router), "Training": (norm, critical_batch), "Cost": (padding, length)}
