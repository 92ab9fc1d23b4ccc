"""The command line, `mmx COMMAND`. Each command is one module; `mmx.cli.parser.COMMANDS` lists them."""
from mmx.cli.parser import main

__all__ = ["main"]
