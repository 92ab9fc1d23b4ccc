"""Runs cases in a child process, so that the threads and the memory of the compared programs do not interfere."""
import contextlib
import multiprocessing


@contextlib.contextmanager
def started(make_cases, *args):
    """Starts a child process, which ends when the block closes its pipe.

    A signal would make libtpu, where it is installed, print a stack trace.

    Args:
      make_cases: called in the child with `args`. Returns the cases, {name: function}.
    Yields:
      a function that runs a case by name in the child and returns its result.
    """
    spawn = multiprocessing.get_context("spawn")
    pipe, child_pipe = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(child_pipe, make_cases, *args))
    process.start()
    child_pipe.close()

    def run_case(name):
        pipe.send(name)
        return pipe.recv()
    try:
        yield run_case
    finally:
        pipe.close()
        process.join()


def _serve(pipe, make_cases, *args):
    """Receives names of cases and sends their results."""
    cases = make_cases(*args)
    with contextlib.suppress(EOFError):     # the parent process has closed the pipe
        while True:
            pipe.send(cases[pipe.recv()]())
