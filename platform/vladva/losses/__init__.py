"""Training losses, one file each: tensors in, a scalar and a few figures for the log out. They import torch only.

The folder listing is the menu; `contrastive.py` says what a file brings. Read first: `contrastive.py`, `sigmoid.py`.
"""
