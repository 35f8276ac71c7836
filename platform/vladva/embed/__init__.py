"""From a corpus to a table of embeddings, each item exactly once.

In: images and texts. Out: a Parquet table with a fingerprint. Read first: `pipeline.py`.
"""
