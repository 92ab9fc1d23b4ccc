"""Standard input and outputs that are closed, or that cannot encode every character."""
import os
import sys


def prepare() -> None:
    """Opens closed standard streams on /dev/null, and lets the outputs escape what their encoding does not have."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            # os.open returns the lowest free number. If it stayed free, the next file that is opened would get it, and
            # native code would log into that file.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
