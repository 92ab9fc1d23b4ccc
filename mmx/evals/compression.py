"""Bits per byte of held-out text, beside what gzip and xz make of the same files.

    bits per byte = sum over all targets (end of text included) of -log2 p / bytes of the raw text

Each file starts anew, from its beginning-of-text token: no file helps another, as none helps gzip or xz.
"""
import dataclasses
import functools
import gzip
import lzma
import math
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm.auto import tqdm

from mmx import checkpoint, config, metrics
from mmx.config import ConfigError
from mmx.data import packing, pipeline, tokens
from mmx.loss import cross_entropy
from mmx.model import Model

CURVE = "seconds", "tokens", "bits_per_byte"    # what of a run's steps is told and drawn


def make_evaluator(model: Model, tokenizer, *, length: int, batch: int, context: int, loss_chunk: int, sharding=None):
    """A function (params, [(name, raw bytes)], limit) -> {name: bits per byte, ..., "all": ...}, jitted once.

    Rows of `length` tokens, of which the first `context` only serve as context; `limit` bytes at most (0: all). Logits of
    `loss_chunk` tokens exist at a time. `sharding` cuts a batch over a mesh, of which each process gives all of it.
    """
    whole = sharding and NamedSharding(sharding.mesh, P())

    @functools.partial(jax.jit, out_shardings=whole)
    def nats_B(params, row):
        x_BTD, _, _ = model.apply({"params": params}, row["tokens"], row["segments"], row["positions"])
        return cross_entropy(x_BTD, params["head_WD"], row["targets"], row["weights"], loss_chunk)

    def evaluate(params, documents, limit: int = 0, progress: bool = False) -> dict[str, float]:
        documents = head(documents, limit)
        encoded = [tokens.document(tokenizer, raw, name) for name, raw in documents]
        rows = packing.batches(encoded, length, batch, context)
        count = sum(len(range(0, max(len(d) - 1 - context, 1), length - context)) for d in encoded)
        nats, waiting = np.zeros(len(documents)), []
        for document_B, row in tqdm(rows, "bits per byte", -(-count // batch), unit="batch", disable=not progress):
            if sharding:
                row = {k: jax.make_array_from_process_local_data(sharding, x, x.shape) for k, x in row.items()}
            waiting.append((document_B, nats_B(params, row)))
        for document_B, value_B in waiting:
            np.add.at(nats, document_B, jax.device_get(value_B))
        sizes = np.array([len(raw) for _, raw in documents])
        each = {name: float(n / math.log(2) / s) for (name, _), n, s in zip(documents, nats, sizes)}
        return each | {"all": float(nats.sum() / math.log(2) / sizes.sum())}

    return evaluate


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
    from mmx import convert  # here, for train imports this module

    loaded, found = convert.load(path, weights_dtype=weights_dtype), checkpoint.find_step(path)
    experiment = config.build(checkpoint.read_config(found[0])) if found else config.Experiment()
    data = dataclasses.replace(experiment.data, sources=(source,)) if source else experiment.data
    documents = head((pipeline.validation if split == "validation" else pipeline.test)(data), limit)
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
    found, step = measure(path, split, source, weights_dtype, limit), checkpoint.find_step(path)
    documents, records = found["documents"], []
    if step:
        records = [r for r in metrics.read(step[0], *CURVE) if r["step"] <= int(step[1].name)]
    result = {"bits_per_byte": found["bits_per_byte"]} | baselines(documents)
    result |= {"split": split, "files": len(documents), "bytes": sum(len(raw) for _, raw in documents),
               "per_file": found["per_file"]}
    if records:
        last = records[-1]
        result |= {"train_seconds": last["seconds"], "steps": last["step"], "train_tokens": last["tokens"],
                   "params_total": found["config"].params_total, "params_active": found["config"].params_active}
    return result


def bytes_per_token(tokenizer, documents) -> float:
    """Of held-out text (1 for bytes but for the special tokens, which count for nothing; 1 where all documents are ids)."""
    count = sum(len(tokenizer.encode(raw, name)) for name, raw in documents)
    return sum(len(raw) for _, raw in documents) / count if count else 1.0


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


def head(documents, limit: int):
    """The first documents up to `limit` bytes (0: all), the last one cut where a character begins."""
    kept, left = [], limit or math.inf
    for name, raw in documents:
        size = min(left, len(raw))
        if size < len(raw):     # UTF-8 goes on for three bytes at most; other text is cut anywhere
            size = next((n for n in range(size, max(size - 4, 0), -1) if raw[n] & 0xC0 != 0x80), size)
        if size:
            kept.append((name, raw[:size]))
        left -= size
        if size < len(raw):
            break
    return kept
