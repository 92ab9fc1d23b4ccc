"""Notes for the user: lines on stderr about what a command ignores or decides."""
import functools
import sys

from mmx.files import untrusted


@functools.lru_cache(maxsize=1000)
def note(message: str) -> None:
    """Prints `message` as one line on stderr; the same message only once in a process."""
    if sys.stderr:      # None if the process was started without it
        print(f"mmx: {untrusted.one_line(message)}", file=sys.stderr)
