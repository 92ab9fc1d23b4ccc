"""The files of a token store.

    manifest.json               what the store contains; written last, so a folder without it is not a store
    tokenizer.json              a copy of the tokenizer's file, if it has one
    units.json                  the units of work, while the store is prepared and afterwards
    parts/00012.tokens          token ids of the part's documents, one after the other, each with its bos and eos
    parts/00012.documents       one RECORD for each document
    parts/00012.targets         the target of each token (int32, -1: none), if the source gives targets for each token
    parts/00012.images          one JSON line for each document with images: its name and DocumentImages
    parts/00012.held_out.gz     one JSON line for each document of the validation and test splits: its text
    parts/00012.json            the part's summary; written last, so a part without it is prepared again

All numbers are little-endian. A unit of work is a file, or a range of one, and fills one part.

Documents of the part "border" take the place of the document at which the training text ends, where the names of the documents
put none of them into the validation split (`sources`).
"""
import dataclasses
from typing import NamedTuple

import numpy as np

VERSION = 1
MANIFEST, UNITS, TOKENIZER, BORDER = "manifest.json", "units.json", "tokenizer.json", "border"

SPLITS = "train", "validation", "test"
TEXT, PROMPT, TARGETS = range(3)        # kinds of a document: next tokens; the same after `masked` tokens; parts/*.targets

RECORD = np.dtype([
    ("end", "<u8"),         # tokens of the part up to the end of this document
    ("size", "<u8"),        # bytes of its text; for token ids, their number
    ("image", "<i8"),       # the position of its line in parts/*.images; -1: no images
    ("targets", "<u8"),     # tokens that have a target
    ("masked", "<u4"),      # of a PROMPT: its first tokens that have no target
    ("split", "u1"),        # an index into SPLITS, by the document's name
    ("kind", "u1"),
])


class Part(NamedTuple):
    """A part's summary."""
    name: str
    documents: int
    tokens: int
    sizes: dict[str, int]       # bytes of each of its files, by suffix
    sha256: str                 # of the names and texts of its documents
    unread: str                 # the name of the first document with images that was left out of a store for a text model


class Border(NamedTuple):
    """Where the training text ends: documents from (part, document) on are for validation if their names say "train"."""
    part: int
    document: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a store contains."""
    source: str
    files: list                     # [path, bytes, version] of each file of the source
    tokenizer: dict                 # see `identity.tokenizer`
    images: dict | None             # see `identity.images`; None: no document has images
    dtype: str                      # of the token ids
    parts: tuple[Part, ...]
    splits: dict[str, dict]         # {split: {"documents", "tokens", "bytes", "targets"}}
    all_train: bool = False         # every document is for training, whatever its name says
    border: Border | None = None
    format: int = VERSION
