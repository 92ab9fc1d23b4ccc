"""Inference: logits of whole sequences, and generation in two parts (paper section 3.3).

Prefill reads a prompt but for its last token in chunks of a few fixed shapes; decode then runs on the device, one token a
row and step, each step feeding what the last one drew. Rows are places in a batch: a sequence that has ended leaves its
row, and the next that waits is read into it (continuous batching). Padding on the right is written nowhere and leaves
every state alone.
"""
import bisect
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmx.config import ConfigError, is_text
from mmx.data import images as pictures
from mmx.data import tokens as tokenizers
from mmx.model import Model, logits, see
from mmx.parallel import cache as caches

LEVELS = 2048, 256, 128, 64, 32     # tokens a call of prefill reads (paper section 3.3.3's levels, and a chunk)
BLOCK = 64          # steps on the device between two looks for what has ended
ROWS = 32           # sequences at a time


class Request(NamedTuple):
    """A prompt and how to go on from it; see `generate`. `seed` and `stream` make its draws, whoever is beside it."""
    prompt: str | np.ndarray        # text, or ids [T]
    steps: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stream: int = 0
    stop: tuple = ()
    images: tuple = ()              # files or PIL images, one for each mark (ids: for each run of the vision's token)


class Piece(NamedTuple):
    """What came of a request since its last piece."""
    request: int            # its number
    text: str               # that no later token can change; empty without a tokenizer
    ids_T: np.ndarray       # to the one that ends it, the end-of-text token or a stop string's last
    logprobs_T: np.ndarray  # of these ids, float32, before temperature and what top-k and top-p leave
    ended: bool


class Prefix(NamedTuple):
    """Tokens that were read once, to be gone on from often (`mmx.inference.prefix` keeps it in a file)."""
    cache: dict             # of one row
    last: int               # the token that is not read yet
    length: int             # of all tokens, the last too


def forward(loaded, tokens_BT, mask_BT=None, images=None):
    """logits_BTW (float32) of token ids; where `mask_BT` is 0 a token is padding, whose logits mean nothing.

    `images` has for each row a list of files or PIL images, which the row's tokens `config.vision.token` stand for, in
    order, as many to an image as `mmx.data.images.token_count` says of its size. Raises ConfigError for ids outside the
    vocabulary, and where those tokens are more or fewer.
    """
    tokens_BT = _ids(loaded.config, np.asarray(tokens_BT))
    if mask_BT is not None and np.shape(mask_BT) != tokens_BT.shape:
        raise ConfigError(f"mask_BT has shape {np.shape(mask_BT)}, tokens_BT {tokens_BT.shape}")
    segments_BT = None if mask_BT is None else jnp.asarray(mask_BT, jnp.int32)
    shown = {}
    if images is not None:
        if len(images) != len(tokens_BT):
            raise ConfigError(f"images need a list for each of {len(tokens_BT)} rows, got {len(images)}")
        places_BT, pixels_NIYXZ = pictures.collate(
            loaded.config.vision, tokens_BT, [pictures.prepare_all(loaded.config.vision, row) for row in images])
        shown = {"places_BT": places_BT, "seen": _see(loaded.config, loaded.params, pixels_NIYXZ)}
    return _forward(loaded.model, loaded.params, tokens_BT, segments_BT, shown)


def generate(loaded, prompts, *, steps: int, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
             stop=(), images=(), prefix: Prefix | None = None, kv_dtype: str = "", rows: int = ROWS):
    """Continuations of `prompts`, at most `steps` tokens each.

    Args:
      loaded: what `mmx.load` gives.
      prompts: strings (a list, or one), or token ids [B, T].
      temperature: 0 takes the likeliest token.
      top_k, top_p: draw among the k likeliest (0: all), among the likeliest that make up probability p.
      seed: same seed, same draws; prompt b draws from (seed, b).
      stop: strings; a text ends before the one that is complete first, as it does before the end-of-text token.
      images: for each prompt a list of files or PIL images (for one string: its list); in the text "<image>" stands where
        each belongs, in ids as many `config.vision.token` as it needs (see `forward`).
      prefix: of `read`; the prompts stand behind it.
      kv_dtype: of softmax layers' keys and values: float32, bfloat16 or int8; empty: the computation's.
      rows: sequences at a time; the others wait.

    Returns:
      A list of strings for strings; the new ids [B, steps] for ids, which nothing stops.
    """
    prompts, images = ([prompts], [images]) if isinstance(prompts, str) else (prompts, images)
    if len(prompts) == 0:
        raise ConfigError("no prompt was given")
    if images and len(images) != len(prompts):
        raise ConfigError(f"images need a list for each of {len(prompts)} prompts, got {len(images)}")
    text = isinstance(prompts[0], str)
    prompts = prompts if text else _ids(loaded.config, np.asarray(prompts))
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    requests = [Request(prompt, steps, temperature, top_k, top_p, seed, b, stop, tuple(images[b]) if images else ())
                for b, prompt in enumerate(prompts)]
    pieces = [[] for _ in requests]
    for piece in stream(loaded, requests, prefix=prefix, kv_dtype=kv_dtype, rows=rows):
        pieces[piece.request].append(piece)
    if text:
        return ["".join(piece.text for piece in row) for row in pieces]
    return np.stack([np.concatenate([piece.ids_T for piece in row]) for row in pieces])


def stream(loaded, requests, *, prefix: Prefix | None = None, kv_dtype: str = "", rows: int = ROWS, progress=None):
    """Yields a `Piece` of each running request every `BLOCK` steps, and one with `ended` at its end.

    `requests` are an iterable, asked for its next as a row is free: a source that waits makes all wait. What a request
    draws does not depend on those beside it. `progress` is called with the number of tokens that a call of prefill has
    read. Raises ConfigError for what no request can be, when its turn comes.
    """
    if not isinstance(rows, int) or rows < 1:
        raise ConfigError(f"rows={rows} must be a whole number, at least 1")
    requests = list(requests) if isinstance(requests, (list, tuple)) else requests
    rows = min(rows, len(requests)) if isinstance(requests, list) else rows
    waiting, batch, tokenizer = enumerate(requests), Batch(loaded, rows, prefix, kv_dtype, progress), _tokenizer(loaded)
    while True:
        for b in batch.free():
            number, request = next(waiting, (None, None))
            if request is None:
                break
            batch.enter(b, _Row(number, request, tokenizer, loaded.config, behind=prefix is not None))
        if not batch.running():
            return
        yield from batch.decode()


def read(loaded, prompt, *, images=(), prefix: Prefix | None = None, kv_dtype: str = "", progress=None) -> Prefix:
    """Reads a prompt, text or ids [T], and its images, to be gone on from by any number of others."""
    row = _Row(0, Request(prompt, 1, images=tuple(images)), _tokenizer(loaded), loaded.config, behind=prefix is not None)
    batch = Batch(loaded, 1, prefix, kv_dtype, progress)
    batch.enter(0, row)
    length = len(row.prompt) + (prefix.length if prefix else 0)
    return Prefix(caches.resized(batch.cache, length - 1), int(batch.token_B[0]), length)


def score(loaded, ids_T, next_T):
    """(nats_T, best_T): what each next id costs behind those before it, float32, and the likeliest ids.

    A prompt is read in chunks, so that only a chunk's logits are there at a time.
    """
    ids_T, sizes, told, at = _ids(loaded.config, np.asarray(ids_T)[None])[0], pieces(len(ids_T)), [], 0
    cache = caches.empty_cache(loaded.config, 1, -(-sum(sizes) // caches.PLACES) * caches.PLACES)
    for size in sizes:
        ids_1T, next_1T, mask_1T = (np.zeros((1, size), np.int32) for _ in range(3))
        real = min(size, len(ids_T) - at)
        ids_1T[0, :real], next_1T[0, :real], mask_1T[0, :real] = ids_T[at:at + real], next_T[at:at + real], 1
        *both, cache = _score(loaded.model, loaded.params, ids_1T, next_1T, mask_1T, cache)
        told.append([x_1T[0, :real] for x_1T in jax.device_get(both)])
        at += real
    return tuple(np.concatenate(part) for part in zip(*told))


def sample(model: Model, params, tokenizer, prompt: str, steps: int = 200) -> str:
    """A text drawn from a model in training, for its log."""
    row = _Row(0, Request(prompt, steps, temperature=0.8, top_p=0.95), lambda: tokenizer, model.config, behind=False)
    batch = Batch((model, params, model.config), 1)
    batch.enter(0, row)
    return prompt + "".join(piece.text for _ in iter(batch.running, False) for piece in batch.decode())


def _tokenizer(loaded):
    """A function that gives the checkpoint's, once text needs it."""
    return functools.cache(functools.partial(tokenizers.of_checkpoint, loaded.tokenizer, loaded.config.vocab))


class _Row:
    """A request on its way: its prompt as ids, what they show of its images, what came of it, and what of that was told."""

    def __init__(self, number: int, request: Request, tokenizer, c, behind: bool):
        _check(request)
        self.number, self.request, self.tokenizer = number, request, None
        images = pictures.prepare_all(c.vision, request.images)
        if isinstance(request.prompt, str):
            self.tokenizer = tokenizer()
            ids_T = pictures.encode(c.vision, request.prompt.encode(), [len(image.places_T) for image in images],
                                    self.tokenizer.encode)
            self.prompt = ids_T if behind else np.append(np.int32(self.tokenizer.bos), ids_T)
        else:
            self.prompt = _ids(c, np.asarray(request.prompt)[None])[0]
        if images:
            (self.places,), self.pixels = pictures.collate(c.vision, self.prompt[None], [images])
            if self.places[-1]:     # the last token is read by itself, as those that are drawn
                raise ConfigError("the prompt ends in an image: text must stand behind it")
        else:
            self.places, self.pixels = None, None
        self.ids, self.told = [], 0

    def piece(self, ids_T, logprobs_T) -> Piece:
        """The next, of new ids: it ends the row at the end-of-text token, a stop string, or its last step."""
        before = len(self.ids)
        self.ids.extend(ids_T.tolist())
        last = len(self.ids) >= self.request.steps
        if not self.tokenizer:
            return Piece(self.number, "", ids_T, logprobs_T, last)
        text, ended = self._text(len(self.ids))
        if ended:       # the block may have gone on behind it
            ends = range(before + 1, len(self.ids) + 1)
            end = ends[bisect.bisect_left(ends, True, key=lambda n: self._text(n)[1])]
            text, ids_T, logprobs_T = self._text(end)[0], ids_T[:end - before], logprobs_T[:end - before]
        elif not last:     # half a character, or what may be a stop string's beginning, waits
            text = text.rstrip("\ufffd")
            text = text[:len(text) - max((n for s in self.request.stop for n in range(1, len(s)) if text.endswith(s[:n])),
                                         default=0)]
        new, self.told = text[self.told:], max(self.told, len(text))
        return Piece(self.number, new, ids_T, logprobs_T, ended or last)

    def _text(self, count: int) -> tuple[str, bool]:
        """The text of the first `count` ids up to its end, and whether it has one."""
        ids_T = np.array(self.ids[:count], np.int32)
        end = np.flatnonzero(ids_T == self.tokenizer.eos)
        text = self.tokenizer.decode(ids_T[:end[0]] if len(end) else ids_T)
        cuts = [at for at in (text.find(s) for s in self.request.stop) if at >= 0]
        return text[:min(cuts)] if cuts else text, bool(len(end) or cuts)


class Batch:
    """Rows of a cache, and what each draws from: `enter` reads a prompt into one, `decode` takes all on by a block."""

    def __init__(self, loaded, rows: int, prefix: Prefix | None = None, kv_dtype: str = "", progress=None):
        self.model, self.params, self.config = loaded[:3]
        self.prefix, self.progress, self.rows = prefix, progress, [None] * rows
        if kv_dtype and kv_dtype not in caches.KV_DTYPES:
            raise ConfigError(f"kv_dtype={kv_dtype!r} is none of {', '.join(caches.KV_DTYPES)}")
        if prefix and kv_dtype not in ("", kept := caches.kv_dtype(prefix.cache)):
            raise ConfigError(f"the prefix has keys and values in {kept or 'no layer'}: kv_dtype={kv_dtype!r} is not theirs")
        kv_dtype, self.places = caches.kv_dtype(prefix.cache) if prefix else kv_dtype, 0
        self.cache = caches.empty_cache(self.config, rows, 0, kv_dtype)
        self.token_B, self.left_B, self.drawn_B = (np.zeros(rows, np.int32) for _ in range(3))
        self.temperature_B, self.top_p_B = np.zeros(rows, np.float32), np.ones(rows, np.float32)
        self.top_k_B, self.key_B = np.zeros(rows, np.int32), [jax.random.key(0)] * rows

    def free(self) -> list[int]:
        return [b for b, row in enumerate(self.rows) if row is None]

    def running(self) -> bool:
        return any(self.rows)

    def enter(self, b: int, row: _Row):
        """Reads all of a prompt but its last token into row b."""
        ids_T, places_T, request, before = row.prompt, row.places, row.request, 0
        seen = None if places_T is None else _see(self.config, self.params, row.pixels)
        if self.prefix:
            ids_T, before = np.append(np.int32(self.prefix.last), ids_T), self.prefix.length - 1
            places_T = None if places_T is None else np.append(np.int32(0), places_T)
        sizes = pieces(len(ids_T) - 1)
        self._grow(before + max(sum(sizes), len(ids_T) + request.steps))
        self.cache = caches.adopt(self.cache, b, self.prefix.cache) if self.prefix else caches.vacate(self.cache, b)
        at = 0
        for size in sizes:
            tokens_1T = np.zeros((1, size), np.int32)
            real = min(size, len(ids_T) - 1 - at)
            tokens_1T[0, :real] = ids_T[at:at + real]
            mask_1T = np.asarray(np.arange(size) < real, np.int32)[None]
            shown = {}
            if seen is not None:
                places_1T = np.zeros((1, size), np.int32)
                places_1T[0, :real] = places_T[at:at + real]
                shown = {"places_BT": places_1T, "seen": seen}
            self.cache = _read(self.model, self.params, tokens_1T, mask_1T, self.cache, b, shown)
            at += real
            if self.progress:
                jax.block_until_ready(self.cache)
                self.progress(real)
        self.rows[b], self.token_B[b], self.left_B[b], self.drawn_B[b] = row, ids_T[-1], request.steps, 0
        self.temperature_B[b], self.top_p_B[b] = request.temperature, request.top_p
        self.top_k_B[b] = request.top_k or self.config.vocab
        self.key_B[b] = jax.random.fold_in(jax.random.key(request.seed), request.stream)

    def decode(self):
        """Yields each running row's piece; a row that has ended is free."""
        eos = next((row.tokenizer.eos for row in self.rows if row and row.tokenizer), -1)
        draw = None
        if self.temperature_B.any():
            draw = {"temperature_B": self.temperature_B, "top_k_B": self.top_k_B, "top_p_B": self.top_p_B}
        live = [b for b, row in enumerate(self.rows) if row]
        room = min(BLOCK, -(-int(self.left_B.max()) // 8) * 8)
        new_BT, logprobs_BT, self.cache = _decode(self.model, self.params, self.token_B, self.left_B, self.drawn_B, self.cache,
                                                  jnp.stack(self.key_B), draw, eos, room)
        new_BT, logprobs_BT = jax.device_get((new_BT, logprobs_BT))
        for b in live:
            count = int((new_BT[b] >= 0).sum())
            piece = self.rows[b].piece(new_BT[b, :count], logprobs_BT[b, :count])
            self.token_B[b], self.left_B[b] = new_BT[b, count - 1], self.left_B[b] - count
            self.drawn_B[b] += count
            if piece.ended:
                self.rows[b], self.left_B[b], self.temperature_B[b] = None, 0, 0
            yield piece

    def _grow(self, places: int):
        """Makes room for so many tokens a row, in pages, of which many come at a time where there are many."""
        if places > self.places:
            pages = -(-places // caches.PLACES)
            step = 1 << max(pages.bit_length() - 4, 0)      # at most an eighth too many, and few shapes to compile
            self.places = -(-pages // step) * step * caches.PLACES
            self.cache = caches.resized(self.cache, self.places)


def pieces(count: int) -> list[int]:
    """The sizes of calls that read `count` tokens: chunks, then smaller and smaller levels; fewer than 32 are padding."""
    sizes, left = [], -(-count // LEVELS[-1]) * LEVELS[-1]
    for level in LEVELS:
        sizes += [level] * (left // level)
        left %= level
    return sizes


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: Model, params, tokens_BT, segments_BT, shown):
    return logits(params, model.apply({"params": params}, tokens_BT, segments_BT, **shown)[0])


_see = functools.partial(jax.jit, static_argnums=0)(see)


def prefill(model: Model, params, tokens_BT, mask_BT, cache, **shown):
    """The cache with a chunk of the prompts in; `shown` are the model's places_BT and seen, where it has images."""
    return model.apply({"params": params}, tokens_BT, mask_BT, cache=cache, **shown)[1]


def decode_step(model: Model, params, token_B, cache, live_B=None):
    """logits_BW of the next tokens, and the cache with these in; a row that is not live stays as it is."""
    live_B1 = None if live_B is None else jnp.asarray(live_B, jnp.int32)[:, None]
    x_B1D, cache, _ = model.apply({"params": params}, token_B[:, None], live_B1, cache=cache)
    return logits(params, x_B1D)[:, 0], cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _read(model: Model, params, tokens_1T, mask_1T, cache, b, shown):
    return caches.adopt(cache, b, prefill(model, params, tokens_1T, mask_1T, caches.row(cache, b), **shown))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def _score(model: Model, params, ids_BT, next_BT, mask_BT, cache):
    x_BTD, cache, _ = model.apply({"params": params}, ids_BT, mask_BT, cache=cache)
    logits_BTW = logits(params, x_BTD)
    own_BT = jnp.take_along_axis(logits_BTW, next_BT[..., None], axis=2)[..., 0]
    return jax.nn.logsumexp(logits_BTW, axis=2) - own_BT, jnp.argmax(logits_BTW, axis=2), cache


@functools.partial(jax.jit, static_argnums=(0, 9), donate_argnums=5)
def _decode(model: Model, params, token_B, left_B, drawn_B, cache, key_B, draw, eos, room: int):
    """The next ids and their log-probabilities, [B, room], at most `left_B` of a row and none behind an `eos`: -1 there."""
    B = len(token_B)

    def step(carry):
        i, token_B, left_B, cache, new_BT, logprobs_BT = carry
        live_B = left_B > 0
        logits_BW, cache = decode_step(model, params, token_B, cache, live_B)
        token_B = jnp.where(live_B, _draw(logits_BW, jax.vmap(jax.random.fold_in)(key_B, drawn_B + i), draw), token_B)
        logprob_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BW), token_B[:, None], axis=1)[:, 0]
        new_BT = new_BT.at[:, i].set(jnp.where(live_B, token_B, -1))
        left_B = jnp.where(token_B == eos, 0, jnp.maximum(left_B - 1, 0))
        return i + 1, token_B, left_B, cache, new_BT, logprobs_BT.at[:, i].set(logprob_B.astype(jnp.float32))

    start = (jnp.int32(0), token_B, left_B, cache, jnp.full((B, room), -1, jnp.int32), jnp.zeros((B, room), jnp.float32))
    *_, cache, new_BT, logprobs_BT = jax.lax.while_loop(lambda carry: (carry[0] < room) & (carry[2] > 0).any(), step, start)
    return new_BT, logprobs_BT, caches.placed(cache)


def _draw(logits_BW, key_B, draw):
    """The next tokens: the likeliest without `draw` and where its temperature_B is 0; else a Gumbel draw among those that
    top-k and top-p leave."""
    likeliest_B = jnp.argmax(logits_BW, axis=1).astype(jnp.int32)
    if draw is None:
        return likeliest_B
    W = logits_BW.shape[1]
    temperature_B, top_k_B, top_p_B = (jnp.asarray(draw[name]) for name in ("temperature_B", "top_k_B", "top_p_B"))
    logits_BW = logits_BW.astype(jnp.float32) / jnp.where(temperature_B > 0, temperature_B, 1)[:, None]
    sorted_BW = jnp.sort(logits_BW, axis=1, descending=True)
    p_BW = jax.nn.softmax(jnp.where(jnp.arange(W) < top_k_B[:, None], sorted_BW, -jnp.inf))
    above_BW = jnp.cumsum(p_BW, axis=1) - p_BW              # probability of all likelier ones
    kept_B1 = jnp.sum((above_BW < top_p_B[:, None]) & (p_BW > 0), axis=1, keepdims=True)
    least_B1 = jnp.take_along_axis(sorted_BW, jnp.maximum(kept_B1, 1) - 1, axis=1)
    noise_BW = jax.vmap(lambda key: jax.random.gumbel(key, (W,)))(key_B)
    drawn_B = jnp.argmax(jnp.where(logits_BW >= least_B1, logits_BW + noise_BW, -jnp.inf), axis=1).astype(jnp.int32)
    return jnp.where(temperature_B > 0, drawn_B, likeliest_B)


def _ids(c, ids_BT):
    if ids_BT.ndim != 2 or not np.issubdtype(ids_BT.dtype, np.integer) or ids_BT.shape[1] == 0:
        raise ConfigError(f"token ids need an integer array [B, T], T at least 1; got {ids_BT.dtype} {ids_BT.shape}")
    if ids_BT.min() < 0 or ids_BT.max() >= c.vocab:
        raise ConfigError(f"token ids reach from {ids_BT.min()} to {ids_BT.max()}, the vocabulary from 0 to {c.vocab - 1}")
    return ids_BT.astype(np.int32)


def _check(request: Request):
    prompt, steps, temperature, top_k, top_p, seed, _, stop, _ = request
    if isinstance(prompt, str) and not is_text(prompt):
        raise ConfigError(f"prompt {prompt!a} is no text: it holds bytes that are not UTF-8, or half of a surrogate pair")
    for name, value in (("steps", steps), ("top_k", top_k), ("seed", seed)):
        if not isinstance(value, (int, np.integer)):
            raise ConfigError(f"{name}={value!r} is no whole number")
    if stop and not isinstance(prompt, str):
        raise ConfigError("stop is of texts: give the prompt as a string, for nothing stops ids")
    if not all(stop):
        raise ConfigError("stop holds an empty string, which every text begins with")
    for name, value, good in (("steps", steps, steps >= 1), ("temperature", temperature, temperature >= 0),
                              ("top_k", top_k, 0 <= top_k < 2**31), ("top_p", top_p, 0 < top_p <= 1),
                              ("seed", seed, 0 <= seed < 2**32)):
        if not good:
            raise ConfigError(f"{name}={value} is out of range: steps >= 1, temperature >= 0, 0 <= top_k < 2^31, "
                              "0 < top_p <= 1, 0 <= seed < 2^32")
