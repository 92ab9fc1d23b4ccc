"""Requests: encodes prompts, and decodes generated ids to text that ends at a stop string."""
import bisect
from typing import NamedTuple

import jax
import numpy as np

from mmx.config import ConfigError, is_text
from mmx.data import images as pictures
from mmx.data import tokens
from mmx.inference.sampling import Sampling, check_sampling


class Request(NamedTuple):
    """A prompt to continue by at most `steps` tokens."""
    prompt: str | np.ndarray        # text, or token ids [T]
    steps: int
    sampling: Sampling = Sampling()
    images: tuple = ()              # files or PIL images, in the order in which the prompt shows them
    fold: int = 0                   # folded into the random key of sampling.seed, so that requests of one seed draw differently


class Output(NamedTuple):
    """The tokens that a request has generated since its previous Output."""
    request: int            # the request's position among all requests, from 0
    text: str               # new text; a possible beginning of a stop string waits for the next Output. Empty for id prompts
    ids_T: np.ndarray       # new tokens; the last ones are the end-of-text token or those that complete a stop string
    logprobs_T: np.ndarray  # the model's log-probability of each, float32, before temperature, top-k and top-p
    ended: bool             # no Output follows


class Sequence:
    """A request being generated: the encoded prompt, the tokens generated so far, and how much text was already returned.

    Args:
      number: the request's position among all requests.
      get_tokenizer: a function that returns the tokenizer; called for text prompts only.
      c: the model's config.
      before: the last tokens of the prefix that the prompt continues. None: no prefix; then the prompt starts with the
        beginning-of-text token.
    """

    def __init__(self, number: int, request: Request, get_tokenizer, c, before=None):
        _check(request)
        self.number, self.request, self.tokenizer, after_prefix = number, request, None, before is not None
        images = pictures.prepare_all(c.vision, request.images)
        if isinstance(request.prompt, str):
            self.tokenizer = get_tokenizer()
            before = [self.tokenizer.bos] if before is None else before
            ids_T = pictures.encode(c.vision, request.prompt.encode(), [len(image.patch_code_T) for image in images],
                                    self.tokenizer.encode, continues=bool(self.tokenizer.decode(before)))
            self.prompt_T = ids_T if after_prefix else np.append(np.int32(self.tokenizer.bos), ids_T)
            self.tail = tokens.tail(self.tokenizer, [*before, *ids_T[-tokens.TAIL:]])
        else:
            self.prompt_T = check_ids(c, np.asarray(request.prompt)[None])[0]
        if images:
            (self.patch_code_T,), self.pixels_bIYXZ = pictures.collate(c.vision, self.prompt_T[None], [images])
            if self.patch_code_T[-1]:   # decode reads the prompt's last token, and decode has no images
                raise ConfigError("the prompt ends in an image: add text after the image")
        else:
            self.patch_code_T, self.pixels_bIYXZ = None, None
        self.ids: list[int] = []
        self.returned_chars = 0

    def append(self, ids_T, logprobs_T) -> Output:
        """Appends generated tokens and returns the new output.

        The sequence ends at the end-of-text token, at a stop string, or after the request's steps. Tokens after that end
        are dropped: decode runs in blocks and may have sampled some.
        """
        before = len(self.ids)
        self.ids.extend(ids_T.tolist())
        last = len(self.ids) >= self.request.steps
        if not self.tokenizer:
            return Output(self.number, "", ids_T, logprobs_T, last)
        text, ended = self.decode_text(len(self.ids))
        if ended:       # find the token that completes the stop string, and drop those after it
            counts = range(before + 1, len(self.ids) + 1)
            count = counts[bisect.bisect_left(counts, True, key=lambda n: self.decode_text(n)[1])]
            text, ids_T, logprobs_T = self.decode_text(count)[0], ids_T[:count - before], logprobs_T[:count - before]
        elif not last:
            text = text.rstrip("\ufffd")            # an incomplete character: its other bytes may follow
            text = text[:len(text) - self._partial_stop(text)]
        new, self.returned_chars = text[self.returned_chars:], max(self.returned_chars, len(text))
        return Output(self.number, new, ids_T, logprobs_T, ended or last)

    def decode_text(self, count: int) -> tuple[str, bool]:
        """The text that the first `count` tokens add to the prompt's, and whether it ends.

        It ends before the first end-of-text token or stop string.
        """
        ids_T = np.array(self.ids[:count], np.int32)
        end = np.flatnonzero(np.isin(ids_T, self.tokenizer.ends))
        text = tokens.decode_continuation(self.tokenizer, self.tail, ids_T[:end[0]] if len(end) else ids_T)
        stops = [at for at in (text.find(s) for s in self.request.sampling.stop) if at >= 0]
        return text[:min(stops)] if stops else text, bool(len(end) or stops)

    def _partial_stop(self, text: str) -> int:
        """Length of the longest suffix of `text` that is the beginning of a stop string."""
        return max((n for s in self.request.sampling.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


def check_ids(c, ids_BT):
    """Token ids as int32. Raises ConfigError for a wrong shape or type and, unless `ids_BT` is traced, for unknown ids."""
    traced = isinstance(ids_BT, jax.core.Tracer)
    ids_BT = ids_BT if traced else np.asarray(ids_BT)
    if ids_BT.ndim != 2 or not np.issubdtype(ids_BT.dtype, np.integer) or ids_BT.size == 0:
        raise ConfigError("token ids must be an integer array [B, T] with B and T at least 1, got "
                          f"{ids_BT.dtype} {ids_BT.shape}")
    if not traced and (ids_BT.min() < 0 or ids_BT.max() >= c.vocab):
        raise ConfigError(f"token ids range from {ids_BT.min()} to {ids_BT.max()}, but the vocabulary has ids from 0 to "
                          f"{c.vocab - 1}")
    return ids_BT.astype(np.int32)


def _check(request: Request):
    prompt, steps = request.prompt, request.steps
    if isinstance(prompt, str) and not is_text(prompt):
        raise ConfigError(f"prompt {prompt!a} is not text: it contains bytes that are not UTF-8, or half of a surrogate pair")
    if not isinstance(steps, (int, np.integer)):
        raise ConfigError(f"steps={steps!r} must be a whole number")
    if steps < 1:
        raise ConfigError(f"steps={steps} is out of range: it must be at least 1")
    if request.sampling.stop and not isinstance(prompt, str):
        raise ConfigError("stop strings need a text prompt; prompts of token ids cannot use them")
    check_sampling(request.sampling)
