"""Training losses, one file each: tensors in, a scalar and a few figures for the log out. They import torch only.

Import from the file (`from vladva.losses.info_nce import info_nce`); the folder listing is the menu.
"""
