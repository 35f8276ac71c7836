"""Export a model: load it, write it in another form, and prove by the probe that the form gives the same embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from vladva.core import storage
from vladva.export.checkpoint import Dtype, new_folder, write_merged_checkpoint
from vladva.export.model_card import Training, model_card
from vladva.export.probe import check_probe, make_probe
from vladva.export.sentence_transformers_files import write_sentence_transformers_files

if TYPE_CHECKING:
    from vladva.evaluate.scores import Scores

Form = Literal["adapter", "hf", "sentence-transformers", "vllm"]
EXPORT_FORMS: tuple[str, ...] = get_args(Form)

# Largest loss of cosine to our own embeddings that rounding to a precision may cost on the probe.
LEAST_COSINE = {"float32": 0.99999, "float16": 0.999, "bfloat16": 0.99}


class Exported(NamedTuple):
    """What was written, and the smaller cosine of the probe's embeddings there to ours; None for an adapter alone."""

    folder: Path
    cosine: float | None


def export_model(
    model: str,
    out: Path,
    *,
    to: Form = "sentence-transformers",
    layer: int | None = None,
    dimensions: int | None = None,
    dtype: Dtype = "float32",
    licence: str = "",
    scores: Scores | None = None,
    name: str = "",
) -> Exported:
    """Write `model` (a run, checkpoint or model name) to the new folder `out`.

    layer: cut the model there and embed from it, as `jobs/evaluate.py --layers` does.
    dimensions: cut embeddings to so many numbers, in sentence-transformers and vLLM, and in the card for transformers;
        the run must have been trained for it.

    Raises ValueError for a dual encoder, a model without an adapter where the adapter is asked for, dimensions that
    were not trained, and where the probe shows other embeddings than ours.
    """
    from vladva.models.adapter import ADAPTER_NOTE
    from vladva.models.dual_encoders import is_dual_encoder
    from vladva.models.embedder import load_lvlm
    from vladva.models.resolve import EXPORT_NOTE, describe, find_model, pin

    model = pin(model)
    reference = find_model(model)
    if is_dual_encoder(reference.checkpoint):
        raise ValueError(f"{model} is a dual encoder, which other tools load as it is; there is nothing to export")
    _, description = describe(model, adapter=True, dtype="float32", layer=layer)
    training, matryoshka = training_of(model)
    if dimensions is not None and dimensions not in matryoshka:
        trained = ", ".join(map(str, matryoshka)) or "none"
        raise ValueError(
            f"--dimensions is {dimensions}; the run was trained for embeddings cut to: {trained} (loss.matryoshka)"
        )
    if to == "adapter":
        if reference.adapter is None:
            raise ValueError(f"--to adapter: {model} has no adapter; export it as hf, sentence-transformers or vllm")
        if layer is not None:
            raise ValueError("--layers: an adapter alone cuts no model; export it as hf, sentence-transformers or vllm")
        with new_folder(out) as folder:
            for file in sorted(reference.adapter.iterdir()):
                (folder / file.name).write_bytes(file.read_bytes())
        return Exported(out, None)

    embedder = load_lvlm(model, layer=layer)
    probe = make_probe(embedder)
    preprocessor = embedder.preprocessor
    note = {
        "version": 1,
        "base_model": description["base_model"],
        "fingerprint": description["fingerprint"],
        "layer": description["layer"],
        "dimension": description["dimension"],
        "matryoshka": list(matryoshka),
        "probe": probe,
    }
    prompting = {
        "checkpoint": ".",
        "image_prompt": preprocessor.prompts["image"],
        "text_prompt": preprocessor.prompts["text"],
        "chat_template": preprocessor.tokenizer.chat_template,
    }
    with new_folder(out) as folder:
        write_merged_checkpoint(embedder, folder, dtype, matryoshka)
        write_sentence_transformers_files(folder, description["dimension"], dimensions)
        (folder / EXPORT_NOTE).write_text(json.dumps(note) + "\n")
        (folder / ADAPTER_NOTE).write_text(json.dumps(prompting, indent=2) + "\n")
        card = model_card(
            description,
            name=name or out.name,
            folder=out.name,
            dtype=dtype,
            training=training,
            matryoshka=matryoshka,
            dimensions=dimensions,
            licence=licence,
            scores=scores,
        )
        (folder / "README.md").write_text(card)
        cosine = check_probe(folder, probe)
        if cosine < LEAST_COSINE[dtype]:
            raise ValueError(
                f"the exported model embeds the probe with cosine {cosine:.5f} to ours, less than "
                f"{LEAST_COSINE[dtype]} for {dtype}; nothing was written"
            )
    return Exported(out, cosine)


def training_of(model: str) -> tuple[Training, tuple[int, ...]]:
    """How a run's checkpoint was trained, and the dimensions its embeddings may be cut to; nothing for other models."""
    from vladva.models.checkpoint import STATE

    run, separator, _ = model.rstrip("/").rpartition("/checkpoints/")
    config_uri = storage.join(run, "config.json")
    if not separator or not storage.exists(config_uri):
        return {}, ()
    config, state = storage.read_json(config_uri), storage.read_json(storage.join(model, STATE))
    training: Training = {
        "run": config["name"],
        "step": state["step"],
        "data": config["data"]["uri"],
        "data_fingerprint": state["data_fingerprint"],
        "loss": f"{config['loss']['contrastive']}, next token x {config['loss']['next_token_weight']}",
    }
    return training, tuple(config["loss"]["matryoshka"])


def push(folder: Path, repository: str, *, private: bool = True) -> str:
    """Upload an exported folder to the Hugging Face Hub (or what HF_ENDPOINT names); returns the commit's URL.

    Raises ValueError where the Hub refuses (no token, no such namespace) and where it cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Export by vladva: weights, templates, model card"
        )
    except HfHubHTTPError as error:
        raise ValueError(
            f"--push {repository}: the Hub refused ({str(error).splitlines()[0]}); log in with `hf auth login`"
        ) from error
    except (HTTPError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"--push {repository}: {api.endpoint} cannot be reached ({reason}); {folder} is kept"
        ) from error
    return str(commit.commit_url)
