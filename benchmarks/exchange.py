"""Bytes that a device receives for one attention layer whose sequence is cut over devices, forward, by length.

    python benchmarks/exchange.py --devices 8

MiniMax-Text-01's heads (64 of 128, 8 KV heads in softmax), one row, bfloat16 keys and values, float32 states. LASP+ moves
states (one exchange a layer, counted in the compiled program by tests/parallel/test_lasp.py), the ring a softmax layer's keys
and values; gathering would move a lightning layer's. The formulas are those that the tests hold to the compiled programs.
"""
import argparse

from rich.console import Console
from rich.table import Table

from mmx import config
from mmx.parallel import lightning, ring

ITEM = 2        # bytes of bfloat16


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--devices", type=int, default=8, help="that the sequence is cut over (default 8)")
    flags.add_argument("--lengths", default="8k,128k,1M,4M", help="in tokens, with commas (default 8k,128k,1M,4M)")
    args = flags.parse_args()
    X, H, G, K = args.devices, 64, 8, 128
    table = Table("tokens", "LASP+", "ring attention", "gathering a lightning layer's sequence",
                  title=f"MB received a device and layer, forward, {X} devices")
    for length in config.parse_lengths(args.lengths):
        states = lightning.bytes_per_device(1, H, K, K, X, last=False)
        around = ring.bytes_per_device(length // X, 2 * G * K, X, ITEM)
        gathered = (X - 1) * H * length // X * 2 * K * ITEM
        table.add_row(f"{length:,}", *(f"{size / 1e6:,.1f}" for size in (states, around, gathered)))
    Console().print(table)


if __name__ == "__main__":
    main()
