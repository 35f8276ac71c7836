"""Emoji of several vendors with their names in Unicode's CLDR, as tables of images with captions.

In: packages of pictures and of names. Out: Parquet to train on and to test on. Read first: `corpus.py`.
"""
