"""Checks and conversions of single values."""
import bisect
import math
import re

from mmx.config.errors import require

LIMIT = 1 << 40                     # whole numbers must be below this


def typed(key: str, value, kind: type):
    """Converts a value to a field's type: an int to a float, a list to a tuple. Raises ConfigError for any other type."""
    if kind is tuple and isinstance(value, (list, tuple)):
        return tuple(typed(key, v, tuple) if isinstance(v, (list, tuple)) else v for v in value)
    if kind is float and type(value) is int and abs(value) < 2 ** 1023:
        return float(value)
    require(type(value) is not int or kind is not int or abs(value) < LIMIT, f"config key {key} needs a number below 2^40")
    require(type(value) is kind, f"config key {key} needs {kind.__name__}, got {value!r:.200}")
    if kind is float:
        require(math.isfinite(value), f"config key {key} needs a finite number, got {value!r}")
    return value


def is_text(value: str) -> bool:
    """Whether the string can be encoded as UTF-8; arguments that are not UTF-8 contain lone surrogates."""
    return value.encode("utf-8", "ignore").decode() == value


def parse_lengths(text: str) -> list[int]:
    """The numbers of tokens in "512,1k,4M", without repeats, in that order; 1k is 1,024 and 1M is 1,048,576."""
    parts = [re.fullmatch(r"([0-9]{1,10})([km]?)", part.strip().lower()) for part in text.split(",")]
    found = [int(part[1]) * {"": 1, "k": 2 ** 10, "m": 2 ** 20}[part[2]] if part else 0 for part in parts]
    require(all(found), f"--lengths {text!r:.200} must be numbers of tokens with commas, such as 512,1k,4M (1k = 1,024)")
    return list(dict.fromkeys(found))


def value_at(points, position):
    """Evaluates a piecewise constant function: the value of the last of `points` whose begin is at most `position`.

    Args:
      points: ((begin, value), ...), sorted by begin.
    """
    return points[bisect.bisect_right([begin for begin, _ in points], position) - 1][1]
