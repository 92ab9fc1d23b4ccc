"""Types of a document's content other than plain text (bytes)."""
from typing import NamedTuple

import numpy as np


class PromptCompletion(NamedTuple):
    """The loss covers the completion only."""
    prompt: bytes
    completion: bytes


class ImageText(NamedTuple):
    """A text with images. The loss covers the completion only; image tokens are never targets."""
    prompt: bytes           # may be empty
    completion: bytes
    images: tuple           # one for each placeholder of the two texts, anything that `images.read` takes


class TokenIds(NamedTuple):
    """Token ids with a target for each, -1 where the loss does not count."""
    tokens_T: np.ndarray
    targets_T: np.ndarray
