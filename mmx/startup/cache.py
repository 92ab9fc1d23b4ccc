"""JAX's persistent cache of compiled programs, in the user's cache folder.

JAX's own key of a program has its HLO, the versions of jaxlib and of the device, and XLA's flags. Programs for CPUs also depend
on the processor, which the key does not have. So each kind of processor has its own folder, because a home folder may be shared
by machines that differ. Failures of the cache are silent, because it only saves time.
"""
import hashlib
import os
import platform
import re
import warnings
from pathlib import Path

# What XLA's code generator may depend on: fields of /proc/cpuinfo on x86, ARM and RISC-V.
FIELDS = {"vendor_id", "cpu family", "model", "model name", "stepping", "flags", "CPU implementer", "CPU architecture",
          "CPU variant", "CPU part", "Features", "isa"}
MOST_BYTES = 2 << 30        # of all programs; above it, the oldest are deleted until half is left
FAILURE = re.compile(r"Error (?:reading|writing) persistent compilation cache entry for '([\w<>.-]+)'")


def enable(home: Path | None = None) -> None:
    """Turns the cache on, for this process and its children, unless JAX_COMPILATION_CACHE_DIR is set.

    JAX must not be imported yet. `home` is the user's cache folder; None: XDG_CACHE_HOME or ~/.cache.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = home or Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    programs = home / "mmx" / "programs"
    folder = programs / hashlib.sha256(processor().encode()).hexdigest()[:16]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not home.is_absolute() or folder.stat().st_uid != os.geteuid() or not os.access(folder, os.W_OK):
            return
        prune(programs)
    except (OSError, RuntimeError):     # a full or read-only disk; no home folder
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    _handle_failures(folder)


def processor(cpuinfo: str = "/proc/cpuinfo") -> str:
    """Describes this machine's processor. Where its features are not known, the text is the name of the machine."""
    lines = []
    try:
        with open(cpuinfo, encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.strip() and lines:      # the end of the first core
                    break
                if line.partition(":")[0].strip() in FIELDS:
                    lines.append(line.strip())
    except OSError:
        pass
    return "\n".join(lines) or f"{platform.node()} {platform.machine()} {platform.processor()}"


def prune(programs: Path, most: int = MOST_BYTES) -> None:
    """Deletes the oldest programs if all of them together exceed `most` bytes."""
    found = sorted((entry.stat().st_mtime, entry.stat().st_size, entry.path) for folder in os.scandir(programs)
                   if folder.is_dir() for entry in os.scandir(folder) if entry.is_file())
    total = sum(size for _, size, _ in found)
    if total <= most:
        return
    for _, size, path in found:
        Path(path).unlink(missing_ok=True)
        total -= size
        if total <= most / 2:
            return


def _handle_failures(folder: Path) -> None:
    """Replaces JAX's warning of a program that could not be read or written by the deletion of its files.

    A process that was killed, or a full disk, may leave an incomplete file, which JAX itself would never replace.
    """
    show = warnings.showwarning

    def handle(message, *args, **kwargs):
        if failure := FAILURE.match(str(message)):
            for path in folder.glob(f"{failure[1]}-*"):
                path.unlink(missing_ok=True)
        else:
            show(message, *args, **kwargs)
    warnings.showwarning = handle
