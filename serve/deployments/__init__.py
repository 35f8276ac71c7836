"""The Serve deployments: replicas that hold a model or an index, and what their callers hold of them.

In: items and messages. Out: embeddings, tokens, hits. Read first: `embedding.py`.
"""
