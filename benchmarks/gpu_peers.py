"""Compares lightning attention on a GPU with the published kernels of flash-linear-attention and of the paper (lightning_attn).

    pip install fla-core lightning-attn         # and torch, triton, einops; mmx itself needs none of them
    python benchmarks/gpu_peers.py              # some minutes, mostly for the autotuning of the other kernels

One sequence, 64 heads of 128, bfloat16, the decays of the first layer; all kernels run in turn in one process. Softmax
attention is that of torch (cuDNN or FlashAttention). Prints medians. The error is ||o - o'|| / ||o'||, where o' is computed by
XLA in float32 from the same rounded inputs.
"""
import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from mmx import config
from mmx.kernels.lightning import lightning_attention
from mmx.layers.lightning import log_decay

H, D = 64, 128
LOG_DECAY_H = log_decay(config.Model(heads=H, head_dim=D), 0)
CALLS, ROUNDS = 5, 7


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--lengths", default="2k,8k,32k", help="tokens, separated by commas (default %(default)s)")
    flags.add_argument("--forms", default="gpu,triton,xla", help="back ends of mmx, separated by commas (default %(default)s)")
    flags.add_argument("--documents", type=int, default=8, help="documents of the packed case (default 8)")
    args = flags.parse_args()
    cases = [(T, documents) for T in config.parse_lengths(args.lengths) for documents in (1, args.documents)]
    for T, documents in tqdm(cases, "cases"):
        table = Table("kernel", "forward ms", "forward and backward ms", "error",
                      title=f"{jax.devices()[0].device_kind}, {T:,} tokens, documents: {documents}")
        for name, cells in measure(T, documents, args.forms.split(",")).items():
            table.add_row(name, *(x if isinstance(x, str) else f"{x:.3g}" for x in cells))
        Console(width=110).print(table)


def measure(T, documents, forms):
    """{kernel: (ms of a forward pass, ms of a forward and a backward pass, relative error)}."""
    rng = np.random.default_rng(T)
    x_HTD = [rng.standard_normal((1, H, T, D), np.float32) for _ in range(4)]
    edges = np.linspace(0, T, documents + 1).astype(int)
    segments_BT = None if documents == 1 else jnp.asarray(np.searchsorted(edges[1:], np.arange(T), side="right")[None] + 1)
    *ours, do = (jnp.asarray(x, jnp.bfloat16) for x in x_HTD)
    attend = functools.partial(lightning_attention, log_decay_H=jnp.asarray(LOG_DECAY_H), segments_BT=segments_BT)
    with jax.default_matmul_precision("highest"):
        want = np.asarray(jax.jit(lambda *x: attend(*(y.astype(jnp.float32) for y in x), impl="xla")[0])(*ours))
    found = {}
    for impl in forms:
        forward = jax.jit(lambda q, k, v, impl=impl: attend(q, k, v, impl=impl)[0])
        both = jax.jit(functools.partial(with_gradients, forward))
        found[f"mmx, {impl}"] = timed(forward, both, ours, do, want, jax.block_until_ready)
    by_head = [torch.tensor(x, device="cuda").bfloat16() for x in x_HTD]
    for name, (forward, layout) in peers(edges).items():
        *args, cotangent = (x.transpose(1, 2).contiguous() if layout == "BTHD" else x for x in by_head)

        def both(do, *args, forward=forward):
            leaves = [x.detach().requires_grad_() for x in args]
            return torch.autograd.grad(forward(*leaves), leaves, do)
        expected = np.moveaxis(want, 1, 2) if layout == "BTHD" else want
        try:
            found[name] = timed(forward, both, args, cotangent, expected if name != "softmax, torch" else None, synchronize)
        except Exception as error:      # these kernels may not support the shape or may run out of memory; mmx's must run
            found[name] = (" ".join(str(error).split())[:40],) * 2 + ("",)
    return found


def with_gradients(forward, do, *args):
    o, pull = jax.vjp(forward, *args)
    return o, pull(do)          # returns o too, so that XLA does not remove its computation


def peers(edges):
    """{name: (function of q, k and v, layout)} of the installed kernels."""
    gamma_H, found = torch.tensor(LOG_DECAY_H, device="cuda", dtype=torch.float32), {}
    packed = {} if len(edges) == 2 else {"cu_seqlens": torch.tensor(edges, device="cuda", dtype=torch.int32)}
    try:
        from fla.ops.simple_gla import chunk_simple_gla
        gla = functools.partial(chunk_simple_gla, g_gamma=gamma_H, scale=1.0, **packed)
        found["flash-linear-attention"] = lambda *qkv: gla(*qkv)[0], "BTHD"
    except ImportError:
        pass
    if packed:
        return found            # the other kernels do not support packed documents
    try:
        from lightning_attn.ops import lightning_attn_func
        found["lightning_attn"] = lambda q, k, v: lightning_attn_func(q, k, v, -gamma_H), "BHTD"
    except ImportError:
        pass
    softmax = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    return found | {"softmax, torch": (softmax, "BHTD")}


def timed(forward, both, args, do, want, wait):
    """(ms of `forward`, ms of `both`, relative error of the output, or nan if `want` is None)."""
    o = wait(forward(*args))
    o = np.asarray(o.float().cpu() if isinstance(o, torch.Tensor) else o, np.float32)
    error = np.linalg.norm(o - want) / np.linalg.norm(want) if want is not None else float("nan")
    return median_ms(lambda: forward(*args), wait), median_ms(lambda: both(do, *args), wait), error


def synchronize(x):
    torch.cuda.synchronize()
    return x


def median_ms(run, wait):
    times = []
    for _ in range(2 + ROUNDS):
        begin = time.perf_counter()
        for _ in range(CALLS):
            done = run()
        wait(done)
        times.append((time.perf_counter() - begin) / CALLS)
    return statistics.median(times[2:]) * 1e3


if __name__ == "__main__":
    main()
