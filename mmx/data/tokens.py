"""Text to token ids and back: bytes (no files, exact bits per byte), numbers, or a Hugging Face tokenizer.json.

A tokenizer has `vocab` (ids are below it), `bos`, `eos`, `pad`, `encode(raw bytes) -> int32 ids` without specials, and
`decode(ids) -> str`, which leaves specials out.
"""
import numpy as np

from mmx import config
from mmx.config import ConfigError

BOS = ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>", "<beginning_of_sentence>", "<|startoftext|>", "<|bos|>")
EOS = ("</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<end_of_sentence>", "<|endoftext|>", "<|eos|>", "<|im_end|>")
PAD = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")


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
        if not count.isdecimal() or not 0 < int(count) < 2**24:
            raise ConfigError(f"data.tokenizer='numbers:{count}' needs how many ids there are, as numbers:4096")
        self.bos = int(count)
        self.eos, self.pad, self.vocab = self.bos + 1, self.bos + 2, self.bos + 3

    def encode(self, raw: bytes, name: str = "text") -> np.ndarray:
        words = raw.decode("utf-8", "replace").split()
        wrong = next((word for word in words if not word.isdecimal() or int(word) >= self.bos), None)
        if wrong is not None:
            raise ConfigError(f"{name}: {wrong!r} is no number below {self.bos}, which data.tokenizer=numbers:{self.bos} takes")
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
        try:
            self._model = tokenizers.Tokenizer.from_file(path)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"data.tokenizer: {path!r} is neither 'bytes' nor a tokenizer.json ({reason})") from None
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True        # "</s>" written in a text is text, not the end of a document
        self.vocab = 1 + max(self._model.get_vocab(with_added_tokens=True).values())
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
        return np.array(self._model.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids) -> str:
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
