"""The figures of the findings, a function each, of committed rows; None where there are none."""
import collections
import itertools
import math
import operator

import matplotlib.ticker
import numpy as np

from experiments.findings.claims import (
    PAPERS_BATCHES,
    accuracy,
    answered,
    by_task,
    nats,
    noise,
    power,
    powers,
    recalled,
    rights,
    slope,
)
from experiments.findings.evidence import arms, fixed, interval, loss, minus_loss, over, rows


def spread(axes, x, values, color, label, style="o-"):
    """Means over seeds, and their intervals."""
    found = [interval(v) for v in values]
    axes.plot(x, [f.mean for f in found], style, color=color, label=label, markersize=3)
    axes.fill_between(x, [f.low for f in found], [f.high for f in found], color=color, alpha=0.15, linewidth=0)


def recall(pyplot):
    found = arms(rows("recall"), ("arch", "head_dim"), recalled)
    if not found:
        return None
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), sharey=True, layout="constrained")
    pairs, far = [(n, 4 * n) for n in (8, 16, 32, 64, 128)], [(16, n) for n in (64, 128, 512)]
    for color, (arch, style) in enumerate((("LLLLLLLL", "o-"), ("LLLLLLLS", "o-"), ("SSSSSSSS", "o-"), ("LLLSLLLL", "s--"),
                                           ("SLLLLLLL", "s--"))):
        for panel, tasks, which in ((0, pairs, 0), (1, far, 1)):
            if (arch, 16) in found:
                values = [over(found[arch, 16], answered(where)).values() for where in tasks]
                spread(axes[panel], [where[which] for where in tasks], values, f"C{color}", arch, style)
    for color, n in enumerate((8, 16, 32)):
        if ("LLLLLLLL", n) in found:
            spread(axes[2], [where[0] for where in pairs],
                   [over(found["LLLLLLLL", n], answered(where)).values() for where in pairs], f"C{color + 5}",
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


def hybrid_ratio(pyplot):
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


def needle(pyplot):
    found = rights(rows("needle"), "kind", "depth")
    kinds = [kind for kind in ("hybrid", "softmax", "lightning") if kind in {kind for kind, *_ in found}]
    return maps(pyplot, [[({key[1:]: arm for key, arm in found.items() if key[0] == kind}, kind) for kind in kinds]], "1,024")


def needle_rope(pyplot):
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
        if not found:       # an arm that is not run
            place.set_axis_off()
            continue
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


def rope_length(pyplot):
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


def moe_vs_dense(pyplot):
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
    left.set(xlabel="facts, of 16 random bits each", ylabel="value ids told right", title="memory", ylim=(0, None))
    left.set_xscale("log", base=2)
    right.set(xlabel="FLOPs of training", ylabel="nats a byte, of training", title="text, a line a seed", xscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def router(pyplot):
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
    if whole:
        panels[1].axhline(np.mean(whole), color="k", linestyle=":", label="nothing dropped")
    for axes, words in zip(panels, ("dropped assignments, %", "nats a byte, held out")):
        axes.set(xlabel="capacity factor", ylabel=words)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def norm(pyplot):
    found, best = (arms(rows("norm"), names, minus_loss) for names in (("form", "layers", "lr"), ("form", "layers")))
    if not found:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    deepest, tried = max(layers for _, layers, _ in found), sorted({lr for *_, lr in found})
    for color, form in enumerate(("deepnorm", "pre", "post")):
        for lr, style in zip(tried, itertools.cycle(("o-", "s--", "^:"))):
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


def critical_batch(pyplot):
    found = rows("critical_batch")
    if not found:
        return None
    figure, (ours, papers) = pyplot.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 2), layout="constrained")
    every, mean = [], power(powers())
    for color, dim in enumerate(sorted({row["dim"] for row in found})):
        points = [point for row in found if row["dim"] == dim for point in noise(row)]
        every += points
        if points:
            ours.loglog(*zip(*points), ".", color=f"C{color}", label=f"width {dim}")
    papers.loglog(*zip(*PAPERS_BATCHES), "o", color="C3", label="batch doubled")
    for axes, points, words in ((ours, every, "gradient noise scale"), (papers, PAPERS_BATCHES, "critical batch")):
        if len(points) > 2 and mean.seeds:
            loss, scale = np.log(np.array(points)).T
            ends = np.array([loss.min(), loss.max()])
            for p, style, of in ((-mean.mean, "-", "ours, mean of widths"), (slope(PAPERS_BATCHES), ":", "the paper's")):
                axes.plot(np.exp(ends), np.exp(scale.mean() + p * (ends - loss.mean())), "k" + style, linewidth=1,
                          label=f"loss^{p:.1f}, {of}")
        axes.set(xlabel="nats a token, of training", ylabel=f"{words}, tokens")
        axes.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(0.2))
        axes.xaxis.set_major_formatter("{x:.1f}")
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.invert_xaxis()
        axes.grid(alpha=0.3, which="both")
        if points:
            axes.legend(fontsize=8)
    ours.set(title="all seeds; a token is a byte")
    papers.set(title="the paper's (Fig. 13)")
    return figure


def padding(pyplot):
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


def length(pyplot):
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
