"""The tiny LVLM that ships with the package, and how it was trained.

In: scenes. Out: `weights/`, a LLaVA checkpoint. Read first: `model.py`.
"""
