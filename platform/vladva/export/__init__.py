"""Export: a run -> a folder that other people's software loads, with the same embeddings.

In: a model reference. Out: a Hugging Face checkpoint that transformers, sentence-transformers and vLLM read, or the
adapter alone. Read first: `checkpoint.py`.
"""
