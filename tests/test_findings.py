"""The findings: the page matches the committed rows; intervals, verdicts and noise scales follow their definitions."""
import dataclasses
import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image

from experiments.findings import claims, evidence, figures
from experiments.findings import page as findings
from mmx import config
from mmx.checkpoints import convert
from mmx.data import held_out, packing, tokens
from mmx.launch import experiments
from mmx.model import Model, logits
from mmx.training.loss import loss

ROOT = Path(__file__).parent.parent
PADDING = runpy.run_path(str(ROOT / "experiments" / "measure" / "padding.py"))
LENGTH = runpy.run_path(str(ROOT / "benchmarks" / "length.py"))


def test_the_page_matches_the_rows():
    """If this fails, run `python -m experiments.findings`. Every file of rows has a figure."""
    text = (ROOT / "docs" / "findings.md").read_text()
    assert findings.update_page(text) == text and len(text.splitlines()) < 200
    for name in findings.NAMES:
        figure, has = ROOT / "experiments" / "results" / f"{name}.png", bool(evidence.read_rows(name))
        assert figure.exists() == (f"experiments/results/{name}.png" in text) == has, name
        if has:
            assert Image.open(figure).info["Fingerprint"] == findings.fingerprint(name), (
                f"{name}.png is older than its rows or figures.py")
    for line in text.splitlines():
        if line.startswith("| ") and "**" in line:
            assert line.rsplit("**", 2)[1] in ("supports", "contradicts", "cannot tell"), line


def test_figures_and_page_are_written(tmp_path, monkeypatch, capsys):
    write_rows(tmp_path, monkeypatch, padding=[
        {"median": 64, "seed": seed, "blocks": 0.5, "packed": 0.1, "levels": 0.2, "ring": 0.2} for seed in range(3)])
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "findings.md").write_text("# Title\n" + findings.BEGIN + "old\n" + findings.END + "end\n")
    monkeypatch.setattr("sys.argv", ["findings.py"])
    findings.main()
    text = (tmp_path / "docs" / "findings.md").read_text()
    assert text.startswith("# Title\n") and text.endswith(findings.END + "end\n") and "old" not in text
    assert text.count("**supports**") == 2 and text.count("![") == 1
    figure = Image.open(tmp_path / "experiments" / "results" / "padding.png")
    assert figure.info["Fingerprint"] == findings.fingerprint("padding")
    assert {path.name for path in (tmp_path / "experiments" / "results").iterdir()} == {"padding.jsonl", "padding.png"}


def test_an_interval_is_a_bootstrap_over_seeds():
    found = evidence.interval([1, 2, 6])
    assert found == (3, 1, 6, 3)        # of 27 resamples one is three times the lowest: 3.7 %
    values = np.random.default_rng(0).normal(5, 2, 400)
    mean, low, high, _ = evidence.interval(values)
    error = 1.96 * values.std() / 20
    assert (mean, low, high) == pytest.approx((values.mean(), values.mean() - error, values.mean() + error), abs=0.03)


@pytest.mark.parametrize("values, above, word", [
    ([1, 2, 3], 0, "supports"), ([-1, -2, -3], 0, "contradicts"), ([-1, 2, 3], 0, "cannot tell"), ([0, 0, 0], 0, "cannot tell"),
    ([-0.01, 0, 0.01], -0.02, "supports"), ([1, 2], 0, "cannot tell")])
def test_verdicts(values, above, word):
    assert evidence.verdict(evidence.interval(values), above) == word


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def write_rows(tmp_path, monkeypatch, **files):
    (tmp_path / "experiments" / "results").mkdir(parents=True)
    for name, rows in files.items():
        (tmp_path / "experiments" / "results" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(evidence, "ROOT", tmp_path)


def test_recall_uses_the_best_learning_rate(tmp_path, monkeypatch):
    """A higher single seed at another rate does not count, and neither does a run that diverged."""
    def row(arch, lr, seed, accuracy):
        sources = {f"mqar:pairs={n},length={8 * n},vocab=64,few=32,seed={seed}": {"accuracy": accuracy} for n in (4, 64)}
        sources |= {f"mqar:pairs=4,length=32,vocab=64,few=8,seed={seed}": {"accuracy": 0.5}}        # from an earlier stage
        return {"arch": arch, "head_dim": 16, "lr": lr, "seed": seed, "loss": 1.0, "accuracy": accuracy, "by_source": sources}

    rows = [row(arch, 0.1, seed, value + seed / 100) for arch, value in
            (("LLLLLLLL", 0.3), ("LLLLLLLS", 0.97), ("SSSSSSSS", 0.96), ("LLLSLLLL", 0.9), ("SLLLLLLL", 0.96))
            for seed in range(3)]
    rows += [row("LLLLLLLL", 0.2, 0, 0.8), row("LLLLLLLL", 0.2, 1, 0.0)]
    rows += [{"arch": "LLLLLLLL", "head_dim": 16, "lr": 0.2, "seed": 2, "loss": None, "diverged": "step 3"}]
    write_rows(tmp_path, monkeypatch, recall=rows)
    lightning, softmax, memory, middle, first, separation = claims.recall()
    assert lightning.measured.endswith(
        ": hybrid 7:1 0.980 (0.970 to 0.990), "
        "lightning 0.310 (0.300 to 0.320); difference +0.670 (+0.670 to +0.670)")
    assert [x.verdict for x in (lightning, softmax, memory, middle, first, separation)] == [
        "supports", "supports", "not run", "contradicts", "supports", "supports"]
    assert first.test.endswith("; claim: difference above -0.02")
    assert lightning.test.endswith("; claim: difference above +0.02")
    assert "; learning rates: hybrid 7:1 0.1 (no other tried), lightning 0.1 (tried: 0.1, 0.2); " in lightning.test
    assert softmax.test.count("learning rate 0.1 (no other tried)") == 1
    assert separation.measured.startswith("4 pairs in 32 tokens: hybrid 7:1 0.980")
    assert claims.separation(*[{seed: {"loss": None} for seed in range(3)}] * 3) == ("", "cannot tell")


def test_hybrid_ratio_and_windows(tmp_path, monkeypatch):
    """One softmax layer in 8 is as good as one in 2 and better than one in 16; windows are better than lightning."""
    def row(other, period, accuracy, seed):
        return {"other": other, "period": period, "lr": 0.1, "seed": seed,
                "by_source": {f"mqar:pairs=8,length=32,vocab=64,few=64,seed={seed}": {"accuracy": accuracy + seed / 1000}}}

    arms = (("L", 2, 0.96), ("L", 8, 0.95), ("L", 16, 0.6), ("W", 8, 0.97), ("L", 1, 0.99), ("L", 0, 0.5))
    write_rows(tmp_path, monkeypatch, hybrid_ratio=[row(*arm, seed) for arm in arms for seed in range(3)])
    alone, half, fourth, sixteenth, none, windows, *pure = claims.hybrid_ratio()
    assert [x.verdict for x in (alone, half, fourth, sixteenth, none, windows, *pure)] == [
        "contradicts", "supports", "not run", "supports", "supports", "contradicts", *["not run"] * 4]
    assert sixteenth.measured.endswith(
        "1 in 8 layers 0.951 (0.950 to 0.952), 1 in 16 layers 0.601 (0.600 to 0.602); difference +0.350 (+0.350 to +0.350)")
    labels, (panel,) = {}, figures.hybrid_ratio(pyplot).axes
    for line in panel.lines:
        labels[line.get_label()] = line.get_xdata().tolist()
    assert labels == {"other layers: lightning": [0, 1, 2, 4, 5], "other layers: softmax in a window of 32 tokens": [2, 5]}


@pytest.mark.parametrize("one, other, bound, word, why", [
    (0.1, 0.1, -0.02, "cannot tell", "neither is above the floor"),
    (0.1, 0.1, 0.02, "cannot tell", "neither is above the floor"),
    (0.1, 0.9, 0.02, "contradicts", ""), (0.9, 0.1, -0.02, "supports", ""),
    (1.0, 1.0, 0.02, "cannot tell", "both reach the ceiling"), (1.0, 1.0, -0.02, "supports", "both reach the ceiling"),
    (1.0, 0.97, 0.02, "supports", ""), (0.6, 0.6, -0.02, "supports", "")])
def test_floor_and_ceiling(one, other, bound, word, why):
    """Two arms below the floor are not called equally good; of two arms at the ceiling, neither is called better."""
    for lower in (False, True):
        flip = (lambda x: 1 - x) if lower else (lambda x: x)
        measure = evidence.Measure("it", lower, floor=flip(0.25), ceiling=flip(0.995))
        arms = {name: (evidence.Arm({seed: {"it": flip(value)} for seed in range(3)}, ""), "it")
                for name, value in (("one", one), ("other", other))}
        claim = evidence.compare(evidence.Claim("", ""), measure, arms, bound)
        assert claim.verdict == word and claim.measured.endswith(why or ")")


def test_only_shared_seeds_count():
    """Seeds without a finite value do not count either."""
    arms = {name: (evidence.Arm({seed: {"it": value} for seed, value in seeds.items()}, ""), "it") for name, seeds in
            (("one", {0: 1.0, 1: 2.0, 2: 3.0, 3: float("nan"), 4: 50.0}), ("other", {0: 0.0, 1: 0.0, 2: 0.0, 3: 90.0}))}
    claim = evidence.compare(evidence.Claim("", ""), evidence.Measure("it", digits=0), arms)
    assert claim.measured == "it: one 2 (1 to 3), other 0 (0 to 0); difference +2 (+1 to +3)" and claim.verdict == "supports"


def test_a_task_that_may_separate_arms_is_no_contradiction():
    """Lightning is furthest below on a task that does not separate the arms; another task may."""
    def row(easy, hard):
        return {"by_source": {f"mqar:pairs={pairs},length=32,few=8": {"accuracy": value}
                              for pairs, value in ((4, easy), (8, hard))}}

    def seeds(*values):
        return dict(enumerate(row(*value) for value in values))

    others = seeds((0.97, 0.94), (0.97, 0.94), (0.97, 0.94))
    assert claims.separation(others, others, seeds((0.5, 0.1), (0.6, 0.1), (0.7, 0.1)))[1] == "cannot tell"
    assert claims.separation(others, others, seeds((0.7, 0.1), (0.7, 0.1), (0.7, 0.1)))[1] == "contradicts"
    assert claims.separation(others, others, seeds((0.5, 0.1), (0.5, 0.1), (0.5, 0.1)))[1] == "supports"


def test_fading_of_gradients_that_vanish():
    fading = lambda *norms: claims.gradient_fading({"layer_norms": list(norms)})
    assert fading(0.0, 1.0, 1.0, 1.0) > 30 > -30 > fading(1.0, 1.0, 1.0, 0.0)
    assert np.isnan(fading()) and np.isnan(fading(None, 1.0, 1.0, 1.0))
    assert evidence.loss({"loss": float("nan")}) == evidence.loss({"loss": None}) == evidence.UNIFORM


@pytest.mark.parametrize("kept, word", [((1.0, 0.96, 1.1), "supports"), ((0.7, 0.6, 0.9), "contradicts"),
                                        ((0.9, 1.0, 1.0), "cannot tell"), ((1.0, 1.0), "cannot tell")])
def test_speed_over_length(kept, word, tmp_path, monkeypatch):
    write_rows(tmp_path, monkeypatch, length=[
        {"kind": kind, "length": length, "seed": seed, "tokens_per_s": rate * (1 if kind == "L" else 1 / length)}
        for seed, share in enumerate(kept)
        for length, rate in ((1024, 50.0), (8192, 20.0), (65536, 60.0), (131072, 50.0 * share))
        for kind in "LS"])
    papers, ours = claims.length()
    assert ours.verdict == word and "relative to 1,024 tokens: " in ours.measured
    assert ", up to 131,072 tokens (ours)" in ours.text
    assert papers.verdict == ("supports" if len(kept) > 2 else "cannot tell") and " 120 % (120 to 120)" in papers.measured
    lines = {line.get_label(): line for line in figures.length(pyplot).axes[0].lines}
    assert lines.keys() == {"lightning", "softmax"} and lines["softmax"].get_xdata().tolist() == [1024, 8192, 65536, 131072]
    assert lines["lightning"].get_ydata()[1] == 20


def test_speed_is_measured(tmp_path, monkeypatch, capsys):
    found = LENGTH["measure"]("L", 2, 64)
    assert found["tokens_per_s"] * found["seconds"] == pytest.approx(128) and found["peak_mib"] > 0
    for option, message in (("--lengths=1024,3000", "3000 does not divide"), ("--tokens=0", "does not divide"),
                            ("--passes=0", "must be at least 1")):
        monkeypatch.setattr("sys.argv", ["length.py", option, f"--out={tmp_path / 'rows'}"])
        with pytest.raises(SystemExit):
            LENGTH["main"]()
        assert message in capsys.readouterr().err


def test_learning_rates_missing_from_rows_are_those_of_the_experiments():
    for name in ("needle", "needle_rope", "router", "critical_batch"):
        rate = experiments.read(str(ROOT / "experiments" / f"{name}.py"), []).train.lr
        assert all(f"learning rate {rate:g} (no other tried)" in claim.test for claim in getattr(claims, name)()), name


def test_speed_of_one_length_is_not_a_result(tmp_path, monkeypatch):
    write_rows(tmp_path, monkeypatch, length=[
        {"kind": "L", "length": 1024, "seed": seed, "tokens_per_s": 5.0} for seed in range(3)])
    assert claims.length()[0].verdict == "not run"


def test_a_run_that_diverged_has_the_uniform_loss(tmp_path, monkeypatch):
    rows = [{"form": form, "layers": 24, "lr": 1e-3, "seed": seed, "loss": None if form == "post" else 2.0 + seed / 10,
             "layer_norms": [] if form == "post" else [0.1, 1.0, 1.0, 10.0]}
            for form in ("deepnorm", "pre", "post") for seed in range(3)]
    write_rows(tmp_path, monkeypatch, norm=rows)
    post, pre, gradient = claims.norm()
    assert post.measured.endswith("; post-norm failed to train in 3 of 3 seeds")
    assert "post-norm 5.545 (5.545 to 5.545)" in post.measured
    assert (post.verdict, pre.verdict, gradient.verdict) == ("supports", "cannot tell", "cannot tell")
    assert "DeepNorm 2.00 (2.00 to 2.00)" in gradient.measured
    assert all(len(panel.lines) for panel in figures.norm(pyplot).axes)


def test_noise_scale():
    """Gradients with |G| = 0.5 and S = 600 have a noise scale of 2,400 tokens."""
    square = {tokens: 0.25 + 600 / tokens for tokens in (256, 2048)}
    row = {"tokens": 20480, "steps": 10, "micro": 8, "course": {
        "loss": [2.0, 1.5], "micro_norm": [square[256] ** 0.5, 0.1], "grad_norm": [square[2048] ** 0.5, 0.2]}}
    assert claims.noise_scales(row) == [(2.0, pytest.approx(2400))]      # the second part has a negative noise estimate
    assert claims.log_log_slope([(loss, 3 * loss ** -6.1) for loss in (1.5, 2.0, 2.2)]) == pytest.approx(-6.1)


def test_padding_is_counted():
    lengths = np.array([1, 32, 33, 200, 256, 300])
    assert PADDING["round_up_in_levels"](lengths).tolist() == [32, 32, 64, 256, 256, 320]
    assert PADDING["round_up"](lengths, 256).tolist() == [256, 256, 256, 256, 256, 512]
    found = PADDING["padding_shares"](lengths)
    padded = {"blocks": 1792, "packed": 8192, "ring": 864, "levels": 960}
    assert found == pytest.approx({name: tokens / 822 - 1 for name, tokens in padded.items()})
    committed = [json.loads(line) for line in (ROOT / "experiments" / "results" / "padding.jsonl").read_text().splitlines()]
    first = committed[0]
    assert PADDING["padding_shares"](PADDING["draw_lengths"](first["median"], first["seed"])) == {k: first[k] for k in found}


def test_rope_length_within_and_beyond_training(tmp_path, monkeypatch):
    """Half RoPE keeps its loss, full RoPE does not, and the better learning rate is used."""
    def row(turned, lr, seed, near, far):
        return {"pattern": "LLLS", "turned": turned, "lr": lr, "seed": seed, "loss": near,
                "by_place": {"0-255": near + 0.05, "256-511": near, "512-1023": far, "1024-2047": far}}

    write_rows(tmp_path, monkeypatch, rope_length=[
        row(turned, lr, seed, 1.2 + lr + seed / 1000, far + seed / 1000)
        for turned, far in ((0, 1.7), (8, 1.23), (16, 2.5)) for lr in (0.01, 0.1) for seed in range(3)])
    half, none, near, just, further, far, *softmax = claims.rope_length()
    assert [x.verdict for x in (half, none, near, just, further, far)] == [
        "supports", "contradicts", "supports", "cannot tell", "supports", "supports"]
    assert far.measured.startswith("nats per byte: half 1.231 (1.230 to 1.232), full 2.501")
    assert "0.01 (tried: 0.01, 0.1)" in far.test
    assert "lowest of bytes 0-255, 256-511, 512-1023: 1.211" in half.measured and {x.verdict for x in softmax} == {"not run"}


def test_loss_by_place(monkeypatch):
    """Equal to the loss computed from the log-probabilities of each row."""
    rope = runpy.run_path(str(ROOT / "experiments" / "measure" / "rope_length.py"))
    names = rope["loss_by_place"].__globals__
    for name, value in {"LENGTH": 64, "ROWS": 4, "BATCH": 2}.items():
        monkeypatch.setitem(names, name, value)
    c = config.Model(vocab=264, layers=1, pattern="S", dim=16, heads=1, kv_heads=1, head_dim=16, rotary_dim=8, experts=1,
                     top_k=1, expert_dim=16, context=64)
    model = Model(c)
    params = model.init(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    found = rope["loss_by_place"](convert.Loaded(model, params, c, "bytes"), trained=16)
    rows = [batch[name] for batch in names["held_out_batches"]() for name in ("tokens", "targets")]
    tokens_NT, targets_NT = np.concatenate(rows[::2]), np.concatenate(rows[1::2])
    assert tokens_NT.shape == (4, 64) and len(np.unique(tokens_NT, axis=0)) == 4
    np.testing.assert_array_equal(tokens_NT[:, 1:], targets_NT[:, :-1])
    x_NTD, _, _ = model.apply({"params": params}, tokens_NT)
    nats_NT = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits(params, x_NTD))), targets_NT[..., None], 2)[..., 0]
    assert found == {f"{a}-{b - 1}": pytest.approx(nats_NT[:, a:b].mean(), rel=1e-5) for a, b in ((0, 16), (16, 32), (32, 64))}


def test_a_rope_length_run_that_diverged_has_the_uniform_loss(tmp_path, monkeypatch):
    write_rows(tmp_path, monkeypatch, rope_length=[
        {"pattern": "S", "turned": turned, "lr": 0.1, "seed": seed, "loss": None if seed == 2 else 1.0,
         "by_place": None if seed == 2 else {"0-255": 1.0, "1024-2047": 1.0}} for turned in (0, 8, 16) for seed in range(3)])
    found = claims.rope_length()[6:]
    assert "lowest of bytes 0-255, 256-511, 512-1023: 2.515 (1.000 to 5.545)" in found[0].measured
    assert {claim.verdict for claim in found} == {"cannot tell"}        # not even "contradicts"


def test_the_critical_batch_grows_more_slowly_than_the_papers(tmp_path, monkeypatch):
    """Made-up norms with a noise scale of 1000 loss^-2."""
    losses = [3.0, 2.8, 2.5, 2.2, 2.0]
    def norm(tokens):
        return [(1 + 1000 * loss ** -2 / tokens) ** 0.5 for loss in losses]
    write_rows(tmp_path, monkeypatch, critical_batch=[
        {"dim": dim, "seed": seed, "tokens": 20480, "steps": 10, "micro": 8,
         "course": {"loss": losses, "micro_norm": norm(256), "grad_norm": norm(2048)}}
        for dim in (32, 64) for seed in range(3)])
    grows, steeply = claims.critical_batch()
    assert (grows.verdict, steeply.verdict) == ("supports", "contradicts")
    assert grows.measured == ("p, mean of 2 widths: 2.0 (2.0 to 2.0); width 32: 2.0 (2.0 to 2.0), width 64: 2.0 (2.0 to 2.0); "
                              "width 64 minus width 32: +0.0 (+0.0 to +0.0)")
    panels = figures.critical_batch(pyplot).axes
    fits = [[line.get_label() for line in axes.lines if "loss^" in line.get_label()] for axes in panels]
    assert fits == [["loss^-2.0, our mean over widths", "loss^-6.1, the paper's slope"]] * 2


def test_experts_on_text_and_facts(tmp_path, monkeypatch):
    """Lower is better for the loss on text, higher for the accuracy on facts. A run of one step has an empty course."""
    def row(task, kind, count, seed, value):
        return {"task": task, "kind": kind, "count": count, "lr": 0.1, "seed": seed, "loss": value, "accuracy": value,
                "tokens": 10, "flops": 100.0, "course": {"tokens": [5, 10], "loss": [3.0, 2.0]} if seed else {}}

    write_rows(tmp_path, monkeypatch, moe_vs_dense=[
        row(task, kind, 4096 * (task == "facts"), seed, value + seed / 100) for task, kind, value in
        (("text", "moe", 0.5), ("text", "dense", 0.7), ("facts", "moe", 0.3), ("facts", "dense", 0.6)) for seed in range(3)])
    text, facts = claims.moe_vs_dense()
    assert (text.verdict, facts.verdict) == ("supports", "contradicts") and "4,096" in facts.text
    assert text.measured == (
        "nats per byte: MoE 0.510 (0.500 to 0.520), dense 0.710 (0.700 to 0.720); difference -0.200 (-0.200 to -0.200)")
    left, right = figures.moe_vs_dense(pyplot).axes
    assert len(left.lines) == 2 and [line.get_xdata().tolist() for line in right.lines[1:3]] == [[50, 100]] * 2


def test_a_global_capacity_drops_fewer(tmp_path, monkeypatch):
    write_rows(tmp_path, monkeypatch, router=[
        {"capacity": capacity, "shards": shards, "seed": seed, "loss": 2 + dropped / 10, "dropped": dropped + seed / 100}
        for capacity, shards, dropped in (
            (0.0, 1, 0.0), (1.0, 1, 0.1), (1.0, 4, 0.15), (1.0, 16, 0.18), (1.0, 32, 0.2), (2.0, 1, 0.2), (2.0, 32, 0.1))
        for seed in range(3)])
    few, tight, missing, loose = claims.router()
    assert (few.verdict, tight.verdict, missing.verdict, loose.verdict) == ("supports", "supports", "not run", "contradicts")
    assert few.text.endswith("factor 1.0, 4 shards") and missing.measured == ""
    assert tight.measured == (
        "dropped assignments, %: global 11.00 (10.00 to 12.00), 32 shards 21.00 (20.00 to 22.00); "
        "difference -10.00 (-10.00 to -10.00)"
        "; nats per byte: global 2.0100 (2.0100 to 2.0100), 32 shards 2.0200 (2.0200 to 2.0200); "
        "difference -0.0100 (-0.0100 to -0.0100)")
    assert {line.get_label() for line in figures.router(pyplot).axes[1].lines} == {
        "one global capacity", *(f"a capacity for each of {n} shards" for n in (4, 16, 32)), "no dropping"}


def test_each_shard_has_its_own_capacity(monkeypatch):
    """The losses and drops of a shard are the same as if its rows were a separate batch."""
    router = runpy.run_path(str(ROOT / "experiments" / "measure" / "router.py"))
    monkeypatch.setitem(router["measure"].__globals__, "BATCH", 4)
    c = config.Model(vocab=264, layers=2, pattern="L", dim=16, heads=1, kv_heads=1, head_dim=16, rotary_dim=8, experts=4,
                     top_k=2, expert_dim=8, context=64)
    params = Model(c).init(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    undropped, whole, split = router["measure"](convert.Loaded(Model(c), params, c, "bytes"), 32, (1.0,), (1, 4), batches=1)
    assert (undropped["capacity"], undropped["dropped"]) == (0, 0) and 0 < whole["dropped"] < split["dropped"] <= split["worst"]
    assert (whole["shards"], split["shards"]) == (1, 4) and len({undropped["loss"], whole["loss"], split["loss"]}) == 3
    order = np.random.default_rng(0)
    documents = [tokens.document(tokens.tokenizer("bytes"), raw, name) for name, raw in held_out.validation(config.Data())]
    packed = packing.Packed(documents, 32)
    rows = [packed[n] for n in order.permutation(len(packed))[:4]]
    capped = Model(dataclasses.replace(c, capacity=1.0))
    alone = [loss(capped, params, packing.stack([row]), 32)[1] for row in rows]
    assert split["loss"] == pytest.approx(np.mean([x["loss"] for x in alone]), rel=1e-5)
    assert split["dropped"] == pytest.approx(np.mean([x["dropped"] for x in alone]), rel=1e-5)


def test_needles(tmp_path, monkeypatch):
    """A seed counts once, however many examples it has."""
    def rows(length, **shares):
        return [{"kind": kind, "length": length, "depth": depth, "seed": seed, "score": float(n < 10 * share)}
                for kind, share in shares.items() for depth in (0, 50) for seed in range(3) for n in range(10)]

    write_rows(tmp_path, monkeypatch, needle=rows(1024, hybrid=1.0, softmax=1.0)
            + rows(16384, hybrid=0.9, softmax=0.2, lightning=1.0))
    assert [claim.verdict for claim in claims.needle()] == ["cannot tell", "not run", "supports", "contradicts"]
    assert claims.needle()[2].measured == (
        "correct answers, %: hybrid 90 (90 to 90), softmax 20 (20 to 20); difference +70 (+70 to +70)")
    panels = figures.needle(pyplot).axes
    assert [text.get_text() for text in panels[0].texts] == ["100", "90"] * 2


def test_needles_by_rotary_dims(tmp_path, monkeypatch):
    share = {(16, 256): 1.0, (16, 2048): 0.5, (32, 256): 1.0, (32, 2048): 0.2, (0, 256): 0.7, (0, 2048): 0.7}
    write_rows(tmp_path, monkeypatch, needle_rope=[
        {"kind": "hybrid", "turned": turned, "length": length, "depth": depth, "seed": seed, "score": float(n < 10 * right)}
        for (turned, length), right in share.items() for depth in (0, 50) for seed in range(3) for n in range(10)])
    half, none, near, *missing, far = claims.needle_rope()[:6]
    softmax = claims.needle_rope()[6:]
    assert [x.verdict for x in (half, none, near, far)] == ["contradicts", "supports", "supports", "supports"]
    assert {x.verdict for x in missing + softmax} == {"not run"}
    assert half.test.endswith("; claim: difference above -5 percentage points")
    assert far.test.endswith("; claim: difference above 0")
    panels = figures.needle_rope(pyplot).axes
    assert [text.get_text() for text in panels[2].texts] == ["100", "20"] * 2       # full: of two depths, both lengths


def test_figures_of_arms_that_are_missing(tmp_path, monkeypatch):
    """Missing arms leave a panel empty or omit a fit."""
    write_rows(tmp_path, monkeypatch, needle_rope=[
        {"kind": kind, "turned": turned, "length": 256, "depth": 0, "seed": 0, "score": 1.0}
        for kind, turned in (("hybrid", 0), ("softmax", 16))], critical_batch=[
        {"dim": 32, "seed": 0, "tokens": 8, "steps": 1, "micro": 8, "course": {}}], router=[
        {"capacity": 1.0, "shards": 1, "seed": 0, "loss": 1.0, "dropped": 0.1}], norm=[
        {"form": "pre", "layers": 8, "lr": lr, "seed": 0, "loss": 1.0, "layer_norms": [1.0] * 8} for lr in (0.1, 0.2, 0.3)])
    panels = figures.needle_rope(pyplot).axes
    assert [len(panel.texts) for panel in panels[:4]] == [1, 0, 0, 1]
    assert not any("loss^" in line.get_label() for axes in figures.critical_batch(pyplot).axes for line in axes.lines)
    assert not any(line.get_label() == "no dropping" for line in figures.router(pyplot).axes[1].lines)
    assert len({line.get_linestyle() for line in figures.norm(pyplot).axes[0].lines}) == 3
    assert {claim.verdict for name in ("critical_batch", "router", "norm") for claim in getattr(claims, name)()} == {"not run"}


def test_padding_claims(tmp_path, monkeypatch):
    write_rows(tmp_path, monkeypatch, padding=[
        {"median": 64, "seed": seed, "blocks": 0.5, "packed": 0.1, "levels": 0.6, "ring": 0.2} for seed in range(3)])
    assert [claim.verdict for claim in claims.padding()] == ["supports", "contradicts"]
    bars, = figures.padding(pyplot).axes
    assert [round(bar.get_height()) for bar in bars.patches] == [50, 60, 20, 10]


def test_arms_without_shared_seeds_cannot_be_compared(tmp_path, monkeypatch):
    write_rows(tmp_path, monkeypatch, padding=[], norm=[
        {"form": form, "layers": 8, "lr": 0.1, "seed": seed, "loss": 1.0, "layer_norms": [1.0] * 8}
        for seed, form in enumerate(("deepnorm", "pre", "post"))])
    assert {claim.verdict for claim in claims.norm()} == {"cannot tell"}
    others = [name for name in findings.NAMES if name != "norm"]
    assert {claim.verdict for name in others for claim in getattr(claims, name)()} == {"not run"}
    assert all(getattr(figures, name)(pyplot) is None for name in others)
