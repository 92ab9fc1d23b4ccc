"""The layer kinds: one record for each letter of `model.pattern`.

A record says all that the rest of mmx must know about a kind: its mixer, what it keeps in a cache, its FLOPs, its place in the
released checkpoint form. Parameter counts, caches, memory, rooflines, the mesh search and the conversion derive from it.

To add a kind, write one file with a Flax module and a `Kind`, and add one line to KINDS. A mixer is called as

    y_BTD, new_cache = kind.mixer(config, name="mixer")(u_BTD, context, cache, constants)

`u_BTD` is the layer's normed input, `context` a `layers.common.Context`, `cache` None or a dict of what `kind.cache` lists,
and `constants` what `kind.constants` returns for the layer. `new_cache` is None without a cache. An entry whose name ends in
axes with S grows with the length: the mixer returns the entries of its T new tokens, and `parallel.cache.append` writes them
after the earlier ones. Any other entry is a state: the mixer returns its new value.
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
    """The record of a pattern's letter; raises ConfigError for an unknown one."""
    if letter not in KINDS:
        known = ", ".join(f"{letter} ({kind.name})" for letter, kind in KINDS.items())
        raise ConfigError(f"model.pattern: {letter!r} is not a layer kind; known: {known}")
    return KINDS[letter]


def check_pattern(pattern: str) -> None:
    """Raises ConfigError unless each letter of the pattern is a known kind."""
    for letter in pattern:
        kind_of(letter)
