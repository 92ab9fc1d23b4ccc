"""What a program of mmx sets up before it imports JAX: Ctrl-C, standard streams, devices, the cache of compiled programs.

Only programs call it: `mmx`, `python -m mmx.evals.harness` and the test suite. `import mmx` changes nothing in its process.
"""


def prepare() -> None:
    """Sets up this process as a program of mmx. `hugepages.restart` must come first, if at all: it starts the process again."""
    from mmx.startup import interrupts

    interrupts.install()
    from mmx.startup import cache, devices, streams

    streams.prepare()
    devices.prepare()
    cache.enable()
