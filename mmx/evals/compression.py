"""Bits per byte of held-out text, beside what gzip and xz make of the same files.

    bits per byte = sum over all targets (end of text included) of -log2 p / bytes of the raw text

Each file starts anew, from its beginning-of-text token: no file helps another, as none helps gzip or xz.
"""
import dataclasses
import gzip
import lzma
import math
from pathlib import Path

import numpy as np

from mmx import config
from mmx.analysis.counts import count_params
from mmx.checkpoints import manager
from mmx.config import ConfigError
from mmx.data import pipeline, tokens
from mmx.training import metrics
from mmx.training.evaluate import bytes_per_token, first_bytes, make_evaluator

CURVE = "seconds", "tokens", "bits_per_byte"    # what of a run's steps is told and drawn


def baselines(documents) -> dict[str, float]:
    """Bits per byte of gzip -9 and xz -9e, each file alone."""
    size = sum(len(raw) for _, raw in documents)
    pack = {"gzip": lambda raw: gzip.compress(raw, 9, mtime=0),
            "xz": lambda raw: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)}
    return {name: 8 * sum(len(f(raw)) for _, raw in documents) / size for name, f in pack.items()}


def measure(path, split: str = "validation", source: str | None = None, weights_dtype: str | None = None,
            limit: int = 0) -> dict:
    """A checkpoint's bits per byte and nats a token on `limit` bytes (0: all) of held-out text, and what was read.

    "documents" are the (name, raw bytes), "per_file" their bits per byte, "config" the model's.
    """
    from mmx.checkpoints import convert  # here, for train imports this module

    loaded, found = convert.load(path, weights_dtype=weights_dtype), manager.find_step(path)
    experiment = config.build(manager.read_config(found[0])) if found else config.Experiment()
    data = dataclasses.replace(experiment.data, sources=(source,)) if source else experiment.data
    documents = first_bytes((pipeline.validation if split == "validation" else pipeline.test)(data), limit)
    if not documents:
        raise ConfigError(f"{', '.join(data.sources)} has no {split} documents: use another --split or --source")
    tokenizer = tokens.of_checkpoint(loaded.tokenizer, loaded.config.vocab)
    length = experiment.train.length
    evaluate = make_evaluator(loaded.model, tokenizer, length=length, batch=8, context=length // 2,
                              loss_chunk=experiment.train.loss_chunk)
    each = evaluate(loaded.params, documents, progress=True)
    bits = each.pop("all")
    return {"bits_per_byte": bits, "nats_per_token": bits * math.log(2) * bytes_per_token(tokenizer, documents),
            "per_file": each, "documents": documents, "config": loaded.config}


def evaluate_checkpoint(path, split: str = "validation", source: str | None = None, weights_dtype: str | None = None,
                        limit: int = 0) -> dict:
    """Bits per byte of a checkpoint on `limit` bytes (0: all) of held-out text, with the baselines, as `mmx eval` writes
    them."""
    found, step = measure(path, split, source, weights_dtype, limit), manager.find_step(path)
    documents, records = found["documents"], []
    if step:
        records = [r for r in metrics.read(step[0], *CURVE) if r["step"] <= int(step[1].name)]
    result = {"bits_per_byte": found["bits_per_byte"]} | baselines(documents)
    result |= {"split": split, "files": len(documents), "bytes": sum(len(raw) for _, raw in documents),
               "per_file": found["per_file"]}
    if records:
        last = records[-1]
        result |= {"train_seconds": last["seconds"], "steps": last["step"], "train_tokens": last["tokens"],
                   "params_total": count_params(found["config"]).total, "params_active": count_params(found["config"]).active}
    return result


def plot_curve(workdir: Path, result: dict, path: Path) -> Path | None:
    """Training's bits per byte over tokens, with the held-out figure, gzip and xz as lines; None without a run."""
    if "steps" not in result:
        return None
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [r for r in metrics.read(workdir, *CURVE) if r["step"] <= result["steps"]]
    guarded = guard_marks(records)
    records = [r for r in records if math.isfinite(r["bits_per_byte"])]
    if not records:
        return None
    tokens_N, bits_N = (np.array([r[key] for r in records]) for key in ("tokens", "bits_per_byte"))
    window = max(1, min(50, len(bits_N) // 10))
    smooth = np.convolve(bits_N, np.ones(window) / window, mode="valid")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(tokens_N / 1e6, bits_N, color="C0", alpha=0.2, linewidth=0.8)
    axes.plot(tokens_N[window - 1:] / 1e6, smooth, color="C0", label=f"training (mean of {window} steps)")
    axes.plot(tokens_N[-1] / 1e6, result["bits_per_byte"], "o", color="C3",
              label=f"{result['split']} files: {result['bits_per_byte']:.3f}")
    for (what, at), marker in zip(guarded.items(), "x<"):
        if at:
            axes.plot(np.array(at) / 1e6, np.interp(at, tokens_N, bits_N), marker, color="C1", label=f"{what} ({len(at)})")
    for name, style in (("gzip", "--"), ("xz", ":")):
        axes.axhline(result[name], color="0.4", linestyle=style, label=f"{name}, same files: {result[name]:.2f}")
    low = min(smooth.min(), result["bits_per_byte"], result["xz"])
    axes.set(xlabel="million tokens", ylabel="bits per byte", ylim=(min(1.5, 0.9 * low), 5),
             title=f"{result['params_total'] / 1e6:.2f} M parameters, {result['train_seconds']:.0f} s of training")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    return path


def guard_marks(records) -> dict[str, list[int]]:
    """The tokens at which steps were skipped, and at which the run goes on after a rollback; none in runs of before."""
    marks = {"steps skipped": [], "rollbacks": []}
    for before, record in zip([{}, *records], records):
        for what, key in zip(marks, ("skipped", "rollbacks")):
            marks[what] += [record["tokens"]] * (record.get(key, 0) > before.get(key, 0))
    return marks


