"""Where compilers for TPUs and GPUs are installed without such a device: JAX uses the CPU, and they log nothing.

The CUDA plugin logs that it finds no driver, once for each of its extension modules, while they are imported. libtpu looks for
a TPU and logs that there is none. Both stay usable for `mmx aot` and `mmx bench kernels`.
"""
import contextlib
import glob
import os
import re
import sys
import tempfile
from importlib.machinery import PathFinder

# Device files of GPUs and TPUs. Other accelerators are unknown to mmx, but most have files in /dev/dri.
DEVICE_FILES = ("/dev/nvidia*", "/dev/dxg", "/dev/kfd", "/dev/dri", "/dev/accel*", "/dev/vfio/[0-9]*")
# Variables of devices without a file. JAX itself sets other variables that begin with TPU_, which its child processes inherit.
REMOTE = ("TPU_NAME", "PJRT_NAMES_AND_LIBRARY_PATHS")
CUDA_MODULES = re.compile(r"(jax_cuda\d+_plugin|jax_plugins\.xla_cuda\d+)(\.|$)")
NOISE = re.compile(rb"WARNING: All log messages before absl::InitializeLog|.*cudart_stub\.cc")


def prepare() -> None:
    """Without a device, selects the CPU, unless JAX_PLATFORMS is set, and silences the CUDA plugin."""
    if sys.platform == "linux" and not has_accelerator():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        sys.meta_path.insert(0, QuietFinder())


def has_accelerator() -> bool:
    """Whether this machine may have a GPU or a TPU."""
    return any(map(glob.glob, DEVICE_FILES)) or any(name in os.environ for name in REMOTE)


@contextlib.contextmanager
def quiet():
    """A context that drops the lines of NOISE from what native code and Python write to stderr, at its end."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            for line in written:
                if not NOISE.match(line):
                    os.write(2, line)


class QuietFinder:
    """Imports the modules of the CUDA plugin, and initializes it, in `quiet`."""

    def find_spec(self, name, path, target=None):
        spec = PathFinder.find_spec(name, path, target) if CUDA_MODULES.match(name) else None
        if spec and spec.loader:
            spec.loader = QuietLoader(spec.loader)
        return spec


class QuietLoader:
    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        with quiet():
            return self._loader.create_module(spec)

    def exec_module(self, module):
        with quiet():
            self._loader.exec_module(module)
        if initialize := getattr(module, "initialize", None):
            def initialize_quietly():
                with quiet():
                    initialize()
            module.initialize = initialize_quietly
