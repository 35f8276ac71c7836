"""From the image-text data that people have to scanned shards, every sample accounted for.

In: tars, Parquet, tables, folders, COCO or Karpathy JSON. Out: shards and a quarantine. Read first: `pipeline.py`.
"""
