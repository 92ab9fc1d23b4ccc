"""The figures of the findings: one function for each experiment, which returns None if there are no rows."""
import collections
import itertools
import math
import operator

import matplotlib.ticker
import numpy as np

from experiments.findings.claims import (
    PAPERS_BATCHES,
    accuracy,
    accuracy_on,
    arms_by_task,
    exponents_by_width,
    log_log_slope,
    loss_in,
    mean_accuracy,
    mean_exponent,
    needle_arms,
    noise_scales,
)
from experiments.findings.evidence import (
    arms_at_one_rate,
    best_arms,
    interval,
    loss,
    negative_loss,
    read_rows,
    values_by_seed,
)

ARCHITECTURES = {"LLLLLLLL": ("lightning", "o-"), "LLLLLLLS": ("hybrid 7:1, softmax last", "o-"),
                 "SSSSSSSS": ("softmax", "o-"), "LLLSLLLL": ("hybrid 7:1, softmax in the middle", "s--"),
                 "SLLLLLLL": ("hybrid 7:1, softmax first", "s--")}


def plot_intervals(axes, x, values, color, label, style="o-"):
    """Plots means over seeds as a line and their 95 % intervals as a band."""
    found = [interval(v) for v in values]
    axes.plot(x, [f.mean for f in found], style, color=color, label=label, markersize=3)
    axes.fill_between(x, [f.low for f in found], [f.high for f in found], color=color, alpha=0.15, linewidth=0)


def set_ticks(axes, values):
    """Makes a logarithmic x axis with these ticks, labelled with plain numbers."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())


def recall(pyplot):
    found = best_arms(read_rows("recall"), ("arch", "head_dim"), mean_accuracy)
    if not found:
        return None
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4.2), sharey=True, layout="constrained")
    more_pairs, longer = [(n, 4 * n) for n in (8, 16, 32, 64, 128)], [(16, n) for n in (64, 128, 512)]
    for color, (arch, (name, style)) in enumerate(ARCHITECTURES.items()):
        for panel, tasks, number in ((0, more_pairs, 0), (1, longer, 1)):
            if (arch, 16) in found:
                values = [values_by_seed(found[arch, 16], accuracy_on(task)).values() for task in tasks]
                plot_intervals(axes[panel], [task[number] for task in tasks], values, f"C{color}", name, style)
    for color, n in enumerate((8, 16, 32)):
        if ("LLLLLLLL", n) in found:
            plot_intervals(axes[2], [pairs for pairs, _ in more_pairs],
                           [values_by_seed(found["LLLLLLLL", n], accuracy_on(task)).values() for task in more_pairs],
                           f"C{color + 5}", f"heads of {n}: {8 * n * n:,} state values per layer")
    for panel, label, title, ticks in (
            (0, "key-value pairs, in 4 times as many tokens", "more pairs (heads of 16)", [task[0] for task in more_pairs]),
            (1, "tokens, with 16 key-value pairs", "longer text (heads of 16)", [64, 128, 256, 512]),
            (2, "key-value pairs, in 4 times as many tokens", "lightning alone, by state size",
             [task[0] for task in more_pairs])):
        axes[panel].set(xlabel=label, title=title, ylim=(0, 1.02))
        set_ticks(axes[panel], ticks)
        axes[panel].grid(alpha=0.3)
        axes[panel].legend(fontsize=8, loc="lower left")
    axes[0].set_ylabel("accuracy on held-out queries (share)")
    return figure


def hybrid_ratio(pyplot):
    found = best_arms(read_rows("hybrid_ratio"), ("other", "period"), mean_accuracy)
    if not found:
        return None
    figure, axes = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    periods = (0, 16, 8, 4, 2, 1)
    for color, (other, name) in enumerate((("L", "lightning"), ("W", "softmax in a window of 32 tokens"))):
        # Period 1 has no other layers, so both lines end in the same arm.
        arms = {place: found[key] for place, period in enumerate(periods)
                if (key := ("L" if period == 1 else other, period)) in found}
        if arms:
            plot_intervals(axes, list(arms), [values_by_seed(arm, mean_accuracy).values() for arm in arms.values()],
                           f"C{color}", f"other layers: {name}")
    axes.set(xlabel="share of layers with full softmax attention", ylabel="accuracy, mean over all tasks (share)",
             ylim=(0, 1.02))
    axes.set_xticks(range(len(periods)), ["none", "1/16", "1/8", "1/4", "1/2", "all"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    return figure


def needle(pyplot):
    found = needle_arms(read_rows("needle"), "kind", "depth")
    names = {"hybrid": "hybrid 3:1", "softmax": "softmax alone", "lightning": "lightning alone"}
    kinds = [kind for kind in names if kind in {kind for kind, *_ in found}]
    panels = [({key[1:]: arm for key, arm in found.items() if key[0] == kind}, names[kind]) for kind in kinds]
    return plot_needle_maps(pyplot, [panels], "1,024")


def needle_rope(pyplot):
    found = needle_arms(read_rows("needle_rope"), "kind", "turned", "depth")
    kinds, turns = (sorted({key[n] for key in found}) for n in (0, 1))
    names = {"hybrid": "hybrid 3:1", "softmax": "softmax alone", 0: "no RoPE", 16: "half RoPE", 32: "full RoPE"}
    return plot_needle_maps(
        pyplot, [[({key[2:]: arm for key, arm in found.items() if key[:2] == (kind, turned)}, f"{names[kind]}, {names[turned]}")
                  for turned in turns] for kind in kinds], "256")


def plot_needle_maps(pyplot, panels: list[list[tuple[dict, str]]], trained: str):
    """Plots correct answers by depth and length.

    Args:
      panels: rows of panels; each panel is ({(depth, length): arm}, title).
      trained: the longest prompt in training, in tokens.
    """
    if not any(panels):
        return None
    figure, axes = pyplot.subplots(len(panels), len(panels[0]), figsize=(3.8 * len(panels[0]), 0.6 + 2.4 * len(panels)),
                                   layout="constrained", sharex=True, sharey=True, squeeze=False)
    for panel, (found, title) in zip(axes.flat, itertools.chain(*panels)):
        if not found:       # this arm was not run
            panel.set_axis_off()
            continue
        depths, lengths = (sorted({key[n] for key in found}) for n in (0, 1))
        grid = [[100 * interval(values_by_seed(found.get((depth, n)), operator.itemgetter("score")).values()).mean
                 for n in lengths] for depth in depths]
        image = panel.imshow(grid, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        for row, column in itertools.product(range(len(depths)), range(len(lengths))):
            share = grid[row][column]
            panel.text(column, row, f"{share:.0f}", ha="center", va="center", color="black" if 15 < share < 85 else "white")
        panel.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=8)
        panel.set_yticks(range(len(depths)), depths)
        panel.set_title(title)
    for panel in axes[-1]:
        panel.set_xlabel(f"prompt length, tokens (trained to {trained})")
    for panel in axes[:, 0]:
        panel.set_ylabel("needle depth, %")
    figure.colorbar(image, ax=axes, label="correct answers, %")
    return figure


def rope_length(pyplot):
    found = best_arms(read_rows("rope_length"), ("pattern", "turned"), negative_loss)
    if not found:
        return None
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axes, pattern, title in zip(panels, ("LLLS", "S"), ("hybrid 3:1", "softmax alone")):
        for color, (turned, name) in enumerate(((0, "no RoPE"), (8, "half RoPE"), (16, "full RoPE"))):
            if (pattern, turned) in found:
                seeds = found[pattern, turned].seeds.values()
                spans = max((row["by_place"] or {} for row in seeds), key=len)
                plot_intervals(axes, [int(span.partition("-")[2]) + 1 for span in spans],
                               [list(map(loss_in(span), seeds)) for span in spans], f"C{color}", name)
        axes.axvline(256, color="k", linestyle=":", label="training length")
        axes.set(xlabel="end of the span, bytes from the start", title=title)
        set_ticks(axes, [256, 512, 1024, 2048])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    panels[0].set_ylabel("held-out loss, nats per byte")
    return figure


def moe_vs_dense(pyplot):
    text, facts = arms_by_task()
    if not (text or facts):
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for color, (kind, name) in enumerate((("dense", "dense"), ("moe", "16 experts, top-2"))):
        counts = sorted(count for count, k in facts if k == kind)
        if counts:
            values = [[accuracy(row) for row in facts[count, kind].seeds.values()] for count in counts]
            plot_intervals(left, counts, values, f"C{color}", name)
        for number, row in enumerate(text[kind,].seeds.values() if (kind,) in text else ()):
            tokens, nats = (np.array(row["course"].get(field, []), float) for field in ("tokens", "loss"))
            right.plot(tokens * row["flops"] / row["tokens"], nats, color=f"C{color}", label=name if not number else None)
    left.set(xlabel="facts of 16 random bits", ylabel="share of value ids predicted correctly", title="facts", ylim=(0, 1.04))
    if counts := sorted({count for count, _ in facts}):
        set_ticks(left, counts)
    right.set(xlabel="training FLOPs", ylabel="training loss, nats per byte", title="text, one line per seed", xscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def router(pyplot):
    rows = read_rows("router")
    found = collections.defaultdict(list)
    for row in rows:
        if row["capacity"]:
            found[row["shards"], row["capacity"]].append(row)
    if not found:
        return None
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for color, shards in enumerate(sorted({shards for shards, _ in found})):
        capacities = sorted(c for s, c in found if s == shards)
        for axes, field, scale in zip(panels, ("dropped", "loss"), (100, 1)):
            plot_intervals(axes, capacities, [[scale * row[field] for row in found[shards, c]] for c in capacities],
                           f"C{color}", "one global capacity" if shards == 1 else f"a capacity for each of {shards} shards")
    if undropped := [row["loss"] for row in rows if not row["capacity"]]:
        panels[1].axhline(np.mean(undropped), color="k", linestyle=":", label="no dropping")
    for axes, label in zip(panels, ("dropped assignments, %", "held-out loss, nats per byte")):
        axes.set(xlabel="capacity factor", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def norm(pyplot):
    rows = read_rows("norm")
    found, best = (best_arms(rows, fields, negative_loss) for fields in (("form", "layers", "lr"), ("form", "layers")))
    if not found:
        return None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    deepest, rates = max(layers for _, layers, _ in found), sorted({lr for *_, lr in found})
    for color, (form, name) in enumerate((("deepnorm", "DeepNorm"), ("pre", "pre-norm"), ("post", "post-norm"))):
        for lr, style in zip(rates, itertools.cycle(("o-", "s--", "^:"))):
            depths = sorted(layers for f, layers, rate in found if (f, rate) == (form, lr))
            if depths:
                values = [[loss(row) for row in found[form, n, lr].seeds.values()] for n in depths]
                plot_intervals(left, depths, values, f"C{color}", f"{name}, learning rate {lr:g}", style)
        arm = best.get((form, deepest))
        for number, row in enumerate(arm.seeds.values() if arm else ()):
            right.plot([math.nan if x is None else x for x in row["layer_norms"]], color=f"C{color}",
                       label=name if not number else None)
    left.set(xlabel="layers", ylabel="held-out loss, nats per byte", title="loss by depth",
             xticks=sorted({layers for _, layers, _ in found}))
    right.set(xlabel="layer (0 is the first)", ylabel="gradient norm, before clipping",
              title=f"{deepest} layers, end of training, one line per seed", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def critical_batch(pyplot):
    rows = read_rows("critical_batch")
    if not rows:
        return None
    figure, (ours, papers) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    every, mean = [], mean_exponent(exponents_by_width())
    for color, dim in enumerate(sorted({row["dim"] for row in rows})):
        points = [point for row in rows if row["dim"] == dim for point in noise_scales(row)]
        every += points
        if points:
            ours.loglog(*zip(*points), ".", color=f"C{color}", label=f"width {dim}")
    papers.loglog(*zip(*PAPERS_BATCHES), "o", color="C3", label="the paper doubles its batch")
    for axes, points, label in ((ours, every, "gradient noise scale"), (papers, PAPERS_BATCHES, "critical batch")):
        if len(points) > 2 and mean.seeds:
            loss, scale = np.log(np.array(points)).T
            ends = np.array([loss.min(), loss.max()])
            for p, style, source in ((-mean.mean, "-", "our mean over widths"),
                                     (log_log_slope(PAPERS_BATCHES), ":", "the paper's slope")):
                axes.plot(np.exp(ends), np.exp(scale.mean() + p * (ends - loss.mean())), "k" + style, linewidth=1,
                          label=f"loss^{p:.1f}, {source}")
        axes.set(xlabel="training loss, nats per token", ylabel=f"{label}, tokens")
        axes.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(0.2))
        axes.xaxis.set_major_formatter("{x:.1f}")
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.invert_xaxis()
        axes.grid(alpha=0.3, which="both")
        if points:
            axes.legend(fontsize=8)
    for axes, divisor, unit in ((ours, 1, ""), (papers, 1e6, " M")):
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda x, _, divisor=divisor, unit=unit: f"{x / divisor:,.0f}{unit}")
        axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    ours.set(title="our runs, all seeds (a token is a byte)")
    papers.set(title="paper, Fig. 13")
    return figure


def padding(pyplot):
    found = arms_at_one_rate(read_rows("padding"), "median")
    if not found:
        return None
    figure, axes = pyplot.subplots(figsize=(6.5, 3.6), layout="constrained")
    for place, (field, name) in enumerate((("blocks", "blocks of 256"), ("levels", "blocks of 32 to 256"),
                                           ("ring", "multiples of 16, for a ring of 8 devices"), ("packed", "packed"))):
        shares = [interval(values_by_seed(arm, operator.itemgetter(field)).values()) for arm in found.values()]
        means = [100 * share.mean for share in shares]
        errors = [[100 * (share.mean - share.low) for share in shares], [100 * (share.high - share.mean) for share in shares]]
        axes.bar(np.arange(len(found)) + 0.2 * (place - 1.5), means, 0.18, yerr=errors, label=name)
    axes.set_xticks(range(len(found)), [f"{median:,}" for median, in found])
    axes.set(yscale="log", xlabel="median sample length, tokens", ylabel="padding, % of the real tokens")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)
    return figure


def length(pyplot):
    found = arms_at_one_rate(read_rows("length"), "kind", "length")
    if not found:
        return None
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for color, (kind, name) in enumerate((("L", "lightning"), ("S", "softmax"))):
        lengths = sorted(n for k, n in found if k == kind)
        speeds = [values_by_seed(found[kind, n], operator.itemgetter("tokens_per_s")).values() for n in lengths]
        plot_intervals(axes, lengths, speeds, f"C{color}", name)
    axes.set(xscale="log", yscale="log", xlabel="sequence length, tokens", ylabel="tokens per second",
             title="one layer, forward and backward, equal tokens per call")
    set_ticks(axes, sorted({n for _, n in found}))
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure
