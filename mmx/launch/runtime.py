"""The accelerator of this machine and the extra of mmx that supports it: cuda12, cuda13, tpu or none. Standard library only.

    python mmx/launch/runtime.py                    # prints the extra; an empty line means that only the CPU can be used
    %run mmx/launch/runtime.py install torch        # in a notebook: installs this clone's mmx[EXTRA,torch], checks jax

The first cell of each notebook runs the second command, so this file works before mmx is installed.
"""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

BUS = Path("/sys/bus/pci/devices")
GOOGLE = "0x1ae0"       # vendor id on the PCI bus
TPUS = "0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"     # v2 and v3, plc, v4, v5p, v5e, v6e, tpu7x
RESTART = "choose Runtime > Restart session and run this cell again, or else Runtime > Disconnect and delete runtime"


def extra() -> tuple[str, str]:
    """Returns the extra that this machine needs ("" for the CPU) and a description of the accelerator.

    NVIDIA drivers report the newest CUDA that they support; JAX has packages for CUDA 12 and 13. TPUs are found on the PCI bus,
    as JAX finds them, or by the variables that Colab and Cloud TPU set.
    """
    if cuda := _cuda():
        major = int(cuda.partition(".")[0])
        return ("cuda13" if major >= 13 else "cuda12" if major == 12 else ""), f"a GPU with a driver for CUDA {cuda}"
    if _has_tpu():
        return "tpu", "a TPU"
    return "", "no accelerator"


def _cuda() -> str:
    """The newest CUDA version that the NVIDIA driver supports, such as 12.4; empty without a driver or a GPU."""
    if not shutil.which("nvidia-smi"):
        return ""
    found = re.search(r"CUDA Version:\s*([\d.]+)", subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
    return found[1] if found else ""


def _has_tpu() -> bool:
    devices = [[(device / name).read_text().strip() for name in ("vendor", "device")] for device in BUS.glob("*")]
    return any(vendor == GOOGLE and device in TPUS for vendor, device in devices) or bool(
        os.environ.keys() & {"TPU_ACCELERATOR_TYPE", "COLAB_TPU_ADDR", "COLAB_TPU_1VM"})


def command(extras: list[str], folder: str) -> list[str]:
    """The pip command that installs mmx from the clone in `folder` with these extras."""
    return [sys.executable, "-m", "pip", "install", "--quiet", f"{folder}[{','.join(extras)}]" if extras else folder]


def install(extras: list[str]) -> str:
    """Installs mmx from this clone with the extra of the accelerator and `extras`; returns one line about the result."""
    needed, description = extra()
    pip = command(list(dict.fromkeys(filter(None, [needed, *extras]))), str(Path(__file__).resolve().parents[2]))
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        return f"mmx: {' '.join(pip)} failed: {(done.stderr.splitlines() or ['no message'])[-1]}"
    return check(needed, description)


def check(needed: str, description: str) -> str:
    """Returns one line: which devices JAX uses, or why it does not use the accelerator and what to do."""
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        return f"mmx: JAX cannot use this runtime ({str(error).splitlines()[0]}): {RESTART}"
    shown = f"{len(devices)} x {devices[0].device_kind}"
    platform = {"": "cpu", "tpu": "tpu"}.get(needed, "gpu")
    if devices[0].platform != platform:
        return f"mmx: this runtime has {description}, but JAX uses {shown}: {RESTART}"
    if not needed and description != "no accelerator":
        return f"mmx: JAX uses {shown}: this runtime has {description}, and JAX needs 12 or newer. Update the driver."
    if not needed:
        return f"mmx: JAX uses {shown}; for a GPU or a TPU, choose Runtime > Change runtime type and run this cell again"
    return f"mmx: JAX uses {shown}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["install"]:
        print(install(sys.argv[2:]))
    else:
        print(extra()[0])
