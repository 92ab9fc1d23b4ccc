"""What the token ids of a store depend on besides the text: the tokenizer and, for images, the model's vision config."""
import dataclasses
import hashlib

from mmx.config import ConfigError
from mmx.data import tokens
from mmx.data.encoding import ImageOptions
from mmx.files import untrusted

IMAGE_KEYS = "tile", "patch", "grids", "token"      # of model.vision: they decide the number of an image's tokens, and their id


def tokenizer(name: str) -> dict:
    """Identifies the tokenizer of data.tokenizer: its kind or the hash of its file, and its special tokens."""
    made = tokens.tokenizer(name)
    kind = {"sha256": hashlib.sha256(untrusted.read_bytes(name, untrusted.TOKENIZER_BYTES)).hexdigest()} if isinstance(
        made, tokens.File) else {"name": name}
    return kind | {"vocab": made.vocab, **tokens.special_ids(made)}


def images(options: ImageOptions) -> dict | None:
    """Identifies how images become tokens; None for a text model."""
    if not options.vision.layers:
        return None
    found = {key: value for key, value in dataclasses.asdict(options.vision).items() if key in IMAGE_KEYS}
    return found | {"grids": [list(grid) for grid in found["grids"]], "copy_captions": options.copy_captions}


def check(manifest, where: str, wanted_tokenizer: dict, wanted_images: dict | None) -> None:
    """Raises ConfigError if a store was made for another tokenizer, or its images for another vision config."""
    if manifest.tokenizer != wanted_tokenizer:
        different = sorted(key for key in manifest.tokenizer.keys() | wanted_tokenizer.keys()
                           if manifest.tokenizer.get(key) != wanted_tokenizer.get(key))
        raise ConfigError(f"{where} was made with another tokenizer than data.tokenizer ({', '.join(different)} differ): give "
                          "its tokenizer.json, or prepare the source again")
    if manifest.images is not None and manifest.images != wanted_images:
        raise ConfigError(f"{where} has images for another model.vision ({', '.join(IMAGE_KEYS)} or train.contrastive differ): "
                          "prepare the source again with this experiment")
