"""What devices have, by their makers' figures: the one table that rooflines, searches and schedules are counted against."""
from typing import NamedTuple


class Chip(NamedTuple):
    """A device (of v4, v5p a chip; of tpu7x half a chip, one of its two cores)."""
    memory: float           # HBM, bytes
    peak: float             # dense bfloat16 FLOP/s
    bandwidth: float        # of HBM, bytes/s
    near: float = 0.0       # bytes/s received over all links to its slice's chips, or its host's GPUs; 0: not known here
    far: float = 0.0        # bytes/s received over the data-centre network, or between hosts of GPUs


# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} ("bidirectional ICI bandwidth per chip" of 400, 1200, 800 and
# 1200 GB/s, half of it each way) and six links of 50 GB/s for v4 (arXiv 2304.01433); the data-centre network from there and
# jax-ml.github.io/scaling-book (25, 50, 100 Gbit/s a chip of v5e, v5p and v4, v6e and tpu7x). A slice is named by its
# TensorCores: v5p-16 is 8 chips of two, v6e-32 is 32 chips of one.
CHIPS = {
    "v4": Chip(32 * 2**30, 275e12, 1.23e12, 300e9, 6.25e9),
    "v5e": Chip(16 * 2**30, 197e12, 8.2e11, 200e9, 3.125e9),
    "v5p": Chip(95 * 2**30, 459e12, 2.765e12, 600e9, 6.25e9),
    "v6e": Chip(32 * 2**30, 918e12, 1.64e12, 400e9, 12.5e9),
    "tpu7x": Chip(96 * 2**30, 1155e12, 3.69e12, 300e9, 6.25e9),
    # NVIDIA H100 data sheet, SXM, 1,979 TFLOP/s with sparsity; NVLink 4 and a ConnectX-7 of 400 Gbit/s a GPU (DGX H100's).
    "h100": Chip(80e9, 989e12, 3.35e12, 450e9, 50e9),
    # H100's but for the links.
    "h800": Chip(80e9, 989e12, 3.35e12),
    # NVIDIA publishes no data sheet; 148 TFLOP/s, 96 GB, 4.0 TB/s is what vendors of it and the press give.
    "h20": Chip(96e9, 148e12, 4.0e12),
}
