"""From a table of embeddings to hits.

In: an embeddings table. Out: a Lance data set that is searched, changed and pinned. Read first: `vector_index.py`.
"""
