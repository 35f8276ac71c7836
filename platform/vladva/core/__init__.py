"""What everything stands on: storage, object stores, images, hashing, errors, progress, and tasks on Ray.

In: URIs and bytes. Out: bytes, decoded images, or an error with a reason. Read first: `storage.py`.
"""
