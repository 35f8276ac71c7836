#!/usr/bin/env python
"""How fast texts and images are embedded, beside transformers, sentence-transformers and the machine's products.

    pip install -c constraints.txt -e '.[bench]'
    tests/bench/embed.py                          throughput, and the whole job beside the bare forward
    tests/bench/embed.py --sizes 1000,10000,100000    time per item of the job with the tiny model

A random LLaVA of 186M parameters (random_llava.py) in bfloat16, two threads. Every contender has a process of its own,
makes its inputs from the same texts and images and embeds them; they take turns, three times, and medians count.

- `e5v`: transformers as E5-V and VLM2Vec call it: batches padded on the left, all hidden states kept, the LM head on.
- `sentence_transformers`: what `SentenceTransformer(checkpoint).encode` does with the same prompts, sent as messages.
- utilisation: operations of the plain model without the LM head (products of the layers for every token, causal
  attention; nothing less for what is left out) per second, over the rate of the best of four bfloat16 products, timed
  in the same turns: 4096 x 4096 x 4096, and this model's three widths with 4,096 rows.
- `job_efficiency`: seconds that the bare forward takes for texts and images that are preprocessed already, over what
  the job (shards to Parquet, one actor of two threads) takes for the same: reading, decoding, tokenising, handing over
  and writing, on the same two cores. It counts from the moment that the job's first batch is written, to the complete
  table; before that Ray and the model have to start, which takes `job_startup_s`, however many items there are.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import random_llava

THREADS, BATCH, TURNS = 2, 64, 3
PRODUCTS = [(4096, 4096, 4096), (4096, 576, 1536), (4096, 1536, 576), (4096, 576, 960)]  # rows, inputs, outputs
Embed = Callable[[list[Any]], np.ndarray]


# ------------------------------------------------------------------------------------------------------- contenders


def vladva(checkpoint: str) -> dict[str, Embed]:
    """What the batch job, evaluation and Serve call."""
    from vladva.models.embedder import load_embedder

    embedder = load_embedder(checkpoint, dtype="bfloat16")
    return {"text": embedder.embed_texts, "image": embedder.embed_images}


def e5v(checkpoint: str) -> dict[str, Embed]:
    """As E5-V's and VLM2Vec's own scripts call transformers, with vladva's prompts."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from vladva.config import IMAGE_PROMPT, TEXT_PROMPT

    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.tokenizer.padding_side = "left"

    @torch.inference_mode()
    def embed(items: list[Any], asked: Callable[[Any], dict[str, Any]]) -> np.ndarray:
        parts = []
        for first in range(0, len(items), BATCH):
            inputs = processor(**asked(items[first : first + BATCH]), padding=True, return_tensors="pt")
            inputs = {name: value for name, value in inputs.items() if name != "token_type_ids"}
            hidden = model(**inputs, output_hidden_states=True).hidden_states[-1][:, -1]
            parts.append(torch.nn.functional.normalize(hidden.float(), dim=-1).numpy())
        return np.concatenate(parts)

    def prompt(content: list[dict[str, str]]) -> str:
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def of_texts(texts: list[str]) -> dict[str, Any]:
        return {"text": [prompt([{"type": "text", "text": f"{text}\n{TEXT_PROMPT}"}]) for text in texts]}

    def of_images(images: list[Any]) -> dict[str, Any]:
        return {
            "images": images,
            "text": [prompt([{"type": "image"}, {"type": "text", "text": IMAGE_PROMPT}])] * len(images),
        }

    return {"text": lambda texts: embed(texts, of_texts), "image": lambda images: embed(images, of_images)}


def sentence_transformers(checkpoint: str) -> dict[str, Embed]:
    """As its documentation has it; with vladva's prompts, as messages, so that it embeds as many tokens (less one)."""
    from sentence_transformers import SentenceTransformer

    from vladva.config import IMAGE_PROMPT, TEXT_PROMPT

    model = SentenceTransformer(checkpoint, device="cpu", model_kwargs={"dtype": "bfloat16"})

    def embed(messages: list[list[dict[str, Any]]]) -> np.ndarray:
        return model.encode([[{"role": "user", "content": content}] for content in messages], batch_size=BATCH)

    def of_texts(texts: list[str]) -> np.ndarray:
        return embed([[{"type": "text", "text": f"{text}\n{TEXT_PROMPT}"}] for text in texts])

    def of_images(images: list[Any]) -> np.ndarray:
        return embed([[{"type": "image", "image": image}, {"type": "text", "text": IMAGE_PROMPT}] for image in images])

    return {"text": of_texts, "image": of_images}


CONTENDERS = {"vladva": vladva, "e5v": e5v, "sentence_transformers": sentence_transformers}


def product_rate() -> float:
    """Operations per second of bfloat16 products: the best shape."""
    import torch

    rates = []
    with torch.inference_mode():
        for rows, inputs, outputs in PRODUCTS:
            x, weight = (torch.randn(n, inputs, dtype=torch.bfloat16) for n in (rows, outputs))
            seconds = []
            for _ in range(7):
                began = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                seconds.append(time.perf_counter() - began)
            rates.append(2 * rows * inputs * outputs / median(seconds[1:]))
    return max(rates)


def contend(name: str, checkpoint: str, pipe: Connection) -> None:
    """A contender's process: answers (kind, items) with embeddings and seconds, and "rate" with the products' rate."""
    import torch

    torch.set_num_threads(THREADS)
    embed = CONTENDERS[name](checkpoint)
    pipe.send("ready")
    while (order := pipe.recv()) != "end":
        if order == "rate":
            pipe.send(product_rate())
            continue
        kind, items = order
        began = time.perf_counter()
        embeddings = embed[kind](items)
        pipe.send((embeddings, time.perf_counter() - began))


def ask(pipe: Connection, order: Any) -> Any:
    """One order, answered."""
    pipe.send(order)
    return pipe.recv()


def turns(checkpoint: str, names: list[str], items: dict[str, list[Any]]) -> dict[str, Any]:
    """Items per second of each contender and kind, and the rate of products: medians over the turns."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name in names:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=contend, args=(name, checkpoint, theirs), daemon=True))
        processes[-1].start()
        pipes[name].recv()
    seconds: dict[tuple[str, str], list[float]] = {}
    found, rates = {}, []
    for turn in range(TURNS + 1):  # the first warms up
        rates.append(ask(pipes["vladva"], "rate"))
        for (kind, some), name in product(items.items(), names):
            found[name, kind], taken = ask(pipes[name], (kind, some))
            seconds.setdefault((name, kind), []).append(taken)
            print(
                f"turn {turn}  {name:22} {kind:5} {len(some) / taken:7.1f}/s  load {os.getloadavg()[0]:.1f}", flush=True
            )
    for name, process in zip(names, processes, strict=True):
        pipes[name].send("end")
        process.join()
    for kind in items:
        cosines = (found["vladva", kind] * found["e5v", kind]).sum(1) if "e5v" in names else np.ones(1)
        assert cosines.min() > 0.99, f"{kind}: other embeddings than transformers', cosine {cosines.min():.4f}"
    speeds = {key: len(items[key[1]]) / median(values[1:]) for key, values in seconds.items()}
    return {"speeds": speeds, "rate": median(rates[1:])}


# ------------------------------------------------------------------------------------------------------- operations


def operations(checkpoint: str, items: dict[str, list[Any]]) -> dict[str, float]:
    """Operations of the plain model without LM head, per item on average."""
    import torch
    from transformers import AutoConfig, AutoModel

    from vladva.models.preprocessor import Preprocessor

    config = AutoConfig.from_pretrained(checkpoint)
    preprocessor = Preprocessor(checkpoint)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    text, vision = config.text_config, config.vision_config

    def weights(module: torch.nn.Module) -> int:
        return sum(p.numel() for name, p in module.named_parameters() if p.ndim > 1 and "embed" not in name)

    def decoder(tokens: int) -> float:  # causal: half of the scores
        attention = 2 * tokens**2 * text.num_attention_heads * text.head_dim * text.num_hidden_layers
        return 2.0 * tokens * weights(model.language_model) + attention

    patches = (vision.image_size // vision.patch_size) ** 2
    tower = 2 * (patches + 1) * weights(model.vision_tower) + 4 * (patches + 1) ** 2 * vision.hidden_size * (
        vision.num_hidden_layers
    )
    tower += 2 * patches * (3 * vision.patch_size**2 * vision.hidden_size + weights(model.multi_modal_projector))
    lengths = [len(preprocessor.text_prompt(one)) for one in items["text"]]
    prompts = [len(preprocessor.image_prompt(one.size)) for one in items["image"]]
    return {
        "text": float(np.mean([decoder(n) for n in lengths])),
        "image": float(np.mean([tower + decoder(n) for n in prompts])),
    }


# --------------------------------------------------------------------------------------------------------- the job


def job(model: str, data: str, out: str, kinds: list[str], dtype: str) -> dict[str, Any]:
    """Seconds of the job after its first batch, and items of each kind embedded in them, by the times of its writes."""
    import ray

    # Ray's processes are nice by 15 to whatever else the machine does, the bare forward is not.
    os.environ |= {"RAY_worker_niceness": "0"}

    from vladva.embed.corpus import open_corpus
    from vladva.embed.pipeline import encode
    from vladva.embed.table_writer import TableWriter
    from vladva.models.preprocessor import Preprocessor

    written: list[tuple[float, Counter[str]]] = []
    commit = TableWriter.commit

    def note(table: TableWriter) -> Any:
        import pyarrow.parquet as pq

        parts = Path(out, "_parts").rglob("*.parquet")
        kinds = ((part.stat().st_mtime, pq.read_table(part, columns=["kind"])["kind"].to_pylist()) for part in parts)
        written.extend((when, Counter(some)) for when, some in kinds)
        began = time.time()
        result = commit(table)
        last = max(when for when, _ in written)
        written.append((last + time.time() - began, Counter()))  # what completing the table takes
        return result

    TableWriter.commit = note  # type: ignore[method-assign]
    started = time.time()
    ray.init("local", num_cpus=THREADS + 1, include_dashboard=False, logging_level="ERROR")
    corpus = open_corpus(data, kinds, count_tokens=Preprocessor(model).count_tokens)
    encode(
        corpus.items,
        model,
        out,
        actors=1,
        cpus_per_actor=THREADS,
        dtype=dtype,
        batch_size=BATCH,
        read_images=corpus.read_images,
        corpus=corpus.uri,
        total=corpus.num_items,
    )
    ray.shutdown()
    TableWriter.commit = commit  # type: ignore[method-assign]
    (first, _), *others = sorted(written, key=lambda one: one[0])
    return {
        "startup_s": first - started,
        "seconds": others[-1][0] - first,
        "items": sum((items for _, items in others), Counter()),
    }


def write_shards(folder: Path, count: int) -> tuple[list[str], list[Any]]:
    """A shard of images with two captions each, which are returned."""
    import io
    import tarfile

    folder.mkdir()
    images = random_llava.images(count, seed=1)
    texts = [f"{i} {text}" for i, text in enumerate(random_llava.texts(2 * count, seed=1))]
    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        for i, image in enumerate(images):
            body = io.BytesIO()
            image.save(body, "JPEG")
            captions = json.dumps({"captions": texts[2 * i : 2 * i + 2]}).encode()
            for name, data in ((f"{i:06d}.jpg", body.getvalue()), (f"{i:06d}.json", captions)):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return texts, images


def job_efficiency(checkpoint: str, folder: Path, count: int) -> dict[str, float]:
    """The bare forward's seconds over the job's, for the same items; and seconds until the job's first batch."""
    texts, images = write_shards(folder / "shards", count)
    done = job(checkpoint, str(folder / "shards"), str(folder / "table"), ["image", "text"], "bfloat16")
    import torch

    from vladva.models.batch import Pixels, as_tensors, cut
    from vladva.models.embedder import load_embedder

    torch.set_num_threads(THREADS)
    embedder = load_embedder(checkpoint, dtype="bfloat16")
    preprocessor = embedder.preprocessor
    batches: dict[str, list[Any]] = {"text": [], "image": []}
    for kind, items, prompts in (
        ("text", None, [preprocessor.text_prompt(text) for text in texts]),
        ("image", images, [preprocessor.image_prompt(image.size) for image in images]),
    ):
        for chosen in cut([len(prompt) for prompt in prompts], BATCH):
            tokens = as_tensors(preprocessor.pad([(prompts[i], []) for i in chosen]), "cpu")
            pixels = items and as_tensors(Pixels.concatenate([preprocessor.pixels([items[i]]) for i in chosen]), "cpu")
            batches[kind].append((tokens, pixels))
    bare = 0.0
    with torch.inference_mode():
        for kind, number in (("text", len(texts)), ("image", len(images))):
            embedder.forward(*batches[kind][0])
            seconds = []
            for _ in range(TURNS):
                began = time.perf_counter()
                for batch in batches[kind]:
                    embedder.forward(*batch)
                seconds.append(time.perf_counter() - began)
            bare += median(seconds) * done["items"][kind] / number
    print(f"job {done['seconds']:.1f} s for {done['items']}, bare forward {bare:.1f} s; load {os.getloadavg()[0]:.1f}")
    return {"job_efficiency": bare / done["seconds"], "job_startup_s": done["startup_s"]}


def growth(sizes: list[int], folder: Path) -> dict[str, float]:
    """Milliseconds per item of the job with the tiny model, by number of items."""
    found = {}
    for size in sizes:
        corpus = folder / f"{size}.txt"
        words = random_llava.texts(size, seed=size)
        corpus.write_text("\n".join(f"{i} {text}" for i, text in enumerate(words)))
        done = job("tiny", str(corpus), str(folder / f"table-{size}"), ["text"], "float32")
        found[str(size)] = 1000 * done["seconds"] / done["items"].total()
        print(f"{size} items: {found[str(size)]:.3f} ms each, load {os.getloadavg()[0]:.1f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", help="numbers of items, by which the job's time per item is measured")
    parser.add_argument("--job-items", type=int, default=320, help="images, and twice as many texts, of the job")
    parser.add_argument("--skip-job", action="store_true", help="throughput alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.sizes:
            found = growth([int(size) for size in options.sizes.split(",")], folder)
            print(json.dumps({"ms_per_item": {size: round(value, 4) for size, value in found.items()}}))
            return
        checkpoint = random_llava.build_random_llava(folder / "llava")
        items = {"text": random_llava.texts(), "image": random_llava.images()}
        measured = turns(checkpoint, list(CONTENDERS), items)
        speeds, needed = measured["speeds"], operations(checkpoint, items)
        figures: dict[str, float] = {"bf16_gflops": measured["rate"] / 1e9}
        for kind in items:
            figures |= {f"{kind}s_per_s_{name}": speeds[name, kind] for name in CONTENDERS}
            for other in ("e5v", "sentence_transformers"):
                figures[f"{kind}s_vs_{other}"] = speeds["vladva", kind] / speeds[other, kind]
            figures[f"{kind}s_utilisation"] = speeds["vladva", kind] * needed[kind] / measured["rate"]
        if not options.skip_job:
            figures |= job_efficiency(checkpoint, folder, options.job_items)
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
