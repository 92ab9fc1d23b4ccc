"""The layer kinds: one record for each letter of `model.pattern`.

A record contains all that the rest of mmx must know about a kind: its mixer, its cache entries, its FLOPs, and its tensors in
released checkpoints. Parameter counts, caches, memory, rooflines, the mesh search and the conversion are derived from it.

To add a kind, write one file with a Flax module and a `Kind`, and add one line to KINDS. `kind.mixer` creates the module:

    mixer = kind.mixer(config, name="mixer")
    y_BTD, new_cache = mixer(u_BTD, context, cache, constants)

    u_BTD       the layer's normed input
    context     a `layers.common.Context`
    cache       a dict with the entries that `kind.cache` names, or None
    constants   what `kind.constants` returns for the layer
    new_cache   the new entries, or None without a cache

A cache entry with an axis S in its name grows with the length: the mixer returns only the part of its T new tokens, and
`parallel.cache.append` writes this part after the earlier tokens. Any other entry is a state: the mixer returns its new value.
"""
from mmx.config import ConfigError
from mmx.layers import lightning, softmax
from mmx.layers.common import Kind

KINDS: dict[str, Kind] = {
    "L": lightning.KIND,
    "S": softmax.KIND,
    "W": softmax.WINDOW_KIND,
}


def kind_of(letter: str) -> Kind:
    """The record of a letter of the pattern. Raises ConfigError if the letter is unknown."""
    if letter not in KINDS:
        known = ", ".join(f"{letter} ({kind.name})" for letter, kind in KINDS.items())
        raise ConfigError(f"model.pattern: {letter!r} is not a layer kind; known: {known}")
    return KINDS[letter]


def check_pattern(pattern: str) -> None:
    """Raises ConfigError unless each letter of the pattern is a known kind."""
    for letter in pattern:
        kind_of(letter)
