"""Stops a run between two steps on SIGTERM or Ctrl-C."""
import os
import signal
import threading

import jax


class StopSignals:
    """A context in which SIGTERM and the first Ctrl-C set `number`, which the loop reads. A second Ctrl-C interrupts at once.

    With several processes, all must stop at the same step. JAX's preemption service then handles SIGTERM
    (`Checkpoints.preempted`), and this class installs no handlers. Python allows handlers only in the main thread, so a run in
    another thread has none, and signals do to its process what they did before.
    """
    number = 0      # the signal that asks the run to stop; 0: none

    def __enter__(self):
        alone = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGTERM, signal.SIGINT) if alone else ()
        self.previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def _handle(self, number, _):
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, self.previous[number] or signal.SIG_DFL)
            os.write(2, b"\nstopping after this step, which is saved; press Ctrl-C again to quit at once\n")

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler or signal.SIG_DFL)        # None: a handler of native code
