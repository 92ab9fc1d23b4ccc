"""Runs the tasks of lm-eval (EleutherAI's evaluation harness) on mmx checkpoints, as the model "mmx".

    python -m mmx.evals.harness --model mmx --model_args path=run --tasks mmlu --batch_size auto

This runs lm-eval's command after registering the model: lm-eval 0.4.13 finds no models outside its package. Importing this
module also registers the model, for `lm_eval.simple_evaluate(model="mmx", ...)`. Every text starts with the beginning-of-text
token, as in training. Requests are sorted by length, longest first, and padded to powers of two.
"""
import functools
import itertools
import os
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from mmx.checkpoints import convert, finite
from mmx.config import ConfigError
from mmx.data import packing, tokens
from mmx.inference import engine
from mmx.model import Model, logits

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    if __name__ != "__main__":
        raise
    print("mmx: lm-eval is not installed: pip install 'mmx[eval]'", file=sys.stderr)
    sys.exit(2)

SHORTEST = 32           # tokens; shorter rows are padded to it
TOKENS = 16_384         # tokens in a batch if the batch size is auto
LOGITS = 2_048          # tokens whose logits are in memory at a time
STEPS = 256             # tokens to generate if a task does not say how many: lm-eval's default
GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


@register_model("mmx")
class Mmx(TemplateLM):
    """An mmx checkpoint as a model of lm-eval.

    Args:
      path: a workdir or a Hugging Face directory.
      dtype: of parameters and computation; default: as stored.
      max_length: tokens scored in one row; default: model.context.
      batch_size: rows in a batch; "auto": as many as make TOKENS tokens.
      max_batch_size: the most rows for "auto".
      device: ignored; JAX_PLATFORMS chooses JAX's devices.
    """

    def __init__(self, path=None, dtype=None, max_length=None, batch_size=1, max_batch_size=None, device=None, **unknown):
        super().__init__()
        if path in (None, "") or unknown:
            raise ConfigError(f"--model_args {', '.join(unknown) or 'has no path'}: known are path (a checkpoint), dtype and "
                              "max_length")
        if not isinstance(path, str | os.PathLike):
            raise ConfigError(f"--model_args path is the {type(path).__name__} {path}: give a text, path={str(path)!r}")
        self.loaded = convert.load(path, None if dtype is None else str(dtype))
        self._tokenizer = tokens.of_checkpoint(self.loaded.tokenizer, self.loaded.config.vocab)
        self._path = str(path)
        self.max_length = _positive("--model_args max_length", self.loaded.config.context if max_length is None else max_length)
        auto = str(batch_size).startswith("auto")
        self._rows = None if auto else _positive("--batch_size", batch_size)
        self._max_rows = _positive("--max_batch_size", max_batch_size or TOKENS)

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        """Called by `simple_evaluate` with model_args as one text."""
        return super().create_from_arg_string(quote_path(arg_string), additional_config)

    @property
    def tokenizer_name(self) -> str:
        return self._path

    def chat_template(self, chat_template=False):
        """Called with --apply_chat_template."""
        raise ConfigError("--apply_chat_template: mmx applies no chat templates, so leave it out; prompts are plain text")

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        self.chat_template()

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos

    def tok_encode(self, string, add_special_tokens=None, **kwargs) -> list[int]:
        ids = self._tokenizer.encode(string.encode()).tolist()
        return ids if add_special_tokens is False else [self._tokenizer.bos, *ids]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a context and its continuation. As in lm-eval, the continuation gets the spaces at the context's end."""
        stripped = context.rstrip()
        parts = tokens.encode_pair(self._tokenizer, stripped.encode(), (context[len(stripped):] + continuation).encode())
        context_T, continuation_T = (ids_T.tolist() for ids_T in parts)
        return [self._tokenizer.bos, *context_T], continuation_T

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs) -> list[tuple[float, bool]]:
        """(log-probability, whether it is what greedy decoding gives) of each continuation, in the order of the requests."""
        results, rows = [None] * len(requests), []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ConfigError(f"a continuation of {len(continuation)} tokens does not fit max_length={self.max_length}")
            rows.append((np.array(context + continuation, np.int32)[-self.max_length - 1:], len(continuation)))
        with tqdm(total=len(rows), desc="loglikelihood", disable=disable_tqdm) as bar:
            for T, indices in self._batches([len(document) - 1 for document, _ in rows]):
                batch = packing.stack(_row(*rows[i], T) for i in _repeat_last(indices, self._size(T, len(indices))))
                logp_B, greedy_B = jax.device_get(_score(self.loaded.model, self.loaded.params, batch))
                finite.check(logp_B, self.loaded.params, "the log-probabilities")
                for i, logp, greedy in zip(indices, logp_B.tolist(), greedy_B.tolist()):
                    results[i] = logp, greedy
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
                bar.update(len(indices))
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm=False) -> list[float]:
        """Log-probabilities of whole texts, in rows of max_length tokens; each token is scored once."""
        windows = [(i, window) for i, request in enumerate(requests) for window in get_rolling_token_windows(
            self.tok_encode(request.args[0], add_special_tokens=False), self.prefix_token_id, self.max_length, 1)]
        scored = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for _, window in windows], disable_tqdm)
        totals = [0.0] * len(requests)
        for (i, _), (logp, _) in zip(windows, scored):
            totals[i] += logp
        for request, logp in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logp)
        return totals

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        """Continuations of prompts, each up to its first stop string. Request i is sampled with the seed (0, i)."""
        prompts, arguments = zip(*(request.args for request in requests))
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        ordered = [engine.Request(prompts[i], fold=i, **_settings(arguments[i])) for i in order]
        texts, rows = [""] * len(prompts), self._rows or min(engine.ROWS, self._max_rows)
        with tqdm(total=len(prompts), desc="generate", disable=disable_tqdm) as bar:
            for piece in engine.stream(self.loaded, ordered, rows=rows):
                i = order[piece.request]
                texts[i] += piece.text
                if piece.ended:
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                    bar.update()
        return texts

    def _batches(self, lengths):
        """Yields (length to pad to, indices into `lengths`), longest first, so that a lack of memory shows at once."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        for T, indices in itertools.groupby(order, key=lambda i: max(SHORTEST, _next_power(lengths[i]))):
            indices = list(indices)
            yield from ((T, indices[at:at + self._limit(T)]) for at in range(0, len(indices), self._limit(T)))

    def _limit(self, T: int) -> int:
        return self._rows or min(max(TOKENS // T, 1), self._max_rows)

    def _size(self, T: int, count: int) -> int:
        """Rows in a batch of `count` requests: a power of two, so that few shapes are compiled."""
        return min(self._limit(T), _next_power(count))


@functools.partial(jax.jit, static_argnums=0)
def _score(model: Model, params, batch):
    """Scores each row's weighted targets: logp_B, their summed log-probability, and greedy_B, whether all are the likeliest."""
    x_BTD, _, _ = model.apply({"params": params}, batch["tokens"], batch["segments"], batch["positions"])
    B, T, _ = x_BTD.shape
    span = min(T, _next_power(LOGITS // B + 1) // 2 or 1)        # a power of two, as T is

    def chunk(arrays):
        x_BQD, target_BQ, weight_BQ = arrays
        logits_BQW = logits(params, x_BQD)
        target_logit_BQ = jnp.take_along_axis(logits_BQW, target_BQ[..., None], axis=2)[..., 0]
        logp_B = jnp.sum((target_logit_BQ - jax.nn.logsumexp(logits_BQW, axis=2)) * weight_BQ, axis=1)
        return logp_B, jnp.all((jnp.argmax(logits_BQW, axis=2) == target_BQ) | (weight_BQ == 0), axis=1)

    def split(x):
        """Reshapes [B, T, ...] to [T / span, B, span, ...]."""
        return jnp.moveaxis(x.reshape(B, T // span, span, *x.shape[2:]), 1, 0)
    logp_NB, greedy_NB = jax.lax.map(chunk, tuple(map(split, (x_BTD, batch["targets"], batch["weights"]))))
    return logp_NB.sum(0), greedy_NB.all(0)


def _row(document, scored: int, T: int) -> dict[str, np.ndarray]:
    """A row of `T` tokens in which the last `scored` tokens of the document are targets with weight 1."""
    row, = packing.rows(document, T)
    row["weights"][:len(document) - 1 - scored] = 0
    return row


def _repeat_last(indices, size: int):
    """`indices` extended to `size` by repeating the last one."""
    return indices + indices[-1:] * (size - len(indices))


def _next_power(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def _settings(arguments: dict) -> dict:
    """The fields `steps` and `sampling` of `engine.Request` in lm-eval's generation arguments."""
    given = normalize_gen_kwargs(arguments, STEPS)
    other = {name: value for name, value in given.items() if name not in GENERATION and value not in (None, False, 1)}
    if other:
        raise ConfigError(f"generation arguments {other} are not supported; supported are {', '.join(sorted(GENERATION))}")
    drawn = {name: given[name] for name in ("top_k", "top_p") if given["do_sample"] and given.get(name) is not None}
    stop = tuple(text for text in given["until"] if text)
    sampling = engine.Sampling(temperature=given.get("temperature", 0.0), stop=stop, **drawn)
    return {"steps": given["max_gen_toks"], "sampling": sampling}


def _positive(name: str, value) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ConfigError(f"{name}={value} must be a positive integer")
    return int(value)


def quote_path(argument: str) -> str:
    """Quotes the value of path in key=value pairs, because lm-eval reads an unquoted 007 as the number 7."""
    return re.sub(r"(^|,)(\s*path=)([^'\",][^,]*)", lambda found: f"{found[1]}{found[2]}{found[3]!r}", argument)


def main() -> int:
    """Runs lm-eval's command; returns the exit code."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv[1:] = [quote_path(argument) for argument in sys.argv[1:]]
    try:
        cli_evaluate()
    except ConfigError as error:
        print(f"mmx: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
