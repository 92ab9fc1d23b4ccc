"""Tables, progress bars and messages.

A caller of the library may have no stderr: in a GUI or a web worker, sys.stderr can be None.
"""
import sys

from rich.console import Console
from tqdm.auto import tqdm


def console(**options) -> Console:
    """A rich console that prints every text as it is: names of files may contain [ ] and : :, which are markup otherwise."""
    return Console(markup=False, emoji=False, **options)


def bar(*args, disable: bool | None = False, **options) -> tqdm:
    """A tqdm bar on stderr, which is redrawn every 30 seconds in a file; disabled where there is no stderr.

    Args:
      disable: None: disabled unless stderr is a terminal.
    """
    return tqdm(*args, disable=True if sys.stderr is None else disable, mininterval=0.5 if is_terminal(sys.stderr) else 30,
                **options)


def is_terminal(stream) -> bool:
    """Whether a standard stream is a terminal. It can be None, or an object with `write` alone."""
    return bool(getattr(stream, "isatty", lambda: False)())


def message(text: str) -> None:
    """Prints a line on stderr, where there is one."""
    if sys.stderr is not None:
        print(text, file=sys.stderr)
