"""Bits per byte of held-out text, compared with gzip and xz on the same files.

    bits per byte = sum over all targets (including the end of text) of -log2 p / bytes of the raw text

Each file is evaluated separately, from a beginning-of-text token, just as gzip and xz compress each file separately.
"""
import dataclasses
import gzip
import lzma
import math
from pathlib import Path

import numpy as np

from mmx import config
from mmx.analysis.counts import count_params
from mmx.checkpoints import convert, manager
from mmx.config import ConfigError
from mmx.data import pipeline, tokens
from mmx.training import metrics
from mmx.training.evaluate import bytes_per_token, first_bytes, make_evaluator

CURVE = "seconds", "tokens", "bits_per_byte"    # the metrics that are read


def baselines(documents) -> dict[str, float]:
    """Bits per byte of gzip -9 and xz -9e, each file compressed separately."""
    size = sum(len(raw) for _, raw in documents)
    compressors = {"gzip": lambda raw: gzip.compress(raw, 9, mtime=0),
                   "xz": lambda raw: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)}
    return {name: 8 * sum(len(compress(raw)) for _, raw in documents) / size for name, compress in compressors.items()}


def measure(path, split: str = "validation", source: str | None = None, weights_dtype: str | None = None,
            limit: int = 0) -> dict:
    """Evaluates a checkpoint on `limit` bytes (0: all) of held-out text.

    Returns:
      "bits_per_byte", "nats_per_token", "per_file" (bits per byte by file name), "documents" (the (name, raw bytes) that were
      read) and "config" (of the model).
    """
    loaded, run = convert.load(path, weights_dtype=weights_dtype), manager.find_step(path)
    experiment = config.build(manager.read_config(run[0])) if run else config.Experiment()
    data = dataclasses.replace(experiment.data, sources=(source,)) if source else experiment.data
    documents = first_bytes((pipeline.validation if split == "validation" else pipeline.test)(data), limit)
    if not documents:
        raise ConfigError(f"{', '.join(data.sources)} has no {split} documents: use another --split or --source")
    tokenizer = tokens.of_checkpoint(loaded.tokenizer, loaded.config.vocab)
    length = experiment.train.length
    evaluate = make_evaluator(loaded.model, tokenizer, length=length, batch=8, overlap=length // 2,
                              loss_chunk=experiment.train.loss_chunk)
    per_file = evaluate(loaded.params, documents, progress=True)
    bits = per_file.pop("all")
    return {"bits_per_byte": bits, "nats_per_token": bits * math.log(2) * bytes_per_token(tokenizer, documents),
            "per_file": per_file, "documents": documents, "config": loaded.config}


def evaluate_checkpoint(path, split: str = "validation", source: str | None = None, weights_dtype: str | None = None,
                        limit: int = 0) -> dict:
    """`measure` with the baselines and the cost of training: the content of the eval.json that `mmx eval` writes."""
    measured, step = measure(path, split, source, weights_dtype, limit), manager.find_step(path)
    documents, records = measured["documents"], []
    if step:
        records = [r for r in metrics.read(step[0], *CURVE) if r["step"] <= int(step[1].name)]
    result = {"bits_per_byte": measured["bits_per_byte"]} | baselines(documents)
    result |= {"split": split, "files": len(documents), "bytes": sum(len(raw) for _, raw in documents),
               "per_file": measured["per_file"]}
    if records:
        last = records[-1]
        result |= {"train_seconds": last["seconds"], "steps": last["step"], "train_tokens": last["tokens"],
                   "params_total": count_params(measured["config"]).total,
                   "params_active": count_params(measured["config"]).active}
    return result


def plot_curve(workdir: Path, result: dict, path: Path) -> Path | None:
    """Plots bits per byte during training, with the held-out result, gzip and xz. Returns None if there is no run to plot."""
    if "steps" not in result:
        return None
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [r for r in metrics.read(workdir, *CURVE) if r["step"] <= result["steps"]]
    marks = guard_marks(records)
    records = [r for r in records if math.isfinite(r["bits_per_byte"])]
    if not records:
        return None
    at_tokens, bits = (np.array([r[key] for r in records]) for key in ("tokens", "bits_per_byte"))
    window = max(1, min(50, len(bits) // 10))
    smooth = np.convolve(bits, np.ones(window) / window, mode="valid")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(at_tokens / 1e6, bits, color="C0", alpha=0.2, linewidth=0.8)
    axes.plot(at_tokens[window - 1:] / 1e6, smooth, color="C0", label=f"training (mean of {window} steps)")
    axes.plot(at_tokens[-1] / 1e6, result["bits_per_byte"], "o", color="C3",
              label=f"{result['split']} files: {result['bits_per_byte']:.3f}")
    for (name, at), marker in zip(marks.items(), "x<"):
        if at:
            axes.plot(np.array(at) / 1e6, np.interp(at, at_tokens, bits), marker, color="C1", label=f"{name} ({len(at)})")
    for name, style in (("gzip", "--"), ("xz", ":")):
        axes.axhline(result[name], color="0.4", linestyle=style, label=f"{name}, same files: {result[name]:.2f}")
    low = min(smooth.min(), result["bits_per_byte"], result["xz"])
    axes.set(xlabel="training tokens (millions)", ylabel="bits per byte", ylim=(min(1.5, 0.9 * low), 5),
             title=f"{result['params_total'] / 1e6:.2f} M parameters, {result['train_seconds']:.0f} s of training")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    return path


def guard_marks(records) -> dict[str, list[int]]:
    """The token counts at which steps were skipped, and at which the run continued after a rollback.

    Both lists are empty for old runs, which did not record them.
    """
    marks = {"steps skipped": [], "rollbacks": []}
    for before, record in zip([{}, *records], records):
        for name, key in zip(marks, ("skipped", "rollbacks")):
            marks[name] += [record["tokens"]] * (record.get(key, 0) > before.get(key, 0))
    return marks


