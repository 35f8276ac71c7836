"""Embeds texts and images from an exported folder as the model card says, in a process that knows nothing of vladva.

    python export_worker.py FOLDER ITEMS.json OUT.npz

ITEMS: {"texts": [...], "images": [files]}. OUT: `transformers_texts`, `st_images` and so on, each [N, D].
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoImageProcessor, AutoModel, AutoProcessor


def main() -> None:
    folder, items_file, out = sys.argv[1:]
    with open(items_file) as file:
        items = json.load(file)
    images = [Image.open(path) for path in items["images"]]
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = AutoModel.from_pretrained(folder)

    def embed(part: dict[str, object]) -> np.ndarray:
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [part]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state
        return torch.nn.functional.normalize(hidden[0, -1].float(), dim=0).numpy()

    tool = SentenceTransformer(folder, device="cpu")
    tool[0].processor.image_processor = processor.image_processor
    np.savez(
        out,
        transformers_texts=np.stack([embed({"type": "text", "text": text}) for text in items["texts"]]),
        transformers_images=np.stack([embed({"type": "image", "image": image}) for image in images]),
        st_texts=tool.encode(items["texts"]),
        st_images=tool.encode(images),
    )
    assert not any(name.partition(".")[0] == "vladva" for name in sys.modules)


if __name__ == "__main__":
    main()
