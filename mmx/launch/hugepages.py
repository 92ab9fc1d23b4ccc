"""Huge pages for buffers in the host's memory.

XLA's CPU client takes new memory for every call. Where Linux hands it out in pages of 4 KiB, touching them can cost more
than the work on them: a training step of the tiny sizes a fifth, one lightning layer over 16,384 tokens half of its time.
glibc's malloc asks for huge pages if it is told so before the process starts. It is also told to keep few arenas: by default
it has eight a core, the threads of every save fill others of them, and a process grows for hours without holding more.
"""
import os
import sys

HUGE = "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=2"
# For benchmarks: free memory stays with the process, which a virtual machine's host would take back in a pause.
BENCHMARK = ("glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=68719476736:"
        "glibc.malloc.arena_max=1")


def restart(tunables: str = HUGE):
    """Starts the running command again with huge pages on, once; a GLIBC_TUNABLES of the user's own is left alone."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = tunables
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
