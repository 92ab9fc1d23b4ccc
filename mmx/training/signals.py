"""Stops a run between two steps on SIGTERM or Ctrl-C."""
import os
import signal

import jax


class StopSignals:
    """A context in which SIGTERM and the first Ctrl-C set `number`, which the loop reads. A second Ctrl-C interrupts at once.

    With several processes, all must stop at the same step. JAX's preemption service then handles SIGTERM
    (`Checkpoints.preempted`), and this class installs no handlers.
    """
    number = 0      # the signal that asks the run to stop; 0: none

    def __enter__(self):
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self.previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def _handle(self, number, _):
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, self.previous[number])
            os.write(2, b"\nstopping after this step, which is saved; press Ctrl-C again to quit at once\n")

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
