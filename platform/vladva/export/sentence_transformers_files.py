"""The files beside a checkpoint that make it a model of sentence-transformers: what to call, how to pool, what to load.

`SentenceTransformer(folder).encode(texts or images)` turns every item into a message, which the chat template renders;
the embedding is the last token's hidden state, of unit norm.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
DENSE = "sentence_transformers.base.modules.dense.Dense"
NORMALIZE = "sentence_transformers.base.modules.normalize.Normalize"


def write_sentence_transformers_files(folder: Path, width: int, dimensions: int | None = None) -> None:
    """Write modules.json and what it names, for a checkpoint whose hidden states are `width` wide.

    Embeddings are pooled at the last token, whatever the side of the padding, cut to their first `dimensions` numbers
    where that is given, and normalised.
    """
    modules = [("", TRANSFORMER), ("1_Pooling", POOLING)]
    if dimensions is not None:
        modules.append(("2_Dense", DENSE))
    modules.append((f"{len(modules)}_Normalize", NORMALIZE))
    method = {"method": "forward", "method_output_name": "last_hidden_state"}
    files: dict[str, object] = {
        "modules.json": [
            {"idx": index, "name": str(index), "path": path, "type": module}
            for index, (path, module) in enumerate(modules)
        ],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": method, "image": method, "message": {**method, "format": "structured"}},
            "module_output_name": "token_embeddings",
            "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
            "unpad_inputs": False,  # positions on three axes (Qwen2-VL) do not survive it
        },
        "1_Pooling/config.json": {
            "embedding_dimension": width,
            "pooling_mode": "lasttoken",
            "include_prompt": True,
        },
        f"{modules[-1][0]}/config.json": {},  # git keeps no empty folder
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "__version__": {"transformers": version("transformers"), "pytorch": version("torch")},
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            "requirements": {"sentence-transformers": ">=6.0", "transformers": ">=5.0"},
        },
    }
    if dimensions is not None:
        files["2_Dense/config.json"] = {
            "in_features": width,
            "out_features": dimensions,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
    if dimensions is not None:  # sentence-transformers' own `truncate_dim` would cut after normalising
        import torch
        from safetensors.torch import save_file

        save_file({"linear.weight": torch.eye(dimensions, width)}, folder / "2_Dense/model.safetensors")
