"""Preflight: what is checked before any worker of a run starts, so that it fails now rather than on the cluster."""

from __future__ import annotations

from collections.abc import Callable

from vladva.config import RunConfig
from vladva.core import storage
from vladva.models import checkpoint

Tell = Callable[[str], None]
"""Takes a line for the user."""


def check_data(config: RunConfig, tell: Tell) -> None:
    """Scan the shards (only those that are new or changed), load nothing else; fail now rather than on the cluster."""
    from vladva.data.sampler import SampleFinder
    from vladva.data.scan import scan
    from vladva.models.packed.decoder import packing_unsupported
    from vladva.train.data_loader import run_preprocessor
    from vladva.train.engine import zero_stage
    from vladva.train.memory_plan import check_memory
    from vladva.train.validation import Validation

    preprocessor = run_preprocessor(config)
    width = preprocessor.config.get_text_config().hidden_size
    if max(config.loss.matryoshka, default=0) >= width:
        raise ValueError(f"loss.matryoshka {config.loss.matryoshka}: the model's embeddings have {width} dimensions")
    if reason := packing_unsupported(preprocessor.backbone, preprocessor.config.get_text_config(), config):
        tell(f"training with padding, which takes longer: {reason}")
    if zero_stage(config) != config.train.zero_stage:
        tell(f"training under ZeRO-{zero_stage(config)}: stage 1 would add up the gradients in bfloat16")
    for uri in config.data.uris:
        tell(str(scan(uri, preprocessor.count_tokens, max_bad_fraction=config.data.max_bad_fraction)))
    found = SampleFinder(config).fingerprint
    newest = checkpoint.latest(config.uri)
    if newest and storage.read_json(storage.join(newest, checkpoint.STATE))["data_fingerprint"] != found:
        raise ValueError(
            f"{', '.join(config.data.uris)}: the samples are not those that {newest} was trained on, so the run cannot "
            f"go on with each of them once; put them back as they were, or choose another --name"
        )
    if config.cluster.device_memory_gib is not None:
        check_memory(config)
    if config.train.validate_on:
        Validation(config)
