"""Text to token ids and back: bytes (no files, exact bits per byte), numbers, or a Hugging Face tokenizer.json.

A tokenizer has `vocab` (ids are below it), `bos`, `eos`, `pad`, `encode(raw bytes) -> int32 ids` without specials, and
`decode(ids) -> str`, which leaves specials out.
"""
import contextlib
import math

import numpy as np

from mmx import config
from mmx.config import ConfigError
from mmx.files import untrusted

BOS = ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>", "<beginning_of_sentence>", "<|startoftext|>", "<|bos|>")
EOS = ("</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<end_of_sentence>", "<|endoftext|>", "<|eos|>", "<|im_end|>")
PAD = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")

MOST_VOCAB = 1 << 24    # of a tokenizer.json
MOST_GROWTH, MOST_PARTS = 256, 64               # what its steps make of a text, at most; steps
MOST_AFFIX, MOST_WORD = 64, 1000                # characters of a prefix or suffix, and of a word that WordPiece cuts


class Bytes:
    """A byte is its own id; bos, eos and pad follow, then five spare ids."""
    vocab, bos, eos, pad = 264, 256, 257, 258

    def encode(self, raw: bytes, name: str = "text") -> np.ndarray:
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def decode(self, ids) -> str:
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", "replace")


class Numbers:
    """A text is ids below `count` as decimal numbers; bos, eos and pad follow. For sources of ids (`data.generated`)."""

    def __init__(self, count: str):
        if len(count) > 8 or not count.isdecimal() or not 0 < int(count) < 2**24:
            raise ConfigError(f"data.tokenizer='numbers:{count}' needs how many ids there are, as numbers:4096")
        self.bos = int(count)
        self.eos, self.pad, self.vocab = self.bos + 1, self.bos + 2, self.bos + 3

    def encode(self, raw: bytes, name: str = "text") -> np.ndarray:
        words = raw.decode("utf-8", "replace").split()
        sound = lambda word: len(word) <= 8 and word.isdecimal() and int(word) < self.bos
        wrong = next((word for word in words if not sound(word)), None)
        if wrong is not None:
            raise ConfigError(f"{name}: {wrong[:50]!r} is no number below {self.bos}, which data.tokenizer=numbers:{self.bos} "
                              "takes")
        return np.array(words, np.int32)

    def decode(self, ids) -> str:
        return " ".join(str(int(i)) for i in ids if 0 <= i < self.bos)


class File:
    """A tokenizer.json. Without a bos or a pad among its special tokens, eos serves as either."""

    def __init__(self, path: str):
        try:
            import tokenizers
        except ImportError:
            raise ConfigError(f"data.tokenizer={path!r} needs the package tokenizers: pip install tokenizers") from None
        with _told(f"data.tokenizer: {path!r} is not 'bytes', 'numbers:COUNT' or a tokenizer.json"):
            text = untrusted.read_bytes(path, untrusted.TOKENIZER_BYTES).decode()
            _check(untrusted.loads(text))
            self._model = tokenizers.Tokenizer.from_str(text)
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True        # "</s>" written in a text is text, not the end of a document
        self.vocab = 1 + max(self._model.get_vocab(with_added_tokens=True).values(), default=-1)
        if self.vocab > MOST_VOCAB:
            raise ConfigError(f"data.tokenizer: {path!r} has ids up to {self.vocab - 1:,}, more than {MOST_VOCAB:,}")
        specials = {t.content: i for i, t in self._model.get_added_tokens_decoder().items() if t.special}
        eos = _first(specials, EOS)
        if eos is None:
            raise ConfigError(f"data.tokenizer: {path!r} has no end-of-text token; its special tokens need one of "
                              + ", ".join(EOS))
        self.eos = eos
        self.bos = _first(specials, BOS, eos)
        self.pad = _first(specials, PAD, eos)

    def encode(self, raw: bytes, name: str = "text") -> np.ndarray:
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name}: not UTF-8 at byte {error.start}; data.tokenizer=bytes takes any text") from None
        with _told(f"{name}: data.tokenizer fails on it"):
            return np.array(self._model.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids) -> str:
        with _told("data.tokenizer fails on ids"):
            return self._model.decode([int(i) for i in ids if 0 <= i < self.vocab], skip_special_tokens=True)


def tokenizer(name: str) -> Bytes | Numbers | File:
    """"bytes", "numbers:COUNT", or the path of a tokenizer.json."""
    if name.startswith(config.NUMBERS):
        return Numbers(name.removeprefix(config.NUMBERS))
    return Bytes() if name == "bytes" else File(name)


def of_checkpoint(name: str, vocab: int) -> Bytes | Numbers | File:
    """The tokenizer of a checkpoint with an embedding of `vocab` rows; `name` is empty where it has none."""
    if not name:
        raise ConfigError("this checkpoint has no tokenizer: put its tokenizer.json beside config.json, or give token ids")
    found = tokenizer(name)
    check_vocab(found, vocab)
    return found


def document(tokenizer, raw: bytes, name: str = "text") -> np.ndarray:
    """bos + tokens + eos."""
    return np.concatenate([[tokenizer.bos], tokenizer.encode(raw, name), [tokenizer.eos]], dtype=np.int32)


def prompted(tokenizer, prompt: bytes, completion: bytes, name: str = "text") -> tuple[np.ndarray, np.ndarray]:
    """bos + prompt + completion + eos, each encoded alone as in inference, and the targets, -1 within the prompt."""
    asked, said = tokenizer.encode(prompt, name), tokenizer.encode(completion, name)
    ids = np.concatenate([[tokenizer.bos], asked, said, [tokenizer.eos]], dtype=np.int32)
    return ids, np.concatenate([np.full(len(asked), -1), said, [tokenizer.eos, -1]], dtype=np.int32)


def check_ids(tokenizer, ids, name: str) -> None:
    """Refuses token ids of a file that the tokenizer does not have."""
    if np.max(ids) >= tokenizer.vocab:
        raise ConfigError(f"{name}: token id {np.max(ids)} is out of range, data.tokenizer has {tokenizer.vocab:,} ids")


def check_vocab(tokenizer, vocab: int) -> None:
    """Refuses a tokenizer whose ids do not fit a model's embedding."""
    if tokenizer.vocab > vocab:
        raise ConfigError(f"the tokenizer's ids reach {tokenizer.vocab - 1}, out of range of model.vocab={vocab}; "
                          f"set model.vocab={tokenizer.vocab} or more")


def _first(specials: dict, names: tuple, default: int | None = None) -> int | None:
    return next((specials[name] for name in names if name in specials), default)


@contextlib.contextmanager
def _told(what: str):
    """What tokenizers says in one line; its panics are no Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ConfigError(f"{what} ({' '.join(str(error).split())[:500]})") from None


def _check(text) -> None:
    """Refuses a tokenizer.json whose steps can make of a text more than MOST_GROWTH of it: forty that double it are 10^12."""
    if not isinstance(text, dict):
        raise ValueError("it is no JSON object")
    for steps in (("normalizer", "pre_tokenizer"), ("decoder",)):
        parts = [part for name in steps for part in _parts(text.get(name))]
        if len(parts) > MOST_PARTS or math.prod(map(_growth, parts)) > MOST_GROWTH:
            raise ValueError(f"its {' and '.join(steps)} can make a text {MOST_GROWTH} times as long")
    model = text.get("model")
    for key, value in model.items() if isinstance(model, dict) else ():
        if isinstance(value, str) and len(value) > MOST_AFFIX and key != "type":
            raise ValueError(f"model.{key} has {len(value)} characters, more than {MOST_AFFIX}")
        if key == "max_input_chars_per_word" and not (type(value) is int and value <= MOST_WORD):
            raise ValueError(f"model.{key} is more than {MOST_WORD}")


def _parts(step) -> list[dict]:
    """A step's own steps, those of its sequences too."""
    if not isinstance(step, dict):
        return []
    inner = [part for key in ("normalizers", "pretokenizers", "decoders") if isinstance(step.get(key), list)
             for each in step[key] for part in _parts(each)]
    return [step, *inner]


def _growth(part: dict) -> int:
    """How many times as long a text may be behind a step."""
    added = [len(part[key]) for key in ("content", "prepend", "prefix", "suffix", "replacement")
             if isinstance(part.get(key), str)]
    if part.get("type") in ("ByteLevel", "Metaspace"):
        return 2
    pattern = part.get("pattern")
    replaced = pattern.get("String") if part.get("type") == "Replace" and isinstance(pattern, dict) else None
    return max(1, -(-sum(added) // len(replaced))) if isinstance(replaced, str) and replaced else 1 + sum(added)
