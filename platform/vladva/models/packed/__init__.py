"""The forwards without padding: tokens of all prompts one after the other, shared beginnings once.

In: padded tokens and pixels. Out: the same embeddings and gradients as the padded forward. Read first: `packing.py`.
"""
