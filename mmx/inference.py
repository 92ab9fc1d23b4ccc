"""Inference: logits of whole sequences, and generation in two parts (paper section 3.3).

Prefill reads all prompts but their last tokens in chunks of one fixed shape; decode then runs on the device, one token
a row and step, each step feeding what the last one drew. Prompts may be ragged: padding on the right is written nowhere
and leaves every state alone.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmx.config import ConfigError, is_text
from mmx.data import tokens as tokenizers
from mmx.model import Model, logits
from mmx.parallel.cache import empty_cache

PREFILL = 2048      # tokens a chunk at most: the larger, the less of an expert's time goes into reading its weights
DECODE = 64         # steps on the device between two looks for stop strings
ROOM = 256          # the cache's capacity and the chunks are multiples: few shapes to compile


def forward(loaded, tokens_BT, mask_BT=None):
    """logits_BTW (float32) of token ids; where `mask_BT` is 0 a token is padding, whose logits mean nothing.

    Raises ConfigError for ids outside the vocabulary.
    """
    tokens_BT = _ids(loaded.config, np.asarray(tokens_BT))
    if mask_BT is not None and np.shape(mask_BT) != tokens_BT.shape:
        raise ConfigError(f"mask_BT has shape {np.shape(mask_BT)}, tokens_BT {tokens_BT.shape}")
    segments_BT = None if mask_BT is None else jnp.asarray(mask_BT, jnp.int32)
    return _forward(loaded.model, loaded.params, tokens_BT, segments_BT)


def generate(loaded, prompts, *, steps: int, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
             stop=()):
    """Continuations of `prompts`, at most `steps` tokens each.

    Args:
      loaded: what `mmx.load` gives.
      prompts: strings (a list, or one), or token ids [B, T].
      temperature: 0 takes the likeliest token.
      top_k, top_p: draw among the k likeliest (0: all), among the likeliest that make up probability p.
      seed: same seed, same draws; row b draws from (seed, b).
      stop: strings; a continuation ends before the first of them, as it does before the end-of-text token.

    Returns:
      A list of strings for strings; the new ids [B, steps] for ids, which nothing stops.
    """
    _check(prompts, steps, temperature, top_k, top_p, seed, stop)
    draw = {"temperature": np.float32(temperature), "top_k": np.int32(top_k or loaded.config.vocab),
            "top_p": np.float32(top_p)} if temperature else None
    if not isinstance(prompts, (str, list, tuple)) or not isinstance(prompts[0], str):
        ids_BT = _ids(loaded.config, np.asarray(prompts))
        return np.concatenate(list(_continue(loaded.model, loaded.params, list(ids_BT), steps, steps, draw, seed)), axis=1)

    if not loaded.tokenizer:
        raise ConfigError("this checkpoint has no tokenizer: give token ids, or put its tokenizer.json beside config.json")
    tokenizer = tokenizers.tokenizer(loaded.tokenizer)
    tokenizers.check_vocab(tokenizer, loaded.config.vocab)
    prompts, stop = [prompts] if isinstance(prompts, str) else list(prompts), [stop] if isinstance(stop, str) else stop
    rows = [np.append(np.int32(tokenizer.bos), tokenizer.encode(p.encode())) for p in prompts]
    ids_BT, texts = np.zeros((len(rows), 0), np.int32), [""] * len(rows)
    for new_BT in _continue(loaded.model, loaded.params, rows, steps, DECODE, draw, seed):
        ids_BT = np.concatenate([ids_BT, new_BT], axis=1)
        texts, ended = zip(*(_text(tokenizer, ids, stop) for ids in ids_BT))
        if all(ended):
            break
    return list(texts)


def sample(model: Model, params, tokenizer, prompt: str, steps: int = 200) -> str:
    """A text drawn from a model in training, for its log."""
    row = np.append(np.int32(tokenizer.bos), tokenizer.encode(prompt.encode()))
    draw = {"temperature": np.float32(0.8), "top_k": np.int32(model.config.vocab), "top_p": np.float32(0.95)}
    new_BT, = _continue(model, params, [row], steps, steps, draw, 0)
    return prompt + _text(tokenizer, new_BT[0], ())[0]


def _text(tokenizer, ids, stop) -> tuple[str, bool]:
    """The text of a continuation up to its end, and whether it has one."""
    end = np.flatnonzero(ids == tokenizer.eos)
    text = tokenizer.decode(ids[:end[0]] if len(end) else ids)
    cuts = [at for at in (text.find(s) for s in stop) if at >= 0]
    return text[:min(cuts)] if cuts else text, bool(len(end) or cuts)


def _continue(model, params, rows, steps, block, draw, seed):
    """Yields the new ids [B, n] of ragged `rows`, at most `block` at a time, `steps` in all."""
    B, longest = len(rows), max(len(row) for row in rows)
    chunks = -(-(longest - 1) // PREFILL)
    chunk = -(-(longest - 1) // max(chunks, 1) // ROOM) * ROOM
    read = chunks * chunk
    cache = empty_cache(model.config, B, -(-max(read, longest + steps) // ROOM) * ROOM)
    tokens_BT, mask_BT = np.zeros((B, read), np.int32), np.zeros((B, read), np.int32)
    for b, row in enumerate(rows):
        tokens_BT[b, :len(row) - 1], mask_BT[b, :len(row) - 1] = row[:-1], 1
    for n in range(chunks):
        at = slice(n * chunk, (n + 1) * chunk)
        cache = _prefill(model, params, tokens_BT[:, at], mask_BT[:, at], cache)
    token_B = jnp.asarray([row[-1] for row in rows], jnp.int32)
    key = jax.random.key(seed)
    for at in range(0, steps, block):
        count = min(block, steps - at)
        new_BT, token_B, cache = _decode(model, params, token_B, cache, key, at, draw, min(block, steps), count)
        yield np.asarray(new_BT)[:, :count]


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: Model, params, tokens_BT, segments_BT):
    return logits(params, model.apply({"params": params}, tokens_BT, segments_BT)[0])


def prefill(model: Model, params, tokens_BT, mask_BT, cache):
    """The cache with a chunk of the prompts in."""
    return model.apply({"params": params}, tokens_BT, mask_BT, cache=cache)[1]


def decode_step(model: Model, params, token_B, cache):
    """logits_BW of the next tokens, and the cache with these in."""
    x_B1D, cache, _ = model.apply({"params": params}, token_B[:, None], cache=cache)
    return logits(params, x_B1D)[:, 0], cache


_prefill = jax.jit(prefill, static_argnums=0, donate_argnums=4)


@functools.partial(jax.jit, static_argnums=(0, 7), donate_argnums=3)
def _decode(model: Model, params, token_B, cache, key, first, draw, room: int, count):
    """`count` steps of at most `room`; step i draws with the key of place first + i."""
    def step(i, carry):
        token_B, cache, new_BT = carry
        logits_BW, cache = decode_step(model, params, token_B, cache)
        token_B = _draw(logits_BW, jax.random.fold_in(key, first + i), draw)
        return token_B, cache, new_BT.at[:, i].set(token_B)

    start = (token_B, cache, jnp.zeros((len(token_B), room), jnp.int32))
    token_B, cache, new_BT = jax.lax.fori_loop(0, count, step, start)
    return new_BT, token_B, cache


def _draw(logits_BW, key, draw):
    """The next tokens. Without `draw` the likeliest; else a Gumbel draw among those that top-k and top-p leave."""
    if draw is None:
        return jnp.argmax(logits_BW, axis=1).astype(jnp.int32)
    B, W = logits_BW.shape
    logits_BW = logits_BW.astype(jnp.float32) / draw["temperature"]
    sorted_BW = jnp.sort(logits_BW, axis=1, descending=True)
    p_BW = jax.nn.softmax(jnp.where(jnp.arange(W) < draw["top_k"], sorted_BW, -jnp.inf))
    above_BW = jnp.cumsum(p_BW, axis=1) - p_BW              # probability of all likelier ones
    kept_B = jnp.sum((above_BW < draw["top_p"]) & (p_BW > 0), axis=1, keepdims=True)
    least_B1 = jnp.take_along_axis(sorted_BW, jnp.maximum(kept_B, 1) - 1, axis=1)
    noise_BW = jax.vmap(lambda b: jax.random.gumbel(jax.random.fold_in(key, b), (W,)))(jnp.arange(B))
    return jnp.argmax(jnp.where(logits_BW >= least_B1, logits_BW + noise_BW, -jnp.inf), axis=1).astype(jnp.int32)


def _ids(c, ids_BT):
    if ids_BT.ndim != 2 or not np.issubdtype(ids_BT.dtype, np.integer) or ids_BT.shape[1] == 0:
        raise ConfigError(f"token ids need an integer array [B, T], T at least 1; got {ids_BT.dtype} {ids_BT.shape}")
    if ids_BT.min() < 0 or ids_BT.max() >= c.vocab:
        raise ConfigError(f"token ids reach from {ids_BT.min()} to {ids_BT.max()}, the vocabulary from 0 to {c.vocab - 1}")
    return ids_BT.astype(np.int32)


def _check(prompts, steps, temperature, top_k, top_p, seed, stop):
    if len(prompts) == 0:
        raise ConfigError("no prompt was given")
    for prompt in prompts if isinstance(prompts, (list, tuple)) else [prompts]:
        if isinstance(prompt, str) and not is_text(prompt):
            raise ConfigError(f"prompt {prompt!a} is no text: it holds bytes that are not UTF-8, or half of a surrogate pair")
    for name, value in (("steps", steps), ("top_k", top_k), ("seed", seed)):
        if not isinstance(value, (int, np.integer)):
            raise ConfigError(f"{name}={value!r} is no whole number")
    if any(not s for s in ([stop] if isinstance(stop, str) else stop)):
        raise ConfigError("stop holds an empty string, which every text begins with")
    for name, value, good in (("steps", steps, steps >= 1), ("temperature", temperature, temperature >= 0),
                              ("top_k", top_k, 0 <= top_k < 2**31), ("top_p", top_p, 0 < top_p <= 1),
                              ("seed", seed, 0 <= seed < 2**32)):
        if not good:
            raise ConfigError(f"{name}={value} is out of range: steps >= 1, temperature >= 0, 0 <= top_k < 2^31, "
                              "0 < top_p <= 1, 0 <= seed < 2^32")
