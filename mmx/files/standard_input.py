"""Reads the standard input where a command takes a file: "-", /dev/stdin, and pipes of the shell such as <(command)."""
import os
import re

from mmx.config import ConfigError
from mmx.files import texts, untrusted

PATH = re.compile(r"-|/dev/stdin|(?:/dev|/proc/self)/fd/([0-9]{1,6})")


def is_named(path: str) -> bool:
    """Whether the path names an input that is open already, instead of a file."""
    return bool(PATH.fullmatch(path))


def read_text(path: str, most: int = untrusted.TEXT_BYTES) -> str:
    """The text of an open input up to its end, read like a file by `texts.read`. Raises ConfigError."""
    number = int(PATH.fullmatch(path)[1] or 0)
    try:
        with os.fdopen(number, "rb", closefd=False) as file:
            raw = file.read(most + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if len(raw) > most:
        raise ConfigError(f"{path} has more than {most:,} bytes")
    return texts.decode(raw, path)
