"""From models and benchmarks to scores.

In: names of models and benchmarks. Out: scores, intervals, outcomes, captions. Read first: `scoring.py`.
"""
