"""The HTTP routes, one file each: they read a request and call deployments.

In: HTTP requests. Out: OpenAI-style replies. Read first: `embeddings.py`.
"""
