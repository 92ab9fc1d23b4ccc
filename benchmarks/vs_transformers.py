"""mmx beside PyTorch's transformers on the same weights, alternating in one process on this machine's CPU.

    python benchmarks/vs_transformers.py            # about 5 minutes on 2 cores

28 M parameters (hidden 256, LLLLLLLS, 8 heads x 32, 2 KV heads, 8 experts top-2 x 512, vocabulary 1,024), float32, no
dropping. RoPE turns whole heads and their number is a power of two, so that stock transformers computes the same
function, which is checked first. Medians of alternating rounds; a ratio over 1 means mmx is faster.
"""
import argparse
import functools
import statistics
import tempfile
import time

import jax
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

import mmx
from mmx import config, hugepages, optim
from mmx.train import init, train_step

MODEL = config.Model(vocab=1024, rotary_dim=32, aux="hf", aux_weight=0.001)
TRAIN = config.Train(batch=4, length=512)
TARGET = {"prefill 2,048": 1.3, "prefill 8,192": 1.3, "train step 4x512": 1.1, "decode from 2,048": 5.0}


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--rounds", type=int, default=7, help="alternating rounds, medians are shown (default 7)")
    flags.add_argument("--threads", type=int, default=2, help="torch's threads; XLA takes the cores it sees (default 2)")
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()

    loaded, stock = models()
    tokens_BT = np.random.default_rng(0).integers(0, MODEL.vocab, (1, 8192))
    print(f"largest logit difference on 512 tokens: {difference(loaded, stock, tokens_BT[:, :512]):.1e}")
    cases = {"prefill 2,048": (2048, *prefill(loaded, stock, tokens_BT[:, :2048])),
             "prefill 8,192": (8192, *prefill(loaded, stock, tokens_BT)),
             "decode from 2,048": (64, *decode(loaded, stock, tokens_BT[:, :2048], 64)),
             "train step 4x512": (2048, *training(loaded, stock))}
    times = {name: ([], []) for name in cases}
    for number in tqdm(range(args.rounds + 1), "rounds"):
        for name, (_, *both) in cases.items():
            for run, kept in zip(both, times[name]):
                seconds = run()
                if number:                                  # round 0 compiles and warms up
                    kept.append(seconds)
    table = Table("", "transformers tokens/s", "mmx tokens/s", "mmx / transformers", "target",
                  title=f"medians of {args.rounds} alternating rounds, {args.threads} threads, torch "
                        f"{torch.__version__}, transformers {transformers.__version__}, jax {jax.__version__}")
    for name, (count, *_) in cases.items():
        ours, theirs = (statistics.median(t) for t in times[name])
        table.add_row(name, f"{count / theirs:,.0f}", f"{count / ours:,.0f}", f"{theirs / ours:.2f}", f"{TARGET[name]}")
    Console().print(table)


def models():
    """The same random weights in mmx and in stock transformers."""
    torch.manual_seed(0)
    layer_types = ["linear_attention" if kind == "L" else "full_attention" for kind in MODEL.layer_kinds]
    factors = {f"{branch}_{kind}_factor": getattr(MODEL, f"{kind}_{ours}") for kind in ("alpha", "beta")
               for branch, ours in (("linear_attn", "lightning"), ("full_attn", "softmax"), ("mlp", "moe"))}
    stock = transformers.MiniMaxForCausalLM(transformers.MiniMaxConfig(
        vocab_size=MODEL.vocab, hidden_size=MODEL.dim, intermediate_size=MODEL.expert_dim, num_hidden_layers=MODEL.layers,
        num_attention_heads=MODEL.heads, num_key_value_heads=MODEL.kv_heads, head_dim=MODEL.head_dim,
        num_local_experts=MODEL.experts, num_experts_per_tok=MODEL.top_k, router_aux_loss_coef=MODEL.aux_weight,
        layer_types=layer_types, max_position_embeddings=16_384, bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": MODEL.rope_theta, "partial_rotary_factor": 1.0},
        **factors)).float().eval()
    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(folder)
        return mmx.load(folder), stock


def difference(loaded, stock, tokens_BT) -> float:
    with torch.no_grad():
        theirs_BTW = stock(torch.tensor(tokens_BT), use_cache=False).logits.numpy()
    return float(np.abs(np.asarray(mmx.forward(loaded, tokens_BT)) - theirs_BTW).max())


def timed(run):
    def seconds() -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    return seconds


def prefill(loaded, stock, tokens_BT):
    """Read a prompt into the cache, give the next token."""
    @torch.no_grad()
    def theirs():
        stock(torch.tensor(tokens_BT), use_cache=True, logits_to_keep=1).logits.argmax(-1)
    return timed(lambda: mmx.generate(loaded, tokens_BT, steps=1)), timed(theirs)


def decode(loaded, stock, tokens_BT, steps):
    """`steps` greedy tokens behind a prompt: the time of steps + 1 less that of one."""
    ids = torch.tensor(tokens_BT)

    def theirs(count):
        stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False)

    def ours(count):
        mmx.generate(loaded, tokens_BT, steps=count)
    return (lambda: timed(lambda: ours(steps + 1))() - timed(lambda: ours(1))(),
            lambda: timed(lambda: theirs(steps + 1))() - timed(lambda: theirs(1))())


def training(loaded, stock):
    """Forward, backward with the routers' loss, clipped AdamW."""
    rows_BT = np.random.default_rng(1).integers(0, MODEL.vocab, (TRAIN.batch, TRAIN.length)).astype(np.int32)
    positions_BT = np.broadcast_to(np.arange(TRAIN.length, dtype=np.int32), rows_BT.shape)
    weights_BT = np.ones(rows_BT.shape, np.float32)
    weights_BT[:, -1] = 0
    batch = {"tokens": rows_BT, "targets": np.roll(rows_BT, -1, 1), "segments": np.ones_like(rows_BT),
             "positions": positions_BT, "weights": weights_BT}
    batch = jax.tree.map(lambda x: jax.device_put(x[None]), batch)
    optimizer = optim.adamw(TRAIN)
    step = jax.jit(functools.partial(train_step, model=loaded.model, optimizer=optimizer, loss_chunk=TRAIN.loss_chunk),
                   donate_argnums=(0, 1))
    state = [*jax.jit(functools.partial(init, loaded.model, optimizer, TRAIN.seed))()]

    def ours():
        state[:] = jax.block_until_ready(step(*state, batch, np.float32(1e-4))[:2])

    update = torch.optim.AdamW(stock.parameters(), lr=1e-4, betas=(TRAIN.beta1, TRAIN.beta2), weight_decay=TRAIN.weight_decay)
    ids = torch.tensor(rows_BT, dtype=torch.long)

    def theirs():
        stock.train()
        stock(ids, labels=ids, output_router_logits=True, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(stock.parameters(), TRAIN.clip)
        update.step()
        update.zero_grad()
        stock.eval()
    return timed(ours), timed(theirs)


if __name__ == "__main__":
    hugepages.restart()
    main()
