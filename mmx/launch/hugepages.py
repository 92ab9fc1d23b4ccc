"""Huge pages for buffers in host memory.

XLA's CPU client allocates new memory for every call. With pages of 4 KiB, the page faults can take as long as the
computation: a fifth of a training step of the tiny sizes, half of one lightning layer over 16,384 tokens. glibc's malloc
uses huge pages only if GLIBC_TUNABLES asks for them before the process starts. The same variable limits the number of
malloc's arenas. By default there are eight for each core. Each save of a checkpoint has new threads, which use other arenas, so
the memory of the process would grow for hours.
"""
import os
import signal
import sys

HUGE = "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=2"
# For benchmarks: the process keeps freed memory, so that the host of a virtual machine cannot reclaim it in a pause.
BENCHMARK = ("glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736:"
             "glibc.malloc.arena_max=1")


def restart(tunables: str = HUGE):
    """Restarts the running command once, with the settings that a process must have when it starts.

    They are `tunables` in GLIBC_TUNABLES, unless the user has set that variable, and UTF-8 in an ASCII locale, where Python
    could not represent other names of files. Ctrl-C is blocked during the restart, until the new process has a handler.
    """
    missing = {}
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        missing["GLIBC_TUNABLES"] = tunables
    if sys.getfilesystemencoding() == "ascii" and os.environ.get("PYTHONUTF8") != "1":
        missing["PYTHONUTF8"] = "1"
    if missing:
        os.environ |= missing
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
