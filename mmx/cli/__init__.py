"""The command line, `mmx COMMAND`. Each command is one module; `mmx.cli.parser.COMMANDS` lists them.

This module imports nothing else, so that `main` can handle Ctrl-C before the imports, which take most of the start.
"""
import sys


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code. Exits with code 2 if the arguments are wrong.

    Args:
      argv: the arguments after the program's name. None: this process is the program; `main` sets it up and takes the arguments
        of its command line.
    """
    if argv is not None:
        from mmx.cli import parser

        return parser.run(argv)
    from mmx.startup import interrupts

    interrupts.install()
    from mmx import startup
    from mmx.launch import hugepages

    hugepages.restart()
    startup.prepare()
    from mmx.cli import parser

    code = parser.run(sys.argv[1:])
    if code == interrupts.EXIT_CODE:
        interrupts.exit_now(code)
    return code
