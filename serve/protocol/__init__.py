"""What HTTP needs besides routes: shapes of requests, errors, limits, keys, images in requests.

In: raw requests. Out: validated bodies, or one error shape. Read first: `schema.py`.
"""
