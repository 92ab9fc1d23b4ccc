"""Huge pages for buffers in the host's memory.

XLA's CPU client takes new memory for every call. Where Linux hands it out in pages of 4 KiB, touching them can cost more
than the work on them: one lightning layer, forward and backward, over 16,384 tokens took twice as long. glibc's malloc
asks for huge pages if it is told so before the process starts.
"""
import os
import sys


def restart():
    """Starts the running command again with huge pages on, once; a GLIBC_TUNABLES of the user's own is left alone."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
