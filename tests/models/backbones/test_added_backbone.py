"""A family is one file: that of the site's page is added to a copy of the library; it embeds, trains and generates."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vladva
from tests.support.site_pages import file_of_page
from vladva.models.backbones import find_backbone

ROOT = Path(__file__).parents[3]
PAGE, FILE = "extend/backbone.md", "platform/vladva/models/backbones/vipllava.py"
SHOW = """
import json, sys
from pathlib import Path
import numpy as np, torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration
from tests.support.families import CLIP, CLIP_IMAGES, LLAVA_CHAT, TEXT, tokenizer_of, write
from vladva.config import ModelConfig
from vladva.models.adapter import add_adapter
from vladva.models.backbones import backbone_families, find_backbone
from vladva.models.embedder import load_lvlm
from vladva.models.embedding_model import EmbeddingModel
from vladva.models.preprocessor import Preprocessor

torch.manual_seed(0)
tokenizer = tokenizer_of(["<s>", "</s>", "<pad>", "<image>"], "</s>", "<pad>", "<s>", LLAVA_CHAT)
config = VipLlavaConfig(
    vision_config=CLIPVisionConfig(**CLIP), text_config=LlamaConfig(**TEXT, vocab_size=448),
    image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layers=[-1, -2], image_seq_length=16,
)
images = {"image_processor_type": "CLIPImageProcessor", **CLIP_IMAGES}
lvlm = VipLlavaForConditionalGeneration(config)
folder = write(Path(sys.argv[1]), lvlm, tokenizer, images, {"processor_class": "LlavaProcessor"})
embedder = load_lvlm(folder)
image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
ask = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
model = EmbeddingModel(ModelConfig(checkpoint=folder, lora_rank=2), Preprocessor(folder, soft_prompts=True))
model.requires_grad_(False)
add_adapter(model, ModelConfig(checkpoint=folder, lora_rank=2))
vectors = np.concatenate([embedder.embed_texts(["a dog"]), embedder.embed_images([image])])
print(json.dumps({
    "known": "vipllava" in backbone_families(), "vectors": (vectors @ vectors.T).tolist(),
    "answer": "".join(embedder.generate(ask, [image], max_tokens=4)),
    "trained": sum("lora_A" in name for name, p in model.named_parameters() if p.requires_grad),
    "frozen": find_backbone("vipllava").__dataclass_params__.frozen,
}))
"""


@pytest.mark.slow
def test_a_backbone_is_one_file_of_a_few_lines(tmp_path: Path) -> None:
    package = tmp_path / "tree/vladva"
    ignored = shutil.ignore_patterns("__pycache__", "weights")
    shutil.copytree(Path(vladva.__file__).parent, package, ignore=ignored)
    (package / "models/backbones/vipllava.py").write_text(file_of_page(PAGE, FILE))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'tree'}:{ROOT}"}
    command = [sys.executable, "-c", SHOW, str(tmp_path / "checkpoint")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["known"]
    assert found["frozen"]
    assert found["answer"]
    assert found["trained"] == 7 * 3  # LoRA on every linear layer of the language model
    (text, cosine), (_, image) = found["vectors"]
    assert abs(text - 1) < 1e-5
    assert abs(image - 1) < 1e-5
    assert abs(cosine) < 0.999
    # Without the file, the family is refused, with those that there are.
    with pytest.raises(ValueError, match="no backbone for 'vipllava' models; vladva has llava, llava_next, qwen2_5_vl"):
        find_backbone("vipllava")
