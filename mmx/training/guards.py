"""The guard against divergence: it counts skipped steps and rolls a run back after a loss spike.

1. `step.train_step` skips the update of a step whose loss or gradient norm is not finite. The guard counts these steps.
2. The run is rolled back after a spike, or after more than guard.skips skipped steps in a row. A spike is a loss more than
   guard.spike nats above the median of the last guard.window losses. A rollback restores the last checkpoint and discards the
   data read since then, because the same parameters on the same data would spike again.
3. The run raises DivergedError if it must roll back but cannot: rollbacks are disabled (guard.spike is 0), or there were
   already guard.rollbacks rollbacks to the same checkpoint.

The guard's state is part of a checkpoint, so a resumed run does the same as an uninterrupted run.
"""
import math
import statistics
from typing import NamedTuple

from mmx import config
from mmx.config import ConfigError


class DivergedError(ConfigError):
    """The run cannot recover. If it were started again, it would stop at the same step."""
    code = 4


class Rollback(NamedTuple):
    """The decision to roll a run back after a step."""
    step: int
    reason: str


class Guard:
    """Watches the losses of a run. `skipped` and `rollbacks` count from the run's start; their limits are in `config`."""

    def __init__(self, e: config.Experiment):
        self.config, self.train = e.guard, e.train
        self.rollbacks_since_save = 0
        self.stream_states = {}     # for each of the last two steps: the state of the data stream after its batch was read
        self.restore(None)

    def state(self) -> dict:
        """The part of the guard that a checkpoint saves, for JSON. The key "row" means `skipped_in_a_row`."""
        return self.counts() | {"row": self.skipped_in_a_row, "losses": self.losses.copy()}

    def counts(self) -> dict[str, int]:
        """The counts that each line of metrics.jsonl contains."""
        return {"skipped": self.skipped, "rollbacks": self.rollbacks}

    def restore(self, state: dict | None) -> None:
        """Restores the `state` of a checkpoint. None: the state of a new run."""
        state = state or {"skipped": 0, "rollbacks": 0, "row": 0, "losses": []}
        self.skipped, self.rollbacks, self.skipped_in_a_row = state["skipped"], state["rollbacks"], state["row"]
        self.losses = state["losses"].copy()        # the last guard.window losses, without spikes

    def check(self, step: int, loss: float, grad_norm: float) -> Rollback | None:
        """Checks the results of a step. Returns a Rollback if one is needed.

        Raises:
          DivergedError: the run must roll back but cannot.
        """
        g = self.config
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            reason = f"step {step} has loss {loss} and gradient norm {grad_norm}"
            if self.skipped_in_a_row <= g.skips:
                return None
            if not g.spike:
                before = f", and the {g.skips} steps before it were skipped too" if g.skips else ""
                raise DivergedError(f"{reason}{before}{self._advice()}")
            return self._request_rollback(step, reason)
        self.skipped_in_a_row = 0
        if g.spike and len(self.losses) == g.window and loss > (median := statistics.median(self.losses)) + g.spike:
            reason = f"step {step} has loss {loss:.3f}, the median of the last {g.window} is {median:.3f}"
            return self._request_rollback(step, reason)
        self.losses = [*self.losses, loss][-g.window:] if g.spike else []
        return None

    def _request_rollback(self, step: int, reason: str) -> Rollback:
        if self.rollbacks_since_save == self.config.rollbacks:
            raise DivergedError(f"{reason}, and {self.rollbacks_since_save} rollbacks did not help{self._advice()}")
        return Rollback(step, reason)

    def _advice(self) -> str:
        t = self.train
        clip = f"a lower gradient clip (train.clip is {t.clip})" if t.clip else "a gradient clip (train.clip is 0: none)"
        return (": a resumed run would stop at the same step; start in another --workdir with a lower learning rate "
                f"(train.lr is {t.lr}) or {clip}")

    def record_stream(self, step: int, stream) -> None:
        """Remembers the state of the data stream after the batch of `step` was read."""
        if self.config.spike:
            self.stream_states = {step - 1: self.stream_states.get(step - 1), step: stream.state()}

    def roll_back(self, rollback: Rollback, stream, restore):
        """Rolls the parameters and the guard back to the last checkpoint. The data stream continues after the step's batch.

        With guard.beyond, the stream also skips the data of the next guard.beyond steps.

        Args:
          restore: reads the last checkpoint and returns it as a `loop.State`.
        Returns:
          That `loop.State`.
        """
        stream.restore(self.stream_states[rollback.step])  # the loop may have read the batch of a later step already
        for _ in range(self.config.beyond * self.train.micro_batches(self.train.tokens_seen(rollback.step))):
            stream.next()
        state = restore()
        # Only the number of steps goes back to the checkpoint's. The position in the data does not.
        stream.rewind_step_count(state.host_state["stream"])
        self.rollbacks_since_save += 1
        self.restore(state.host_state.get("guard"))
        self.rollbacks += self.rollbacks_since_save     # the checkpoint's count, plus the rollbacks to this checkpoint
        return state

    def saved(self) -> None:
        """Resets the number of rollbacks to the last checkpoint, because a new checkpoint was saved."""
        self.rollbacks_since_save = 0
