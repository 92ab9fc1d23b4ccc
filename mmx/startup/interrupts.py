"""Ctrl-C ends a program with one line and exit code 130, from its first import on.

The handler ends the process itself, instead of raising KeyboardInterrupt. An exception would have to pass through whatever runs
at that moment. Extension modules turn it into other errors while they are imported, and Python prints and drops it in callbacks
of the garbage collector. During a compilation it can crash the process: XLA compiles in a separate thread, and the exception
ends the wait of the main thread and frees the MLIR module that the other thread still reads (seen with jaxlib 0.10.2 as a
segmentation fault in mlir::DiagnosticEngine::eraseHandler, called by xla::MlirToXlaComputation).
"""
import contextlib
import os
import signal
import sys

EXIT_CODE = 130
_temporary = set()      # paths that the handler removes
_unwinding = 0          # how many `unwinding` blocks are active


def install() -> None:
    """Handles Ctrl-C in this process, unless its parent has made it ignore Ctrl-C, as nohup does."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, end_program)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})     # blocked by `hugepages.restart`


@contextlib.contextmanager
def removing(path):
    """A context in which Ctrl-C removes `path`, a temporary file or folder, before it ends the program."""
    _temporary.add(path)
    try:
        yield path
    finally:
        _temporary.discard(path)


@contextlib.contextmanager
def unwinding():
    """A context in which Ctrl-C raises KeyboardInterrupt, for code that must end its child processes."""
    global _unwinding
    _unwinding += 1
    try:
        yield
    finally:
        _unwinding -= 1


@contextlib.contextmanager
def handling(handler, *numbers: int):
    """A context with a handler of signals. Does nothing outside the main thread, where Python allows no handlers."""
    before = {}
    with contextlib.suppress(ValueError):
        for number in numbers:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous or signal.SIG_DFL)       # None: a handler of native code


def exit_now(code: int):
    """Ends the process without shutting down the interpreter, while threads of XLA may still compile."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):      # a closed pipe, or the write that Ctrl-C has interrupted
            stream.flush()
    os._exit(code)


def end_program(*_):
    """The handler of Ctrl-C."""
    if _unwinding:
        raise KeyboardInterrupt
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for path in list(_temporary):
        import shutil  # here: it takes 5 ms
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink(path)
    bars = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    with contextlib.suppress(OSError):
        os.write(2, (b"\n" if getattr(bars, "_instances", None) else b"") + b"mmx: interrupted\n")
    exit_now(EXIT_CODE)
