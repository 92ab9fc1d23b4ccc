"""Runs a command and turns a user's mistake into one line on stderr and an exit code."""
import os
import sys

from mmx.config import ConfigError
from mmx.files import untrusted

USAGE = 2           # exit code for a user's mistake
INTERRUPTED = 130   # exit code after Ctrl-C


def report(message: str, code: int = USAGE) -> int:
    """Prints `message` as one line on stderr and returns `code`."""
    print(f"mmx: {untrusted.one_line(message)}", file=sys.stderr)
    return code


def run(command, args) -> int:
    """Calls `command(args)` and returns an exit code.

    Expected failures are reported in one line. A defect in mmx keeps its traceback.
    """
    try:
        return command(args) or 0
    except (ConfigError, ImportError) as error:
        return report(str(error), getattr(error, "code", USAGE))
    except BrokenPipeError:         # the reader of stdout has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:        # for example a full disk, or a file where a directory is needed
        if isinstance(error, TimeoutError) and not error.errno:     # raised by Orbax while it waits for another process
            raise
        return report(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except UnicodeEncodeError as error:     # of bytes in an argument, or a file's name, that Python could not decode
        return report(f"{error.object!a:.200} is not UTF-8: give text, or rename the file")
    except MemoryError as error:
        return report(f"out of memory: {error}" if str(error) else "out of memory")
    except KeyboardInterrupt:
        return report("interrupted", INTERRUPTED)
