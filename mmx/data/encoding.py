"""Encodes documents: the token ids and targets of each kind of content (`document_types`)."""
import functools
from typing import NamedTuple

import numpy as np

from mmx import config
from mmx.config import ConfigError
from mmx.data import images, packing, tokens
from mmx.data.document_types import ImageText, PromptCompletion, TokenIds


class Encoded(NamedTuple):
    """The token ids of a document, as training reads it."""
    ids_T: np.ndarray
    targets_T: np.ndarray | None        # explicit targets; None: the next tokens
    images: packing.DocumentImages | None = None


class ImageOptions(NamedTuple):
    """How documents with images are encoded."""
    vision: config.Vision = config.Vision()     # of the model; a model without vision cannot read them
    # a document of one image and its caption, without a prompt, is followed by a copy of the caption without the image, for the
    # contrastive loss; the copy has no targets
    copy_captions: bool = False


TEXT_ONLY = ImageOptions()


def image_options(e: config.Experiment) -> ImageOptions:
    """The options of an experiment."""
    return ImageOptions(e.model.vision, e.train.contrastive > 0)


def encode(tokenizer, content, name: str, options: ImageOptions = TEXT_ONLY) -> Encoded:
    """Encodes a document's content. `name` names the document in error messages."""
    if isinstance(content, bytes):
        return Encoded(tokens.document(tokenizer, content, name), None)
    if isinstance(content, PromptCompletion):
        return Encoded(*tokens.prompt_completion(tokenizer, *content, name))
    if isinstance(content, ImageText):
        return _encode_with_images(tokenizer, content, name, *options)
    tokens.check_ids(tokenizer, np.concatenate(content), name)
    return Encoded(*content)


def encode_all(tokenizer, documents: list[tuple], options: ImageOptions = TEXT_ONLY) -> list[Encoded]:
    """`encode` of each (name, content); the texts are tokenized together."""
    whole = {n for n, (_, content) in enumerate(documents) if isinstance(content, bytes)}
    texts = iter(tokens.documents(tokenizer, [documents[n] for n in sorted(whole)]))
    return [Encoded(next(texts), None) if n in whole else encode(tokenizer, content, name, options)
            for n, (name, content) in enumerate(documents)]


def _encode_with_images(tokenizer, content: ImageText, name: str, v: config.Vision, copy_captions: bool) -> Encoded:
    """As for a prompt and its completion; image tokens are never targets."""
    if not v.layers:
        refuse_images(name)
    try:
        sizes = [images.size(image) for image in content.images]
        counts = [_tokens_and_tiles(v, size)[0] for size in sizes]
        in_prompt = content.prompt.count(images.PLACEHOLDER.encode())
        parts_of_prompt, parts_of_completion = encode_parts(tokenizer, content, name, v)
        prompt_T = images.insert_images(v, parts_of_prompt, counts[:in_prompt])
        completion_T = images.insert_images(v, parts_of_completion, counts[in_prompt:])
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    ids_T, targets_T = tokens.with_targets(tokenizer, prompt_T, completion_T)
    targets_T[targets_T == v.token] = -1
    copy_T = ids_T[ids_T != v.token] if copy_captions and not content.prompt and len(sizes) == 1 else ids_T[:0]
    tiles = sum(_tokens_and_tiles(v, size)[1] for size in sizes)
    return Encoded(np.concatenate([ids_T, copy_T]), np.concatenate([targets_T, np.full(len(copy_T), -1, np.int32)]),
                   packing.DocumentImages(content.images, tiles, len(copy_T)))


def refuse_images(name: str):
    raise ConfigError(f"{name} contains an image, but this model reads only text: set model.vision.layers, or leave the source "
                      "out")


def encode_parts(tokenizer, content: ImageText, name: str, v: config.Vision) -> tuple[list, list]:
    """The ids of the prompt's and of the completion's parts between images. No image is between the two."""
    *prompt, last = images.split_text(v, content.prompt)
    first, *completion = images.split_text(v, content.completion)
    border = tokens.encode_pair(tokenizer, last, first, name, continues=bool(prompt))
    return ([*(tokenizer.encode(part, name, continues=n > 0) for n, part in enumerate(prompt)), border[0]],
            [border[1], *(tokenizer.encode(part, name, continues=True) for part in completion)])


@functools.cache
def _tokens_and_tiles(v: config.Vision, size) -> tuple[int, int]:
    return int(images.token_count(v, *size)), int(images.tile_count(v, *size))


def texts_of(content) -> list[bytes]:
    """The texts of a document. Token ids have none."""
    if isinstance(content, bytes):
        return [content]
    return [] if isinstance(content, TokenIds) else [text for text in content[:2] if text]


def learned_text(content) -> bytes:
    """The text of a document that the loss covers: a whole text, or a completion without its prompt. Token ids have none."""
    if isinstance(content, PromptCompletion):
        return content.completion
    return content if isinstance(content, bytes) else b""
