"""The tokenizer of a checkpoint: finding it, comparing it with another, and writing it so that transformers can load it."""
import contextlib
import hashlib
import json
from pathlib import Path

from mmx import config
from mmx.config import ConfigError
from mmx.data import tokens
from mmx.files import notes, untrusted

UNUSED_PARTS = ("version", "truncation", "padding", "post_processor")       # of a tokenizer.json: mmx does not use them
BYTE_IDS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}      # of the byte tokenizer
BYTE_TOKENS = ("<s>", "</s>", "<pad>")
BYTE_TOKENIZER_BYTES = 1 << 16      # more than a tokenizer.json of the byte tokenizer has


def find_tokenizer(directory: Path, ids: dict) -> str:
    """The name of a directory's tokenizer: "bytes", the path of its tokenizer.json, or "" if it has none that mmx can read.

    Args:
      ids: bos_token_id, eos_token_id and pad_token_id of the checkpoint. Without a tokenizer.json they identify the byte
        tokenizer.
    """
    file = directory / "tokenizer.json"
    if not file.exists():
        return "bytes" if ids == BYTE_IDS else ""
    small = untrusted.check_link(file).stat().st_size <= BYTE_TOKENIZER_BYTES
    return "bytes" if ids == BYTE_IDS and small and _is_byte_tokenizer(untrusted.read_bytes(file)) else str(file)


def write_tokenizer(name: str, out: Path, where) -> None:
    """Completes an export, so that AutoTokenizer of transformers gives the ids that mmx trains on, with bos before each text.

    Files that the export has from a released checkpoint stay as they are. A line on stderr says so if AutoTokenizer cannot load
    the export, or gives other ids.

    Args:
      name: the tokenizer, as in data.tokenizer; "" if the checkpoint has none.
      out: the directory of the export, which may have a temporary name.
      where: its final name, for messages.
    """
    file, settings = out / "tokenizer.json", out / "tokenizer_config.json"
    if not file.exists() and name == "bytes":
        file.write_text(json.dumps(_byte_tokenizer(), indent=1))
    if not file.exists():
        reason = f"data.tokenizer={name!r} has no tokenizer.json" if name else "the checkpoint has no tokenizer.json"
        notes.note(f"{where}: AutoTokenizer cannot load this export: {reason}")
        return
    try:
        tokenizer = tokens.tokenizer("bytes" if name == "bytes" else str(file))
    except ConfigError as error:
        notes.note(f"{where}: the tokenizer files are copied unchanged, because mmx cannot use them: {error}")
        return
    import tokenizers

    content = file.read_text(encoding="utf-8")      # `tokens.tokenizer` has checked it
    model, text = tokenizers.Tokenizer.from_str(content), "the state of the union"
    bos_T = [] if tokenizer.bos is None else [int(tokenizer.bos)]
    same = model.encode(text).ids == bos_T + model.encode(text, add_special_tokens=False).ids
    if settings.exists():
        if not same:
            notes.note(f"{where}: the released tokenizer files are copied unchanged; AutoTokenizer gives other special tokens "
                       f"than mmx trains on, which begins each text with the ids {bos_T}")
        return
    if not same:
        file.write_text(json.dumps(json.loads(content) | {"post_processor": _template(model, bos_T)}, indent=1))
    ids = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
    found = {key: model.id_to_token(int(id)) for key, id in ids.items() if id is not None}
    settings.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **found,
                                    "clean_up_tokenization_spaces": False}, indent=1))


def _template(model, bos_T: list[int]) -> dict:
    """The post_processor of a tokenizer.json that puts bos before each text."""
    names = [model.id_to_token(id) for id in bos_T]
    first = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
    single, second = [*first, {"Sequence": {"id": "A", "type_id": 0}}], {"Sequence": {"id": "B", "type_id": 1}}
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, second],
            "special_tokens": {name: {"id": name, "ids": [id], "tokens": [name]} for name, id in zip(names, bos_T)}}


def _byte_tokenizer() -> dict:
    """A tokenizer.json in which each byte is its own id, as in `tokens.Bytes`."""
    added = [{"id": 256 + i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for i, token in enumerate(BYTE_TOKENS)]
    # byte-level BPE writes a byte that is no printable character as a character from 256 on
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = {byte: 256 + i for i, byte in enumerate(byte for byte in range(256) if byte not in plain)}
    vocab = {chr(shifted.get(byte, byte)): byte for byte in range(256)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": level, "post_processor": None, "decoder": level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": vocab, "merges": []}}


def _is_byte_tokenizer(content: bytes) -> bool:
    """Whether a tokenizer.json has the vocabulary of `_byte_tokenizer`, also after another program has saved it again."""
    try:
        model = untrusted.loads(content)["model"]
        return model["vocab"] == _byte_tokenizer()["model"]["vocab"] and model["merges"] == []
    except (ValueError, KeyError, TypeError):
        return False


def fingerprint(name: str) -> str:
    """A text that is the same for two names of tokenizers if both encode every text into the same ids.

    Args:
      name: as in data.tokenizer. The contents of a tokenizer.json count, not its path.
    """
    if not config.tokenizer_file(name):
        return name
    content = untrusted.read_bytes(name, untrusted.TOKENIZER_BYTES)
    with contextlib.suppress(ValueError):       # `tokens.tokenizer` reports the damage; the bytes can be compared all the same
        if isinstance(parts := untrusted.loads(content), dict):
            used = {key: value for key, value in parts.items() if key not in UNUSED_PARTS}
            content = json.dumps(used, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()
