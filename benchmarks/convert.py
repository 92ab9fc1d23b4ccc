"""Measures time and peak memory of converting a random sharded checkpoint of 4 GB, whose largest stacked tensors exceed 2 GB.

    python benchmarks/convert.py [--dir FOLDER]     # needs 13 GB in FOLDER for two minutes, and removes its files

Each direction runs in a separate process, and its VmHWM (peak resident memory, including Python and jax) is printed. After both
conversions, the tensors are compared bit by bit with the original ones.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mmx import config
from mmx.checkpoints import hf_config, hf_layout, safetensors

# Softmax layers with wide heads: q and out, stacked over layers, have 2.08 GB each; the checkpoint has 4.3 GB.
MODEL = config.Model(vocab=264, dim=4096, layers=31, pattern="S", heads=64, kv_heads=1, head_dim=128, rotary_dim=64,
                     experts=2, expert_dim=64)
SHARD_BYTES = 500_000_000
CHILD = """
import sys
from mmx.checkpoints import convert
getattr(convert, sys.argv[1])(sys.argv[2], sys.argv[3])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def random_checkpoint(directory: Path) -> int:
    """Writes a checkpoint of bfloat16 noise and returns its size in bytes."""
    dtype = safetensors.DTYPES["BF16"]
    noise = np.random.default_rng(0).standard_normal(1 << 22, np.float32).astype(dtype).view(np.uint8)
    tensors = {name: (dtype, leaf.tensor_shape) for leaf in hf_layout.leaves(MODEL) for _, name in leaf.tensors()}
    directory.mkdir()
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    (directory / "config.json").write_text(json.dumps(hf_config.write_model(MODEL, "released", "bfloat16", ids)))
    with safetensors.Files(os.O_WRONLY) as files:
        for i, tensor in enumerate(safetensors.plan_files(directory, tensors, SHARD_BYTES).values()):
            remaining, offset = np.prod(tensor.shape, dtype=np.int64) * dtype.itemsize, tensor.offset
            while remaining:
                part = np.roll(noise, 2 * i)[:remaining]
                files.write(tensor.file, memoryview(part), offset)
                remaining, offset = remaining - len(part), offset + len(part)
    return sum(file.stat().st_size for file in directory.iterdir())


def equal(a: Path, b: Path) -> bool:
    """Whether two checkpoints have the same tensors, bit by bit."""
    first, second = safetensors.find_tensors(a), safetensors.find_tensors(b)
    with safetensors.Files(os.O_RDONLY) as files:
        for name, tensor in first.items():
            one, two = (np.empty(np.prod(t.shape) * t.dtype.itemsize, np.uint8) for t in (tensor, second[name]))
            files.read(tensor.file, memoryview(one), tensor.offset)
            files.read(second[name].file, memoryview(two), second[name].offset)
            if not np.array_equal(one, two):
                return False
    return first.keys() == second.keys()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", help="folder for the files (default: a temporary folder)")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().dir) as folder:
        folder = Path(folder)
        size = random_checkpoint(folder / "source")
        stack = max(np.prod(leaf.shape, dtype=np.int64) * 2 for leaf in hf_layout.leaves(MODEL))
        print(f"checkpoint {size / 1e9:.2f} GB, largest stacked tensor {stack / 1e9:.2f} GB", flush=True)
        print(f"{'':10}{'GB':>8}{'seconds':>10}{'peak GB':>10}", flush=True)
        for call, source, out in (("from_hf", "source", "workdir"), ("to_hf", "workdir", "export")):
            start = time.monotonic()
            done = subprocess.run([sys.executable, "-c", CHILD, call, folder / source, folder / out], check=True,
                                  stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
            peak = int(done.stdout.split()[-1]) * 1024
            print(f"{call:10}{size / 1e9:8.2f}{time.monotonic() - start:10.1f}{peak / 1e9:10.2f}", flush=True)
        same = equal(folder / "source", folder / "export")
        print("all tensors are unchanged, bit by bit" if same else "TENSORS DIFFER")
        return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
