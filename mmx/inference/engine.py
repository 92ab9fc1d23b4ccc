"""Generation by prefill and decode, with continuous batching (paper section 3.3).

The life of a generated token, from top to bottom of this file:

    generate, stream    a request takes a free slot of the batch
    Batch.start         prefill: reads the prompt without its last token into the slot's cache, in chunks of a few sizes
    Batch.decode        decode: up to DECODE_STEPS steps on the device; each samples one token for every slot in use, and
                        the next step feeds it to the model
    Sequence.append     (requests.py) the new ids become text; a stop string or the last step ends the request
    stream              yields the Output; the slot of a request that has ended is free for the next one

Padding is always to the right of a chunk. It is not written to the cache and does not change any state.
"""
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmx.checkpoints import finite
from mmx.config import ConfigError
from mmx.data import tokens as tokenizers
from mmx.inference.requests import Output, Request, Sequence, check_ids
from mmx.inference.sampling import Sampling, SlotSampling, sample_tokens
from mmx.model import Model, empty_cache, logits
from mmx.model import encode_images as trace_images
from mmx.parallel import cache as caches

PREFILL_CHUNKS = 2048, 256, 128, 64, 32     # tokens of one prefill call; 32 to 256: padding levels of paper section 3.3.3
DECODE_STEPS = 64       # most decode steps on the device before the host looks for requests that have ended
ROWS = 32               # slots of a batch, by default


@jax.tree_util.register_static
class Tail(tuple):
    """The last token ids of a prefix. It is no array of the prefix: `jax.tree` takes it as static."""


class Prefix(NamedTuple):
    """A prefilled prompt that other prompts can continue (`mmx.inference.prefix` saves it to a file)."""
    cache: dict             # the cache of one row, without the last token
    last: int               # the last token, which is not in the cache yet
    length: int             # number of tokens, including the last
    tail: Tail = Tail()     # its last tokens, so that text can continue it; files of earlier versions have none


class Slots(NamedTuple):
    """What decode needs to know about each slot."""
    token_B: np.ndarray         # the token that the next step feeds to the model
    remaining_B: np.ndarray     # steps left; 0: the slot is not in use
    generated_B: np.ndarray     # tokens generated so far; folded into the random key of the next draw
    key_B: np.ndarray           # random keys


def generate(loaded, prompts, *, steps: int, images=(), prefix: Prefix | None = None, kv_dtype: str = "", rows: int = ROWS,
             **sampling):
    """Continues `prompts` by at most `steps` tokens each.

    Args:
      loaded: the result of `mmx.load`.
      prompts: a string or a list of strings, or token ids [B, T].
      images: for each prompt a list of its images, as files or PIL images. If `prompts` is a string: the list of its images.
        A text prompt contains "<image>" where each image belongs; token ids contain `config.vision.token` as described in
        `forward`.
      prefix: the result of `make_prefix`; each prompt continues it.
      kv_dtype: dtype of the keys and values in the cache of softmax layers: float32, bfloat16 or int8. Empty: the dtype
        that the model computes in.
      rows: the number of requests decoded at the same time; the others wait.
      **sampling: the fields of `Sampling`:
        temperature: 0 (the default) takes the most likely token.
        top_k, top_p: sample from the k most likely tokens (0: from all), or from the most likely ones whose
          probabilities sum to top_p.
        seed: the same seed gives the same draws; each prompt has other draws.
        stop: a string or several strings. Generation ends as soon as the text contains one of them; the result does not
          include it, nor the end-of-text token, which ends generation too.

    Returns:
      A list of strings for text prompts. For token ids, the new ids [B, steps]: they do not end early.
    """
    sampling = Sampling.of("generate", sampling)
    prompts, images = ([prompts], [images]) if isinstance(prompts, str) else (prompts, images)
    if len(prompts) == 0:
        raise ConfigError("no prompt was given")
    if images and len(images) != len(prompts):
        raise ConfigError(f"images need a list for each of {len(prompts)} prompts, got {len(images)}")
    text = isinstance(prompts[0], str)
    prompts = prompts if text else check_ids(loaded.config, np.asarray(prompts))
    requests = [Request(prompt, steps, sampling, tuple(images[b]) if images else (), fold=b)
                for b, prompt in enumerate(prompts)]
    outputs = [[] for _ in requests]
    for output in stream(loaded, requests, prefix=prefix, kv_dtype=kv_dtype, rows=rows):
        outputs[output.request].append(output)
    if text:
        return ["".join(output.text for output in row) for row in outputs]
    return np.stack([np.concatenate([output.ids_T for output in row]) for row in outputs])


def stream(loaded, requests, *, prefix: Prefix | None = None, kv_dtype: str = "", rows: int = ROWS,
           progress=None) -> Iterator[Output]:
    """Generates for many requests. Every DECODE_STEPS steps, yields an Output for each running request.

    What a request generates does not depend on the other requests.

    Args:
      loaded, prefix, kv_dtype, rows: as for `generate`.
      requests: an iterable of Request. The next one is taken when a slot is free, so an iterator that blocks also blocks
        the requests that are running.
      progress: called with the number of tokens that each call of prefill has read.

    Raises:
      ConfigError: a request is invalid; raised when the request is taken.
      NonFiniteError: the model computes nan or infinity.
    """
    if not isinstance(rows, int) or rows < 1:
        raise ConfigError(f"rows={rows} must be a whole number, at least 1")
    requests = list(requests) if isinstance(requests, (list, tuple)) else requests
    rows = min(rows, len(requests)) if isinstance(requests, list) else rows
    waiting, batch, get_tokenizer = enumerate(requests), Batch(loaded, rows, prefix, kv_dtype, progress), _tokenizer(loaded)
    while True:
        for b in batch.free_slots():
            number, request = next(waiting, (None, None))
            if request is None:
                break
            batch.start(b, Sequence(number, request, get_tokenizer, loaded.config, _tail(prefix)))
        if not batch.running():
            return
        yield from batch.decode()


def make_prefix(loaded, prompt, *, images=(), prefix: Prefix | None = None, kv_dtype: str = "", progress=None) -> Prefix:
    """Prefills a prompt (text or token ids [T]) and its images, once, for any number of prompts that continue it."""
    request = Request(prompt, 1, images=tuple(images))
    sequence = Sequence(0, request, _tokenizer(loaded), loaded.config, _tail(prefix))
    batch = Batch(loaded, 1, prefix, kv_dtype, progress)
    batch.start(0, sequence)
    length = len(sequence.prompt_T) + (prefix.length if prefix else 0)
    tail = [*(prefix.tail if prefix else ()), *sequence.prompt_T.tolist()][-tokenizers.TAIL:]
    return Prefix(caches.resize(batch.cache, length - 1), int(batch.token_B[0]), length, Tail(tail))


def sample(model: Model, params, tokenizer, prompt: str, steps: int = 200) -> str:
    """The prompt and a sampled continuation, for the log of a training run."""
    request = Request(prompt, steps, Sampling(temperature=0.8, top_p=0.95))
    batch = Batch((model, params, model.config), 1)
    batch.start(0, Sequence(0, request, lambda: tokenizer, model.config))
    return prompt + "".join(output.text for _ in iter(batch.running, False) for output in batch.decode())


def _tail(prefix: Prefix | None) -> tuple | None:
    """The last tokens of a prefix; None without one."""
    return prefix and (prefix.tail or (prefix.last,))


def _tokenizer(loaded):
    """A function that returns the checkpoint's tokenizer, which is read at the first call."""
    return functools.cache(functools.partial(tokenizers.of_checkpoint, loaded.tokenizer, loaded.config.vocab))


class Batch:
    """Slots for sequences that are decoded together, with a cache that has a row for each slot.

    `start` prefills a sequence's prompt into a slot; `decode` continues all slots in use by a block of steps.
    """

    def __init__(self, loaded, slots: int, prefix: Prefix | None = None, kv_dtype: str = "", progress=None):
        self.model, self.params, self.config = loaded[:3]
        self.prefix, self.progress, self.sequences = prefix, progress, [None] * slots
        if kv_dtype and kv_dtype not in caches.KV_DTYPES:
            raise ConfigError(f"kv_dtype={kv_dtype!r} must be one of {', '.join(caches.KV_DTYPES)}")
        prefix_dtype = caches.kv_dtype(prefix.cache) if prefix else ""
        if prefix and kv_dtype not in ("", prefix_dtype):
            raise ConfigError(f"the prefix has keys and values in {prefix_dtype or 'no layer'}, which kv_dtype={kv_dtype!r} "
                              "cannot change: leave it out")
        self.capacity = 0       # tokens for which the cache has room in each row
        self.cache = empty_cache(self.config, slots, 0, prefix_dtype if prefix else kv_dtype)
        self.token_B, self.remaining_B, self.generated_B = (np.zeros(slots, np.int32) for _ in range(3))
        self.key_B = [jax.random.key(0)] * slots
        self.sampling = SlotSampling(np.zeros(slots, np.float32), np.zeros(slots, np.int32), np.ones(slots, np.float32))

    def free_slots(self) -> list[int]:
        return [b for b, sequence in enumerate(self.sequences) if sequence is None]

    def running(self) -> bool:
        return any(self.sequences)

    def start(self, b: int, sequence: Sequence):
        """Prefills a sequence's prompt into slot b, without the last token, which the first decode step reads."""
        ids_T, patch_code_T, request, cached = sequence.prompt_T, sequence.patch_code_T, sequence.request, 0
        if self.prefix:
            ids_T, cached = np.append(np.int32(self.prefix.last), ids_T), self.prefix.length - 1
            patch_code_T = None if patch_code_T is None else np.append(np.int32(0), patch_code_T)
        chunks = sum(chunk_sizes(len(ids_T) - 1))
        self._reserve(cached + max(chunks, len(ids_T) + request.steps))
        self.cache = caches.insert_row(self.cache, b, self.prefix.cache) if self.prefix else caches.clear_row(self.cache, b)
        self._prefill(b, ids_T[:-1], patch_code_T, sequence.pixels_bIYXZ)
        self.sequences[b], self.token_B[b], self.remaining_B[b], self.generated_B[b] = sequence, ids_T[-1], request.steps, 0
        sampling = request.sampling
        self.sampling.temperature_B[b], self.sampling.top_p_B[b] = sampling.temperature, sampling.top_p
        self.sampling.top_k_B[b] = sampling.top_k or self.config.vocab
        self.key_B[b] = jax.random.fold_in(jax.random.key(sampling.seed), request.fold)

    def decode(self) -> Iterator[Output]:
        """Runs a block of decode steps and yields an Output for each running sequence; slots of ended ones become free."""
        ends = next((sequence.tokenizer.ends for sequence in self.sequences if sequence and sequence.tokenizer), (-1,))
        running = [b for b, sequence in enumerate(self.sequences) if sequence]
        steps = min(DECODE_STEPS, -(-int(self.remaining_B.max()) // 8) * 8)
        slots = Slots(self.token_B, self.remaining_B, self.generated_B, jnp.stack(self.key_B))
        sampling = self.sampling if self.sampling.temperature_B.any() else None
        new_BT, logprobs_BT, self.cache = _decode(self.model, self.params, self.cache, slots, sampling, np.int32(ends), steps)
        new_BT, logprobs_BT = jax.device_get((new_BT, logprobs_BT))
        for b in running:
            count = int((new_BT[b] >= 0).sum())
            finite.check(logprobs_BT[b, :count], self.params, "the log-probabilities")
            output = self.sequences[b].append(new_BT[b, :count], logprobs_BT[b, :count])
            self.token_B[b], self.remaining_B[b] = new_BT[b, count - 1], self.remaining_B[b] - count
            self.generated_B[b] += count
            if output.ended:
                self.sequences[b], self.remaining_B[b], self.sampling.temperature_B[b] = None, 0, 0
            yield output

    def _prefill(self, b: int, ids_T, patch_code_T, pixels_bIYXZ):
        """Reads tokens into the cache of slot b, chunk by chunk."""
        features, start = None if patch_code_T is None else encode_images(self.config, self.params, pixels_bIYXZ), 0
        for size in chunk_sizes(len(ids_T)):
            real = min(size, len(ids_T) - start)
            tokens_1T = np.zeros((1, size), np.int32)
            tokens_1T[0, :real] = ids_T[start:start + real]
            mask_1T = np.asarray(np.arange(size) < real, np.int32)[None]
            image_arguments = {}
            if features is not None:
                patch_code_1T = np.zeros((1, size), np.int32)
                patch_code_1T[0, :real] = patch_code_T[start:start + real]
                image_arguments = {"patch_code_BT": patch_code_1T, "images": features}
            self.cache = _prefill(self.model, self.params, tokens_1T, mask_1T, self.cache, b, image_arguments)
            start += real
            if self.progress:
                jax.block_until_ready(self.cache)
                self.progress(real)

    def _reserve(self, capacity: int):
        """Gives every row of the cache room for at least `capacity` tokens, in whole pages.

        The number of pages is rounded up to a multiple of a power of two: at most an eighth too many, and few shapes to
        compile.
        """
        if capacity > self.capacity:
            pages = -(-capacity // caches.PAGE)
            step = 1 << max(pages.bit_length() - 4, 0)
            self.capacity = -(-pages // step) * step * caches.PAGE
            self.cache = caches.resize(self.cache, self.capacity)


def chunk_sizes(count: int) -> list[int]:
    """The sizes of the calls of prefill that read `count` tokens, largest first.

    They sum to `count`, rounded up to a multiple of the smallest chunk.
    """
    sizes, remaining = [], -(-count // PREFILL_CHUNKS[-1]) * PREFILL_CHUNKS[-1]
    for size in PREFILL_CHUNKS:
        sizes += [size] * (remaining // size)
        remaining %= size
    return sizes


encode_images = functools.partial(jax.jit, static_argnums=0)(trace_images)


def prefill(model: Model, params, tokens_BT, mask_BT, cache, **image_arguments):
    """The cache after a chunk of the prompts. `image_arguments`: the model's patch_code_BT and images, if there are images."""
    return model.apply({"params": params}, tokens_BT, mask_BT, cache=cache, **image_arguments)[1]


def decode_step(model: Model, params, token_B, cache, live_B=None):
    """logits_BW of the next tokens, and the cache with token_B in it. Rows whose live_B is False keep their cache."""
    live_B1 = None if live_B is None else jnp.asarray(live_B, jnp.int32)[:, None]
    x_B1D, cache, _ = model.apply({"params": params}, token_B[:, None], live_B1, cache=cache)
    return logits(params, x_B1D)[:, 0], cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _prefill(model: Model, params, tokens_1T, mask_1T, cache, b, image_arguments):
    row = prefill(model, params, tokens_1T, mask_1T, caches.select_row(cache, b), **image_arguments)
    return caches.insert_row(cache, b, row)


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=2)
def _decode(model: Model, params, cache, slots: Slots, sampling: SlotSampling | None, ends, steps: int):
    """Decodes a block of steps: new ids and their log-probabilities, each [B, steps], and the cache.

    A slot stops after its remaining steps or after one of the tokens `ends`; its ids are -1 from there on.
    """
    B, key_B, generated_B = len(slots.token_B), slots.key_B, slots.generated_B

    def step(carry):
        i, token_B, remaining_B, cache, new_BT, logprobs_BT = carry
        live_B = remaining_B > 0
        logits_BW, cache = decode_step(model, params, token_B, cache, live_B)
        draw_key_B = jax.vmap(jax.random.fold_in)(key_B, generated_B + i)
        token_B = jnp.where(live_B, sample_tokens(logits_BW, draw_key_B, sampling), token_B)
        logprob_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BW), token_B[:, None], axis=1)[:, 0]
        new_BT = new_BT.at[:, i].set(jnp.where(live_B, token_B, -1))
        remaining_B = jnp.where(jnp.isin(token_B, ends), 0, jnp.maximum(remaining_B - 1, 0))
        return i + 1, token_B, remaining_B, cache, new_BT, logprobs_BT.at[:, i].set(logprob_B.astype(jnp.float32))

    start = (jnp.int32(0), slots.token_B, slots.remaining_B, cache,
             jnp.full((B, steps), -1, jnp.int32), jnp.zeros((B, steps), jnp.float32))
    *_, cache, new_BT, logprobs_BT = jax.lax.while_loop(
        lambda carry: (carry[0] < steps) & (carry[2] > 0).any(), step, start)
    return new_BT, logprobs_BT, caches.shard_cache(cache)
