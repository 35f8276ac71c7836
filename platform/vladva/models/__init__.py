"""From a name to a loaded model, which embeds images and texts, and generates.

In: a run, an adapter or a checkpoint. Out: an `Embedder`. Read first: `embedder.py`.
"""
