"""Writes JSON. All JSON that mmx writes passes through `dumps`, or has numbers that were checked before."""
import json
import math

from mmx.config import NonFiniteError


def dumps(value, **options) -> str:
    """`value` as JSON text. `options` are passed to json.dumps.

    Raises:
      NonFiniteError: a number is nan or infinite, which JSON cannot express. The message names its place.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        if place := _find(value):
            raise NonFiniteError(f"{place[0] or 'the result'} is {place[1]}: it is not written, because JSON has no such "
                                 "number") from None
        raise


def _find(value, path: str = "") -> tuple[str, float] | None:
    """The path of the first number that is not finite, such as "fits.0.low", and the number."""
    if isinstance(value, float):
        return None if math.isfinite(value) else (path, value)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return next(filter(None, (_find(inner, f"{path}.{key}".strip(".")) for key, inner in items)), None)
