"""From chunks of samples to checkpoints, on Ray workers with DeepSpeed.

In: a `RunConfig` and scanned shards. Out: `checkpoints/step-N`. Read first: `loop.py`.
"""
