"""From shards to the samples of every micro-batch, the same for any number of workers.

In: WebDataset tars. Out: a scanned index, and which samples make which chunk. Read first: `shard_index.py`.
"""
