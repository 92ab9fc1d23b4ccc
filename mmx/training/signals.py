"""Stops a run between two steps on SIGTERM or Ctrl-C."""
import os
import signal

import jax


class StopSignals:
    """A context in which SIGTERM and a first Ctrl-C set `number`, which the loop reads; a second Ctrl-C interrupts at once.

    Several processes must stop at the same step. There JAX's preemption service handles SIGTERM
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
            os.write(2, b"\nstopping: this step ends and is saved; Ctrl-C once more quits at once\n")

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
