"""What a source gives beside plain text: prompts with completions, texts with images, token ids with targets."""
from typing import NamedTuple

import numpy as np


class PromptCompletion(NamedTuple):
    prompt: bytes
    completion: bytes


class ImageText(NamedTuple):
    """With a prompt the completion is learned, without one all the text; of images nothing."""
    prompt: bytes
    completion: bytes
    images: tuple           # as many as the two have marks: what `images.read` takes


class TokenIds(NamedTuple):
    tokens_T: np.ndarray
    targets_T: np.ndarray
