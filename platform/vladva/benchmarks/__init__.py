"""From benchmark files to a task, and from embeddings to its scores.

In: annotations and images. Out: what to embed, then scores with outcomes. Read first: `benchmark.py`.
"""
