"""From many started processes to one run: finding each other, checking before the start, stopping together.

In order: processes.py (who am I, from the environment), roll_call.py (all meet before JAX starts), facts.py and
report.py (are all of us the same), start.py (the order of these, for the entry points), stop.py (pre-emption).
Nothing here knows models or data. Files of schedulers: the folder launch/ of the project.
"""
