"""The commands: one file a verb. `python jobs/VERB.py`, `python -m jobs VERB` and `vladva VERB` are the same."""
