"""Which release a device runs: one owner. `table.py` is the state machine, `edge.updater.Updater` runs it.

inforce.py     the releases in force, as a value
table.py       events, steps and what is in force after each
memory.py      the state file
engines.py     the seam to what serves: stage, then serve or drop
request.py     a rollback asked for on the device itself
"""
