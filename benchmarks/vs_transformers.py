"""Compares mmx with transformers (PyTorch) on this machine's CPU: the same weights, separate processes, in alternation.

    python benchmarks/vs_transformers.py            # about 2 minutes on 2 cores

28 M parameters (hidden 256, LLLLLLLS, 8 heads x 32, 2 KV heads, 8 experts top-2 x 512, vocabulary 1,024), float32, no
dropping. RoPE rotates all dims of a head and the number of heads is a power of two, because transformers computes the same
function only then; the script first compares the logits. It prints medians of the rounds. A ratio above 1 means that mmx is
faster.
"""
import argparse
import contextlib
import functools
import statistics
import tempfile
import time

import jax
import numpy as np
import torch
import transformers
from child import started
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

import mmx
from mmx import config
from mmx.launch import hugepages
from mmx.training import optim
from mmx.training.step import init, train_step

STEPS = 64
MODEL = config.Model(vocab=1024, rotary_dim=32, aux="hf", aux_weight=0.001)
TRAIN = config.Train(batch=4, length=512)
TOKENS = {"prefill 2,048": 2048, "prefill 8,192": 8192, "decode from 2,048": STEPS, "train step 4x512": 2048}
TARGET = {"prefill 2,048": 1.3, "prefill 8,192": 1.3, "train step 4x512": 1.1, "decode from 2,048": 5.0}


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--rounds", type=int, default=7, help="alternating rounds; prints medians (default 7)")
    flags.add_argument("--threads", type=int, default=2, help="threads of torch; XLA uses all visible cores (default 2)")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stock().save_pretrained(folder)
        run = {side.__name__: stack.enter_context(started(cases_of, side, folder, args.threads)) for side in SIDES}
        print(f"largest logit difference on 512 tokens: {np.abs(run['ours']('logits') - run['theirs']('logits')).max():.1e}")
        times = {name: {side: [] for side in run} for name in TOKENS}
        for number in tqdm(range(args.rounds + 1), "rounds"):
            for name in TOKENS:
                for side, measured in times[name].items():
                    seconds = run[side](name)
                    if number:                                  # round 0 compiles and warms up
                        measured.append(seconds)
    table = Table("", "transformers tokens/s", "mmx tokens/s", "mmx / transformers", "target",
                  title=f"medians of {args.rounds} alternating rounds, {args.threads} threads, torch "
                        f"{torch.__version__}, transformers {transformers.__version__}, jax {jax.__version__}")
    for name, count in TOKENS.items():
        ours, theirs = (statistics.median(times[name][side]) for side in ("ours", "theirs"))
        table.add_row(name, f"{count / theirs:,.0f}", f"{count / ours:,.0f}", f"{theirs / ours:.2f}", f"{TARGET[name]}")
    Console().print(table)


def cases_of(side, folder, threads):
    """The cases of a side, {name: function}; called in its process.

    Args:
      side: a function of the checkpoint's folder and prompt tokens that returns the cases. They return seconds, or the logits
        of 512 tokens for "logits".
    """
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    return side(folder, np.random.default_rng(0).integers(0, MODEL.vocab, (1, 8192)))


def stock():
    """A transformers model with random weights."""
    torch.manual_seed(0)
    layer_types = ["linear_attention" if kind == "L" else "full_attention" for kind in MODEL.layer_kinds]
    factors = {f"{branch}_{kind}_factor": getattr(MODEL, f"{kind}_{ours}") for kind in ("alpha", "beta")
               for branch, ours in (("linear_attn", "lightning"), ("full_attn", "softmax"), ("mlp", "moe"))}
    return transformers.MiniMaxForCausalLM(transformers.MiniMaxConfig(
        vocab_size=MODEL.vocab, hidden_size=MODEL.dim, intermediate_size=MODEL.expert_dim, num_hidden_layers=MODEL.layers,
        num_attention_heads=MODEL.heads, num_key_value_heads=MODEL.kv_heads, head_dim=MODEL.head_dim,
        num_local_experts=MODEL.experts, num_experts_per_tok=MODEL.top_k, router_aux_loss_coef=MODEL.aux_weight,
        layer_types=layer_types, max_position_embeddings=16_384, bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": MODEL.rope_theta, "partial_rotary_factor": 1.0},
        **factors))


def timed(run):
    """A function that runs `run` once and returns its seconds."""
    def seconds() -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    return seconds


def decode_seconds(run, prompt_BT):
    """A function that measures STEPS greedy tokens after prompts: the time of STEPS + 1 tokens minus the time of one token."""
    return lambda: timed(lambda: run(prompt_BT, STEPS + 1))() - timed(lambda: run(prompt_BT, 1))()


def greedy(model):
    """A function that generates with transformers."""
    @torch.no_grad()
    def generate(prompt_BT, count):
        ids_BT = torch.tensor(prompt_BT)
        model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=count, min_new_tokens=count,
                       do_sample=False)
    return generate


def training_rows():
    return np.random.default_rng(1).integers(0, MODEL.vocab, (TRAIN.batch, TRAIN.length)).astype(np.int32)


def theirs(folder, tokens_BT):
    model = transformers.MiniMaxForCausalLM.from_pretrained(folder).float().eval()
    update = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(TRAIN.beta1, TRAIN.beta2), weight_decay=TRAIN.weight_decay)
    rows_BT = torch.tensor(training_rows(), dtype=torch.long)

    @torch.no_grad()
    def prefill(prompt_BT):
        model(torch.tensor(prompt_BT), use_cache=True, logits_to_keep=1).logits.argmax(-1)

    @torch.no_grad()
    def logits():
        return model(torch.tensor(tokens_BT[:, :512]), use_cache=False).logits.numpy()

    def step():
        model.train()
        model(rows_BT, labels=rows_BT, output_router_logits=True, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAIN.clip)
        update.step()
        update.zero_grad()
        model.eval()

    return {"logits": logits, "prefill 2,048": timed(lambda: prefill(tokens_BT[:, :2048])),
            "prefill 8,192": timed(lambda: prefill(tokens_BT)),
            "decode from 2,048": decode_seconds(greedy(model), tokens_BT[:, :2048]), "train step 4x512": timed(step)}


def ours(folder, tokens_BT):
    loaded, rows_BT = mmx.load(folder), training_rows()
    weights_BT = np.ones(rows_BT.shape, np.float32)
    weights_BT[:, -1] = 0
    batch = {"tokens": rows_BT, "targets": np.roll(rows_BT, -1, 1), "segments": np.ones_like(rows_BT),
             "positions": np.broadcast_to(np.arange(TRAIN.length, dtype=np.int32), rows_BT.shape), "weights": weights_BT}
    batch = jax.tree.map(lambda x: jax.device_put(x[None]), batch)
    optimizer = optim.adamw(TRAIN)
    update = jax.jit(functools.partial(train_step, model=loaded.model, optimizer=optimizer, train=TRAIN),
                     donate_argnums=(0, 1))
    state = [*jax.jit(functools.partial(init, loaded.model, optimizer, TRAIN))()]

    def generate(prompt_BT, count):
        mmx.generate(loaded, prompt_BT, steps=count)

    def step():
        state[:] = jax.block_until_ready(update(*state, batch, np.float32(1e-4))[:2])

    return {"logits": lambda: np.asarray(mmx.forward(loaded, tokens_BT[:, :512])),
            "prefill 2,048": timed(lambda: generate(tokens_BT[:, :2048], 1)),
            "prefill 8,192": timed(lambda: generate(tokens_BT, 1)),
            "decode from 2,048": decode_seconds(generate, tokens_BT[:, :2048]), "train step 4x512": timed(step)}


SIDES = theirs, ours

if __name__ == "__main__":
    hugepages.restart(hugepages.BENCHMARK)
    main()
