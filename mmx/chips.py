"""Table of accelerators: the makers' figures, and what their compilers need to know to compile without the hardware.

TPU figures: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. Those pages give the inter-chip links (ICI) as
"bidirectional ICI bandwidth per chip" of 400, 1200, 800 and 1200 GB/s for v5e, v5p, v6e and tpu7x; half of it is received.
v4 has six links of 50 GB/s (arXiv 2304.01433). A chip receives 25 Gbit/s from the data-centre network for v5e, 50 for v4 and
v5p, 100 for v6e and tpu7x (the same pages and jax-ml.github.io/scaling-book). A tpu7x device has half of its chip's bandwidths.

A TPU slice is named by its number of TensorCores: v5p-16 is 8 chips of two cores, v6e-32 is 32 chips of one core.
"""
from typing import NamedTuple


class TPU(NamedTuple):
    """What libtpu needs to compile for a TPU, and what turns its schedule into time."""
    clock: float                # cycles per second of a TensorCore
    topology: str               # a small topology that libtpu can describe


class GPU(NamedTuple):
    """What XLA and ptxas need to compile for an NVIDIA GPU."""
    architecture: str           # of ptxas -arch
    description: str            # XLA's description of the GPU is mmx/compilers/<description>.txtpb


class Chip(NamedTuple):
    """One JAX device: a chip for v4 to v6e, one of a chip's two cores for tpu7x, a GPU.

    A bandwidth of 0 means that no figure is known; `tpu` and `gpu` are None for chips that mmx does not compile for.
    """
    memory: float                       # high-bandwidth memory (HBM), bytes
    peak: float                         # dense bfloat16 FLOP/s
    bandwidth: float                    # of HBM, bytes/s
    link_bandwidth: float = 0.0         # bytes/s received from the chips of the same slice, or from the GPUs of the same host
    network_bandwidth: float = 0.0      # bytes/s received from other slices, or from other hosts
    tpu: TPU | None = None
    gpu: GPU | None = None


CHIPS = {
    "v4": Chip(32 * 2**30, 275e12, 1.23e12, 300e9, 6.25e9, tpu=TPU(1.05e9, "v4:2x2x1")),
    "v5e": Chip(16 * 2**30, 197e12, 8.2e11, 200e9, 3.125e9, tpu=TPU(1.5e9, "v5e:2x2")),
    "v5p": Chip(95 * 2**30, 459e12, 2.765e12, 600e9, 6.25e9, tpu=TPU(1.75e9, "v5p:2x2x1")),
    "v6e": Chip(32 * 2**30, 918e12, 1.64e12, 400e9, 12.5e9, tpu=TPU(1.75e9, "v6e:2x2")),
    # The clock follows from the peak.
    "tpu7x": Chip(96 * 2**30, 1155e12, 3.69e12, 300e9, 6.25e9, tpu=TPU(2.2e9, "tpu7x:2x2x1")),
    # NVIDIA H100 SXM data sheet (1,979 TFLOP/s with sparsity); NVLink 4, and one 400 Gbit/s ConnectX-7 for each GPU (DGX H100).
    "h100": Chip(80e9, 989e12, 3.35e12, 450e9, 50e9, gpu=GPU("sm_90a", "h100")),
    # The same as H100 except for the links.
    "h800": Chip(80e9, 989e12, 3.35e12),
    # NVIDIA publishes no data sheet; vendors and the press give 148 TFLOP/s, 96 GB and 4.0 TB/s. It has fewer of H100's SMs.
    "h20": Chip(96e9, 148e12, 4.0e12, gpu=GPU("sm_90a", "h100")),
    # NVIDIA A100 80GB SXM data sheet; NVLink 3, and one 200 Gbit/s ConnectX-6 for each GPU (DGX A100).
    "a100": Chip(80e9, 312e12, 2.039e12, 300e9, 25e9, gpu=GPU("sm_80", "a100")),
}
TPUS = [name for name, chip in CHIPS.items() if chip.tpu]
GPUS = [name for name, chip in CHIPS.items() if chip.gpu]
