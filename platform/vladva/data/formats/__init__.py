"""The forms in which people have images and captions, one file each: `source.py` says what such a file must have."""
