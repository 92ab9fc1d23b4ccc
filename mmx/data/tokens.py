"""Tokenizers: bytes (need no file, exact bits per byte), numbers, or a Hugging Face tokenizer.json.

A tokenizer has `vocab` (all ids are below it), the ids `bos`, `eos` and `pad`, and two methods: `encode(raw bytes) -> int32
ids` adds no special tokens, and `decode(ids) -> str` skips special tokens.
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

# limits on a tokenizer.json
MAX_VOCAB = 1 << 24
MAX_GROWTH = 256        # largest factor by which its steps may lengthen a text
MAX_STEPS = 64
MAX_AFFIX = 64          # characters of a prefix or suffix
MAX_WORD = 1000         # characters of a word that WordPiece splits


class Bytes:
    """Each byte is its own id; ids 256 to 263 are bos, eos, pad and five unused ids."""
    vocab, bos, eos, pad = 264, 256, 257, 258

    def encode(self, raw: bytes, name: str = "text") -> np.ndarray:
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def decode(self, ids) -> str:
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", "replace")


class Numbers:
    """For `data.token_tasks`: a text is a list of decimal ids below `count`. The ids from `count` on are bos, eos and pad."""

    def __init__(self, count: str):
        if len(count) > 8 or not count.isdecimal() or not 0 < int(count) < 2**24:
            raise ConfigError(f"data.tokenizer='numbers:{count}' needs the number of ids, as numbers:4096")
        self.bos = int(count)
        self.eos, self.pad, self.vocab = self.bos + 1, self.bos + 2, self.bos + 3

    def encode(self, raw: bytes, name: str = "text") -> np.ndarray:
        words = raw.decode("utf-8", "replace").split()
        valid = lambda word: len(word) <= 8 and word.isdecimal() and int(word) < self.bos
        wrong = next((word for word in words if not valid(word)), None)
        if wrong is not None:
            raise ConfigError(f"{name}: {wrong[:50]!r} is not a number below {self.bos}; data.tokenizer=numbers:{self.bos} "
                              "takes only such numbers")
        return np.array(words, np.int32)

    def decode(self, ids) -> str:
        return " ".join(str(int(i)) for i in ids if 0 <= i < self.bos)


class File:
    """A tokenizer.json. If its special tokens have no bos or no pad, eos is used instead."""

    def __init__(self, path: str):
        try:
            import tokenizers
        except ImportError:
            raise ConfigError(f"data.tokenizer={path!r} needs the package tokenizers: pip install tokenizers") from None
        with _one_line_errors(f"data.tokenizer: {path!r} is not 'bytes', 'numbers:COUNT' or a tokenizer.json"):
            text = untrusted.read_bytes(path, untrusted.TOKENIZER_BYTES).decode()
            _check(untrusted.loads(text))
            self._model = tokenizers.Tokenizer.from_str(text)
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True        # "</s>" in a text is plain text, not the end of the document
        self.vocab = 1 + max(self._model.get_vocab(with_added_tokens=True).values(), default=-1)
        if self.vocab > MAX_VOCAB:
            raise ConfigError(f"data.tokenizer: {path!r} has ids up to {self.vocab - 1:,}, above the limit of {MAX_VOCAB:,}")
        specials = {t.content: i for i, t in self._model.get_added_tokens_decoder().items() if t.special}
        eos = _first(specials, EOS)
        if eos is None:
            raise ConfigError(f"data.tokenizer: {path!r} has no end-of-text token; its special tokens must include "
                              "one of " + ", ".join(EOS))
        self.eos = eos
        self.bos = _first(specials, BOS, eos)
        self.pad = _first(specials, PAD, eos)

    def encode(self, raw: bytes, name: str = "text") -> np.ndarray:
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name}: not UTF-8 at byte {error.start}; data.tokenizer=bytes accepts any bytes") from None
        with _one_line_errors(f"{name}: data.tokenizer cannot encode it"):
            return np.array(self._model.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids) -> str:
        with _one_line_errors("data.tokenizer cannot decode the ids"):
            return self._model.decode([int(i) for i in ids if 0 <= i < self.vocab], skip_special_tokens=True)


def tokenizer(name: str) -> Bytes | Numbers | File:
    """The tokenizer named "bytes", "numbers:COUNT", or by the path of a tokenizer.json."""
    if name.startswith(config.NUMBERS):
        return Numbers(name.removeprefix(config.NUMBERS))
    return Bytes() if name == "bytes" else File(name)


def of_checkpoint(name: str, vocab: int) -> Bytes | Numbers | File:
    """The tokenizer of a checkpoint whose embedding has `vocab` rows; `name` is empty if the checkpoint has none."""
    if not name:
        raise ConfigError("this checkpoint has no tokenizer: put its tokenizer.json next to config.json, or give token ids")
    loaded = tokenizer(name)
    check_vocab(loaded, vocab)
    return loaded


def document(tokenizer, raw: bytes, name: str = "text") -> np.ndarray:
    """The ids of a document: bos + tokens + eos."""
    return np.concatenate([[tokenizer.bos], tokenizer.encode(raw, name), [tokenizer.eos]], dtype=np.int32)


def prompt_completion(tokenizer, prompt: bytes, completion: bytes, name: str = "text") -> tuple[np.ndarray, np.ndarray]:
    """The ids bos + prompt + completion + eos, and their targets: -1 within the prompt.

    Prompt and completion are encoded separately, as in inference.
    """
    prompt_T, completion_T = tokenizer.encode(prompt, name), tokenizer.encode(completion, name)
    ids_T = np.concatenate([[tokenizer.bos], prompt_T, completion_T, [tokenizer.eos]], dtype=np.int32)
    return ids_T, np.concatenate([np.full(len(prompt_T), -1), completion_T, [tokenizer.eos, -1]], dtype=np.int32)


def check_ids(tokenizer, ids, name: str) -> None:
    """Raises ConfigError if token ids of a file are outside the tokenizer's vocabulary."""
    if np.max(ids) >= tokenizer.vocab:
        raise ConfigError(f"{name}: token id {np.max(ids)} is out of range: data.tokenizer has {tokenizer.vocab:,} ids")


def check_vocab(tokenizer, vocab: int) -> None:
    """Raises ConfigError if a tokenizer's ids do not fit the model's embedding of `vocab` rows."""
    if tokenizer.vocab > vocab:
        raise ConfigError(f"the tokenizer's ids reach {tokenizer.vocab - 1}, out of range of model.vocab={vocab}; "
                          f"set model.vocab={tokenizer.vocab} or more")


def _first(specials: dict, names: tuple, default: int | None = None) -> int | None:
    return next((specials[name] for name in names if name in specials), default)


@contextlib.contextmanager
def _one_line_errors(message: str):
    """Turns all errors of tokenizers into a one-line ConfigError, including its panics, which are not an Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ConfigError(f"{message} ({' '.join(str(error).split())[:500]})") from None


def _check(text) -> None:
    """Raises ValueError for a tokenizer.json that can make a text more than MAX_GROWTH times as long.

    The factors of all steps multiply: forty steps that double a text make it 10^12 times as long.
    """
    if not isinstance(text, dict):
        raise ValueError("it is not a JSON object")
    for names in (("normalizer", "pre_tokenizer"), ("decoder",)):
        steps = [step for name in names for step in _steps(text.get(name))]
        if len(steps) > MAX_STEPS or math.prod(map(_growth, steps)) > MAX_GROWTH:
            raise ValueError(f"its {' and '.join(names)} can make a text {MAX_GROWTH} times as long")
    model = text.get("model")
    for key, value in model.items() if isinstance(model, dict) else ():
        if isinstance(value, str) and len(value) > MAX_AFFIX and key != "type":
            raise ValueError(f"model.{key} has {len(value)} characters, more than {MAX_AFFIX}")
        if key == "max_input_chars_per_word" and not (type(value) is int and value <= MAX_WORD):
            raise ValueError(f"model.{key} is more than {MAX_WORD}")


def _steps(step) -> list[dict]:
    """A step and, if it is a sequence, all steps inside it."""
    if not isinstance(step, dict):
        return []
    inner = [found for key in ("normalizers", "pretokenizers", "decoders") if isinstance(step.get(key), list)
             for each in step[key] for found in _steps(each)]
    return [step, *inner]


def _growth(step: dict) -> int:
    """An upper bound on the factor by which a step lengthens a text."""
    added = [len(step[key]) for key in ("content", "prepend", "prefix", "suffix", "replacement")
             if isinstance(step.get(key), str)]
    if step.get("type") in ("ByteLevel", "Metaspace"):
        return 2
    pattern = step.get("pattern")
    replaced = pattern.get("String") if step.get("type") == "Replace" and isinstance(pattern, dict) else None
    return max(1, -(-sum(added) // len(replaced))) if isinstance(replaced, str) and replaced else 1 + sum(added)
