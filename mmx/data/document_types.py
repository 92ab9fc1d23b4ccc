"""Types of a document's content other than plain text, which is bytes."""
from typing import NamedTuple

import numpy as np


class PromptCompletion(NamedTuple):
    """A prompt and its completion. The loss covers the completion only."""
    prompt: bytes
    completion: bytes


class ImageText(NamedTuple):
    """A text with images. The loss covers the completion only; image tokens are never targets."""
    prompt: bytes           # may be empty
    completion: bytes
    images: tuple           # sources for `images.read`, one for each placeholder in the two texts


class TokenIds(NamedTuple):
    """Token ids with a target for each, -1 where the loss does not count."""
    tokens_T: np.ndarray
    targets_T: np.ndarray
