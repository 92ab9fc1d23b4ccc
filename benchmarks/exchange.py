"""Prints the bytes that a device receives in the forward pass of one attention layer whose sequence is sharded, by length.

    python benchmarks/exchange.py --devices 8

The heads are those of MiniMax-Text-01 (64 of 128; 8 KV heads in softmax layers), for one row, with bfloat16 keys and values
and float32 states. LASP+ exchanges the states of a lightning layer. Ring attention exchanges the keys and values of a softmax
layer. The last column is what a lightning layer would receive if it gathered the keys and values of its whole sequence. Tests
compare these formulas with the compiled programs (for example tests/parallel/test_lasp.py).
"""
import argparse

from rich.console import Console
from rich.table import Table

from mmx import config
from mmx.parallel import lightning, ring

ITEM = 2        # bytes of a bfloat16 value


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--devices", type=int, default=8, help="devices that share the sequence (default 8)")
    flags.add_argument("--lengths", default="8k,128k,1M,4M", help="tokens, separated by commas (default %(default)s)")
    args = flags.parse_args()
    devices, H, G, K = args.devices, 64, 8, 128
    table = Table("tokens", "lightning, LASP+", "softmax, ring attention", "lightning, gathering the sequence",
                  title=f"MB received per device and layer, forward pass, {devices} devices")
    for length in config.parse_lengths(args.lengths):
        lasp = lightning.bytes_per_device(1, H, K, K, devices, last=False)
        around_ring = ring.bytes_per_device(length // devices, 2 * G * K, devices, ITEM)
        gathered = (devices - 1) * H * length // devices * 2 * K * ITEM
        table.add_row(f"{length:,}", *(f"{size / 1e6:,.1f}" for size in (lasp, around_ring, gathered)))
    Console().print(table)


if __name__ == "__main__":
    main()
