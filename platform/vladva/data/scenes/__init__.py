"""Generated images of objects with captions that are true, and hard negatives that are not.

In: a seed. Out: shards and benchmark files. Read first: `scene.py`.
"""
