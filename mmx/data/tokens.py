"""Tokenizers: bytes (need no file, exact bits per byte), numbers, or a Hugging Face tokenizer.json.

A tokenizer has `vocab` (all ids are below it), the ids `bos`, `eos` and `pad`, `ends` (the ids that end generation; the first
of them is `eos`), and two methods: `encode(raw bytes) -> int32 ids` adds no special tokens, and `decode(ids) -> str` skips
special tokens.

A text that is encoded in parts must decode to the whole text, and many tokenizers treat the beginning of a text differently:
SentencePiece's put a space before the first word when they encode, and drop one when they decode. So the parts of a text after
the first are encoded with `continues=True`, a prompt and its completion by `encode_pair`, and what a model adds to a text is
decoded by `decode_continuation`.
"""
import contextlib
import copy
import json
import math
from pathlib import Path

import numpy as np

from mmx import config
from mmx.config import ConfigError
from mmx.data import special_tokens
from mmx.files import untrusted

TAIL = 12               # tokens before a continuation that are decoded with it

# limits on a tokenizer.json
MAX_VOCAB = 1 << 24
MAX_GROWTH = 256        # largest factor by which its steps may lengthen a text
MAX_STEPS = 64
MAX_AFFIX = 64          # characters of a prefix or suffix
MAX_WORD = 1000         # characters of a word that WordPiece splits


class Bytes:
    """Each byte is its own id; ids 256 to 263 are bos, eos, pad and five unused ids."""
    vocab, bos, eos, pad = 264, 256, 257, 258
    ends = (eos,)

    def encode(self, raw: bytes, name: str = "text", continues: bool = False) -> np.ndarray:
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
        self.ends = (self.eos,)

    def encode(self, raw: bytes, name: str = "text", continues: bool = False) -> np.ndarray:
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
    """A tokenizer.json. `special_tokens.decide` says which tokens begin and end a text."""

    def __init__(self, path: str):
        try:
            import tokenizers  # noqa: F401 (`_build` uses it)
        except ImportError:
            raise ConfigError(f"data.tokenizer={path!r} needs the package tokenizers: pip install tokenizers") from None
        with _one_line_errors(f"data.tokenizer: {path!r} is not 'bytes', 'numbers:COUNT' or a tokenizer.json"):
            text = untrusted.read_bytes(path, untrusted.TOKENIZER_BYTES).decode("utf-8-sig")
            table = untrusted.loads(text)
            _check(table)
            self._model = self._continuing = _build(text)
            if (continuing := _without_first_space(table)) != table:
                self._continuing = _build(json.dumps(continuing))
        self.vocab = 1 + max(self._model.get_vocab(with_added_tokens=True).values(), default=-1)
        if self.vocab > MAX_VOCAB:
            raise ConfigError(f"data.tokenizer: {path!r} has ids up to {self.vocab - 1:,}, above the limit of {MAX_VOCAB:,}")
        specials = {t.content: i for i, t in self._model.get_added_tokens_decoder().items() if t.special}
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.bos, self.ends, self.pad = special_tokens.decide(Path(path).parent, vocabulary, specials, path)
        self.eos = self.ends[0]

    def encode(self, raw: bytes, name: str = "text", continues: bool = False) -> np.ndarray:
        return np.array(self._encode(raw, name, continues).ids, np.int32)

    def encode_all(self, documents: list[tuple[str, bytes]]) -> list[np.ndarray]:
        """`encode` of each (name, raw), with all of tokenizers' threads."""
        texts = [self._decode_text(raw, name) for name, raw in documents]
        with _one_line_errors(f"{documents[0][0]} and later documents: data.tokenizer cannot encode them"):
            return [np.array(found.ids, np.int32) for found in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def ends_of_tokens(self, raw: bytes, name: str = "text", continues: bool = False) -> np.ndarray:
        """For each token of a text, the number of characters of the text up to its end."""
        return np.array([end for _, end in self._encode(raw, name, continues).offsets], np.int32)

    def _encode(self, raw: bytes, name: str, continues: bool):
        text = self._decode_text(raw, name)
        with _one_line_errors(f"{name}: data.tokenizer cannot encode it"):
            return (self._continuing if continues else self._model).encode(text, add_special_tokens=False)

    @staticmethod
    def _decode_text(raw: bytes, name: str) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name}: not UTF-8 at byte {error.start}; data.tokenizer=bytes accepts any bytes") from None

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


def special_ids(tokenizer) -> dict[str, int | list[int]]:
    """The special tokens, as generation_config.json has them."""
    return special_tokens.as_json(dict(zip(special_tokens.KEYS, ((tokenizer.bos,), tokenizer.ends, (tokenizer.pad,)))))


def document(tokenizer, raw: bytes, name: str = "text") -> np.ndarray:
    """The ids of a document: bos + tokens + eos."""
    return np.concatenate([[tokenizer.bos], tokenizer.encode(raw, name), [tokenizer.eos]], dtype=np.int32)


def documents(tokenizer, texts: list[tuple[str, bytes]]) -> list[np.ndarray]:
    """`document` of each (name, raw)."""
    if not isinstance(tokenizer, File):
        return [document(tokenizer, raw, name) for name, raw in texts]
    return [np.concatenate([[tokenizer.bos], ids_T, [tokenizer.eos]], dtype=np.int32)
            for ids_T in (tokenizer.encode_all(texts) if texts else ())]


def prompt_completion(tokenizer, prompt: bytes, completion: bytes, name: str = "text") -> tuple[np.ndarray, np.ndarray]:
    """The ids bos + prompt + completion + eos, and their targets: -1 within the prompt."""
    return with_targets(tokenizer, *encode_pair(tokenizer, prompt, completion, name))


def with_targets(tokenizer, prompt_T, completion_T) -> tuple[np.ndarray, np.ndarray]:
    """The ids bos + prompt + completion + eos, and their targets: -1 within the prompt."""
    ids_T = np.concatenate([[tokenizer.bos], prompt_T, completion_T, [tokenizer.eos]], dtype=np.int32)
    return ids_T, np.concatenate([np.full(len(prompt_T), -1), completion_T, [tokenizer.eos, -1]], dtype=np.int32)


def encode_pair(tokenizer, prompt: bytes, completion: bytes, name: str = "text",
                continues: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a text's two parts, which together decode to the whole text.

    The ids of the whole, if they start with the prompt's. Otherwise a token of the whole spans the border: then the
    prompt has the ids that it has alone, as in inference, and the completion is encoded as a continuation. If these do not
    decode to the whole text (WordPiece marks tokens that continue a word), the completion gets the token that spans the border.

    Args:
      continues: whether another part of the text comes before the prompt.
    """
    prompt_T = tokenizer.encode(prompt, name, continues)
    if not isinstance(tokenizer, File):         # ids of bytes and numbers do not depend on their neighbours
        return prompt_T, tokenizer.encode(completion, name, continues=True)
    whole_T = tokenizer.encode(prompt + completion, name, continues)
    border = len(prompt_T)
    if not np.array_equal(whole_T[:border], prompt_T):
        completion_T = tokenizer.encode(completion, name, continues=True)
        if tokenizer.decode([*prompt_T, *completion_T]) == tokenizer.decode(whole_T):
            return prompt_T, completion_T
        ends_T = tokenizer.ends_of_tokens(prompt + completion, name, continues)
        border = int(np.searchsorted(ends_T, len(prompt.decode()), "right"))
    return whole_T[:border], whole_T[border:]


def decode_continuation(tokenizer, before, ids) -> str:
    """The text that `ids` add to the text of `before`, the tokens before them (`tail` keeps enough of them)."""
    begin, whole = tokenizer.decode(before), tokenizer.decode([*before, *ids])
    return whole[len(begin):] if whole.startswith(begin) else tokenizer.decode(ids)


def tail(tokenizer, ids) -> list[int]:
    """The last tokens of a text, from the start of a character on: at most TAIL."""
    starts = range(max(len(ids) - TAIL, 0), max(len(ids) - TAIL // 2, 1))
    start = next((n for n in starts if not tokenizer.decode(ids[n:]).startswith("\ufffd")), starts[0])
    return [int(i) for i in ids[start:]]


def check_ids(tokenizer, ids, name: str) -> None:
    """Raises ConfigError if token ids of a file are outside the tokenizer's vocabulary."""
    if np.max(ids) >= tokenizer.vocab:
        raise ConfigError(f"{name}: token id {np.max(ids)} is out of range: data.tokenizer has {tokenizer.vocab:,} ids")


def check_vocab(tokenizer, vocab: int) -> None:
    """Raises ConfigError if a tokenizer's ids do not fit the model's embedding of `vocab` rows."""
    if tokenizer.vocab > vocab:
        raise ConfigError(f"the tokenizer's ids reach {tokenizer.vocab - 1}, out of range of model.vocab={vocab}; "
                          f"set model.vocab={tokenizer.vocab} or more")


def _build(text: str):
    import tokenizers

    model = tokenizers.Tokenizer.from_str(text)
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True          # "</s>" in a text is plain text, not the end of the document
    return model


def _without_first_space(table: dict) -> dict:
    """A tokenizer.json whose steps put no space before a text: the tokenizer for a text's second and later parts."""
    table = copy.deepcopy(table)
    for key in ("normalizer", "pre_tokenizer"):
        for step in _steps(table.get(key)):
            if step.get("type") == "Metaspace":
                step |= {"prepend_scheme": "never", "add_prefix_space": False}
            elif step.get("type") == "ByteLevel":
                step["add_prefix_space"] = False
            elif step.get("type") == "Prepend":
                step["prepend"] = ""
    return table


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
