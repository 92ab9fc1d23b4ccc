"""What a token store contains, as tables and a plot."""
from pathlib import Path

import numpy as np
from rich.table import Table

from mmx.config import ConfigError
from mmx.data import tokens
from mmx.data.store import layout, reading
from mmx.files import atomic

SHOWN_TOKENS = 200      # of a document's beginning
BINS = 2 ** np.arange(0, 41)        # tokens


def summarize(path: str | Path, texts: int = 3) -> dict:
    """Counts, the histogram of lengths, the tokenizer and the beginnings of the first training documents of a store.

    "lengths" lists (least, documents, tokens): documents of at least `least` and fewer than 2 `least` tokens.
    """
    if not reading.is_store(path):
        raise ConfigError(f"{path} is not a token store: it has no {layout.MANIFEST} (`mmx data prepare` makes one)")
    store = reading.Store(path)
    manifest, documents = store.manifest, reading.Documents(store)
    counts, sums, first = np.zeros(len(BINS), np.int64), np.zeros(len(BINS), np.int64), []
    for numbers, sizes, _ in store.chosen():
        bins = np.searchsorted(BINS, sizes, "right") - 1
        np.add.at(counts, bins, 1)
        np.add.at(sums, bins, sizes)
        first += [(int(n), int(size)) for n, size in zip(numbers[:texts], sizes)][:texts - len(first)]
    tokenizer = _tokenizer(store)
    beginnings = []
    for number, size in first:
        [(ids_T, _)] = documents.read([(number, 0, min(size, SHOWN_TOKENS))])
        beginnings.append(tokenizer.decode(ids_T) if tokenizer else " ".join(map(str, ids_T.tolist())))
    return {"store": str(path), "source": manifest.source, "format": manifest.format, "files": len(manifest.files),
            "parts": len(manifest.parts), "dtype": manifest.dtype, "tokenizer": manifest.tokenizer, "splits": manifest.splits,
            "lengths": [[int(least), int(n), int(total)] for least, n, total in zip(BINS, counts, sums) if n],
            "texts": beginnings}


def print_tables(found: dict, console) -> None:
    """Prints the tables of a summary."""
    table = Table("split", "documents", "tokens", "targets", "bytes of text",
                  title=f"{found['store']}, made from {found['source']}")
    for split, count in found["splits"].items():
        table.add_row(split, *(f"{count[key]:,}" for key in ("documents", "tokens", "targets", "bytes")))
    console.print(table)
    name = found["tokenizer"].get("name") or f"tokenizer.json with sha256 {found['tokenizer']['sha256'][:16]}"
    console.print(f"tokenizer: {name}, {found['tokenizer']['vocab']:,} ids, stored as {found['dtype']}")
    lengths = Table("tokens of a document", "documents", "tokens in all", "", title="training documents by length")
    most = max((count for _, count, _ in found["lengths"]), default=1)
    for least, count, total in found["lengths"]:
        lengths.add_row(f"{least:,} to {2 * least - 1:,}", f"{count:,}", f"{total:,}", "#" * max(round(30 * count / most), 1))
    console.print(lengths)
    for text in found["texts"]:
        console.print(f"- {text!r}")


def plot(found: dict, path: Path) -> Path:
    """Plots the histogram of lengths, and returns the path of the figure."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    least, counts, sums = np.array(found["lengths"], float).T
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.stairs(counts / counts.sum(), np.append(least, 2 * least[-1]), fill=True, alpha=0.5, label="documents")
    axes.stairs(sums / sums.sum(), np.append(least, 2 * least[-1]), color="C1", linewidth=2, label="tokens")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of a document", ylabel="share", title=f"training documents of {Path(found['store']).name}")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.temporary(path) as partial:
        figure.savefig(partial, dpi=110, format=path.suffix[1:])
        partial.replace(path)
    pyplot.close(figure)
    return path


def _tokenizer(store: reading.Store):
    """The tokenizer of a store; None if the store has no copy of its file."""
    if name := store.manifest.tokenizer.get("name"):
        return tokens.tokenizer(name)
    path = store.folder / layout.TOKENIZER
    return tokens.tokenizer(str(path)) if path.exists() else None
