"""Mine: what a model makes of its training data -> what the next training is told: negatives, and which are none.

Read first: `negatives.py`, `teacher.py`.
"""
