"""The checkpoints of a run, and conversion to and from the released form."""
