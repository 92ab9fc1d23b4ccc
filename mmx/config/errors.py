"""The error that a user's mistake raises, and hints for misspelt names."""
import difflib


class ConfigError(ValueError):
    """A mistake that the user can correct; the message is one line."""
    code = 2        # exit code of the process


class NonFiniteError(ConfigError):
    """A result is nan or infinite, so it is not reported as a result."""


def nearest(name: str, known) -> str:
    """"; did you mean X?", or "; known: ..." if no known name is close."""
    close = difflib.get_close_matches(name[:100], known, 1, 0.5)        # difflib's time grows with the square of the length
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def require(condition, message: str) -> None:
    """Raises ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_choice(key: str, value, allowed) -> None:
    """Raises ConfigError unless the value is one of those allowed."""
    require(value in allowed, f"{key}={value!r} must be one of {', '.join(map(repr, allowed))}")
