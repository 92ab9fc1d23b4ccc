"""Notes for the user: lines on stderr about what a command ignores or decides."""
import functools

from mmx.files import output, untrusted


@functools.lru_cache(maxsize=1000)
def note(message: str) -> None:
    """Prints `message` as one line on stderr; the same message only once in a process."""
    output.message(f"mmx: {untrusted.one_line(message)}")
