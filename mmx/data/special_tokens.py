"""Which tokens begin and end a text and pad it. `decide` is the only place that decides it.

For each of the three, the first of these that says it is taken; ids that the tokenizer does not have do not count:
  1. generation_config.json beside the tokenizer.json: bos_token_id, eos_token_id (an id or several), pad_token_id;
  2. config.json beside it, and for models with images its text_config;
  3. tokenizer_config.json, then special_tokens_map.json beside it: bos_token, eos_token, pad_token;
  4. the names of the special tokens in tokenizer.json (BOS, EOS, PAD);
  5. for the end of a text: the only special token, not counting those for unknown tokens, padding and masks;
  6. for the beginning and the padding: the token that ends a text.
"""
from pathlib import Path
from typing import NamedTuple

from mmx.config import ConfigError
from mmx.files import notes, untrusted

KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
ID_FILES, TOKEN_FILES = ("generation_config.json", "config.json"), ("tokenizer_config.json", "special_tokens_map.json")
BOS = ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>", "<beginning_of_sentence>", "<|startoftext|>", "<|bos|>")
EOS = ("</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<end_of_sentence>", "<|endoftext|>", "<|eos|>", "<|im_end|>")
PAD = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
OTHERS = {*PAD, "<unk>", "[UNK]", "<|unk|>", "<mask>", "[MASK]"}        # never the end of a text


class SpecialIds(NamedTuple):
    bos: int                # the first token of each text
    ends: tuple[int, ...]   # tokens that end generation; the first one ends each text that is trained on
    pad: int


def stored_ids(folder: Path) -> dict[str, tuple[int, ...]]:
    """The ids in generation_config.json or config.json of a folder, by KEYS; () where neither has one. Raises ConfigError."""
    found = dict.fromkeys(KEYS, ())
    for name in ID_FILES:
        sections = _read(folder / name)
        inner = sections.get("text_config")
        for key in KEYS:
            for section in (sections, inner if isinstance(inner, dict) else {}):
                found[key] = found[key] or _as_ids(section.get(key), f"{folder / name}: {key}")
    for key in ("bos_token_id", "pad_token_id"):
        if len(found[key]) > 1:
            raise ConfigError(f"{folder}: {key}={list(found[key])!s:.200} must be one id; only eos_token_id may have several")
    return found


def as_json(ids: dict[str, tuple[int, ...]]) -> dict[str, int | list[int] | None]:
    """`stored_ids` as config.json has them: an id alone is a number, none is null."""
    return {key: list(its) if len(its) > 1 else next(iter(its), None) for key, its in ids.items()}


def decide(folder: Path, vocabulary: dict[str, int], specials: dict[str, int], path) -> SpecialIds:
    """The special tokens of the tokenizer.json `path`, whose folder may have the other files. Raises ConfigError.

    Args:
      vocabulary: the id of every token, special or not.
      specials: the ids of the special tokens, by name.
    """
    found, most = stored_ids(folder), max(vocabulary.values(), default=-1)
    for key, ids in found.items():
        if unknown := [i for i in ids if i > most]:
            notes.note(f"{folder}: {key}={unknown[0]} is ignored: the ids of the tokenizer {path!r} end at {most}")
        found[key] = tuple(i for i in ids if i <= most)
    for name in TOKEN_FILES:
        named = _read(folder / name)
        for key in KEYS:
            found[key] = found[key] or _find(named, key.removesuffix("_id"), vocabulary, folder / name, path)
    for key, names in zip(KEYS, (BOS, EOS, PAD)):
        found[key] = found[key] or tuple(specials[name] for name in names if name in specials)[:1]
    candidates = [i for name, i in specials.items() if name not in OTHERS]
    bos, ends, pad = (found[key] for key in KEYS)
    ends = ends or tuple(candidates if len(candidates) == 1 else ())
    if not ends:
        raise ConfigError(f"data.tokenizer: {path!r} has no end-of-text token: give \"eos_token_id\" in a "
                          f"generation_config.json beside it, or a special token the name of one of {', '.join(EOS)}")
    return SpecialIds((bos or ends)[0], ends, (pad or ends)[0])


def _read(file: Path) -> dict:
    return untrusted.read_json(untrusted.check_link(file)) if file.exists() else {}


def _as_ids(value, where: str) -> tuple[int, ...]:
    """An id or a list of ids as a tuple; () for null, and for -1, which some checkpoints write for none."""
    ids = tuple(i for i in (value if isinstance(value, list) else [value]) if i is not None and i != -1)
    if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise ConfigError(f"{where}={value!r:.200} must be a token id, a list of ids or null")
    return ids


def _find(named: dict, key: str, vocabulary: dict[str, int], file: Path, path) -> tuple[int, ...]:
    """The id of the token that a file names: as a string, or as an object with its content."""
    token = named.get(key)
    token = token.get("content") if isinstance(token, dict) else token
    if token is None:
        return ()
    if not isinstance(token, str) or token not in vocabulary:
        if key == "pad_token":      # added to pad batches; nothing here depends on it
            return ()
        raise ConfigError(f"{file}: {key}={token!r:.200} is no token of {path!r}: use a token that it has, or null")
    return (vocabulary[token],)
