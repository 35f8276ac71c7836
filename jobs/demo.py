#!/usr/bin/env python
"""The whole chain on this machine: a generative vision-language model becomes a retriever, and stays a generator.

Draws a corpus of images, trains an adapter on the tiny LVLM that ships with vladva, embeds and indexes the held-out
images, scores it against the untouched model, serves both modes over HTTP, and writes report.html. Run again, it goes
on where it was; what is complete is not done twice. The last line is one JSON object with every figure.

It runs as a module in the folder of the repository (`make demo`): serve/ is beside jobs/, not in the package.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vladva.config import RunConfig
from vladva.core.cli import user_errors

if TYPE_CHECKING:
    from vladva.evaluate.scores import Scores

PROMPTS = ("Give a detailed description of the image.", "Describe the image briefly.")
SCORES = {"scenes_retrieval": ("t2i_r1", "t2i_r10", "i2t_r1", "i2t_r10"), "scenes_compositionality": ()}
CAPTIONED = 4  # images captioned in the report


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--storage", type=Path, default=Path(".vladva"), help="folder for everything the demo makes")
    parser.add_argument("--train-images", type=int, default=20_000)
    parser.add_argument("--test-images", type=int, default=1_000)
    parser.add_argument("--negatives", type=int, default=250, help="hard negatives of each of the seven kinds")
    parser.add_argument("--steps", type=int, default=None, help="training steps; default: the recipe's")
    parser.add_argument("--port", type=int, default=8000, help="of the HTTP server, on 127.0.0.1")
    parser.add_argument("--keep-serving", action="store_true", help="serve until Ctrl-C instead of stopping")
    return parser.parse_args(arguments)


class Stages:
    """The demo's stages and their figures, in a file: what is complete is not done again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def run(self, name: str, title: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stage's figures, from the file or by doing the work."""
        from rich.console import Console

        console = Console(highlight=False)
        if name in self.done:
            console.print(f"[bold]{title}[/] complete, {self.done[name]['seconds']:.0f} s then")
            return self.done[name]
        console.print(f"[bold]{title}[/]")
        started = time.monotonic()
        figures = work()
        self.done[name] = {**figures, "seconds": round(time.monotonic() - started, 2)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.done, indent=2))
        return self.done[name]

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of each stage when it was done."""
        return {name: figures["seconds"] for name, figures in self.done.items()}


# ------------------------------------------------------------------------------------------------------------- stages


def make_scenes(uri: str, options: argparse.Namespace) -> dict[str, Any]:
    """Write the corpus, and scan its shards: training then reads single samples."""
    from vladva.core.progress import Progress
    from vladva.data.scan import scan
    from vladva.data.scenes.corpus import write_scenes
    from vladva.models.preprocessor import Preprocessor

    counts = {"train": options.train_images, "test": options.test_images, "negatives": options.negatives}
    with Progress("drawing", options.train_images + options.test_images) as progress:
        write_scenes(uri, **counts, progress=lambda _: progress.advance(1))
    count_tokens = Preprocessor("tiny").count_tokens
    for split in ("train", "test"):
        print(f"{split}: {scan(f'{uri}/{split}', count_tokens)}")
    return counts


def train_adapter(config: RunConfig) -> dict[str, Any]:
    """Train, and keep the last step's metrics."""
    from vladva.train.launch import train

    return train(config, tell=print)


def index_images(scenes: str, run: str) -> dict[str, Any]:
    """Embed the held-out images and their captions, and index the images."""
    from vladva.embed.corpus import open_corpus
    from vladva.embed.pipeline import encode
    from vladva.index.build import build_index
    from vladva.models.preprocessor import Preprocessor

    corpus = open_corpus(f"{scenes}/test", count_tokens=Preprocessor("tiny").count_tokens)
    table = encode(
        corpus.items,
        run,
        f"{run}/embeddings",
        read_images=corpus.read_images,
        corpus=corpus.uri,
        total=corpus.num_items,
    )
    index = build_index(f"{run}/embeddings", f"{run}/index", replace=True)
    return {"embedded": table.rows, "quarantined": table.quarantined, "indexed": index.num_rows}


def score(scenes: str, run: str, out: str, command: str) -> Scores:
    """Both benchmarks, for the untouched model and for the trained one."""
    from vladva.evaluate.scoring import evaluate, read_benchmarks

    models, tasks = {"zero-shot": "tiny", "trained": run}, read_benchmarks(list(SCORES), scenes)
    return evaluate(models, tasks, scenes, out, bootstrap=1000, command=command)


def check_adapter(run: str) -> dict[str, Any]:
    """Adapter off against the base model's logits, merged against unmerged embeddings, on held-out images."""
    import numpy as np
    import torch

    from vladva.data.scenes.corpus import held_out_scenes
    from vladva.data.scenes.scene import render
    from vladva.models.batch import as_tensors
    from vladva.models.embedder import load_lvlm

    held_out = list(held_out_scenes(64))
    images, texts = [render(scene) for scene, _, _ in held_out], [worded[0] for _, worded, _ in held_out]
    base, trained, merged = load_lvlm("tiny"), load_lvlm(run), load_lvlm(run, merge=True)
    tokens = as_tensors(base.preprocessor.images([image.size for image in images], texts), "cpu")
    inputs = base.model.inputs(tokens, as_tensors(base.preprocessor.pixels(images), "cpu"))
    with_adapter: Any = trained.model.lvlm
    with torch.inference_mode(), with_adapter.disable_adapter():
        off = (trained.model.base(**inputs).logits - base.model.base(**inputs).logits).abs().max().item()
    differences = [
        np.abs(merged.embed_images(images) - trained.embed_images(images)).max(),
        np.abs(merged.embed_texts(texts) - trained.embed_texts(texts)).max(),
    ]
    return {"adapter_off_max_diff": off, "merged_max_diff": float(max(differences))}


def serve_and_call(run: str, options: argparse.Namespace) -> dict[str, Any]:
    """Serve both modes, call the endpoints over HTTP, compare with the library."""
    import numpy as np

    from serve.app import start, stop
    from serve.config import ServeArgs
    from vladva.data.scenes.corpus import held_out_scenes
    from vladva.data.scenes.scene import png, render
    from vladva.models.embedder import load_embedder, load_lvlm

    url = start(ServeArgs(model=run, index=f"{run}/index", num_cpus=0.5), port=options.port)
    held_out = list(held_out_scenes(CAPTIONED))
    texts = [worded[0] for _, worded, _ in held_out]
    answer = post(f"{url}/v1/embeddings", {"input": texts})
    served = np.array([row["embedding"] for row in answer["data"]])
    offline = load_embedder(run, merge=True).embed_texts(texts)
    hits = [post(f"{url}/v1/search", {"query": text, "k": 5})["data"] for text in texts]

    names = [model["id"] for model in get(f"{url}/v1/models")["data"]]
    base = load_lvlm("tiny")
    captions: list[dict[str, Any]] = []
    for number, (scene, _, _) in enumerate(held_out):
        prompt = PROMPTS[number % len(PROMPTS)]
        image = png(render(scene))
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        written = {"base model": "".join(base.generate(messages, [render(scene)], max_tokens=96))}
        for label, name in zip(("served, adapter on", "served, adapter off"), names, strict=True):
            written[label] = caption(url, name, image, prompt)
        captions.append({"number": number, "prompt": prompt, "captions": written})
    if options.keep_serving:
        print(f"serving at {url} until Ctrl-C")
        while True:
            time.sleep(1)
    stop()
    same = all(c["captions"]["base model"] == c["captions"]["served, adapter off"] for c in captions)
    if not same:
        raise ValueError(f"the endpoint with the adapter off does not answer as the base model does: {captions}")
    return {
        "served_max_diff": float(np.abs(served - offline).max()),
        "search_first_hits": [hit[0]["id"] for hit in hits],
        "captions_equal_base_model": same,
        "captions": captions,
    }


def caption(url: str, model: str, image: bytes, prompt: str) -> str:
    """What the chat endpoint answers about an image."""
    data = "data:image/png;base64," + base64.b64encode(image).decode()
    content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": prompt}]
    body = {"model": model, "max_tokens": 96, "messages": [{"role": "user", "content": content}]}
    return post(f"{url}/v1/chat/completions", body)["choices"][0]["message"]["content"]


def post(url: str, body: dict[str, Any]) -> Any:
    """JSON in, JSON out."""
    return get(urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"}))


def get(request: str | urllib.request.Request) -> Any:
    """The JSON that a request answers with."""
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def write_demo_page(scenes: str, run: str, out: str, stages: Stages, command: str) -> str:
    """Write report.html."""
    from vladva.data.scenes.corpus import held_out_scenes
    from vladva.data.scenes.scene import png, render
    from vladva.evaluate.scoring import read_benchmarks
    from vladva.report.evaluation_page import CaptionComparison, write_report
    from vladva.report.html import Highlight
    from vladva.report.page_examples import grids_of, wrong_choices_of
    from vladva.train.tracking import read_metrics

    scores, served, figures = cast("Scores", stages.done["evaluate"]), stages.done["serve"], summary(stages)
    images = [png(render(scene)) for scene, _, _ in held_out_scenes(CAPTIONED)]
    tasks = read_benchmarks(list(SCORES), scenes)
    uri = f"{out}/report.html"
    write_report(
        uri,
        title="vladva demo: a generator becomes a retriever",
        command=command,
        scores=scores,
        metrics={"tiny": read_metrics(run)},
        grids=grids_of(scores, tasks, out, "trained"),
        wrong_choices=wrong_choices_of(scores, tasks, out, "trained"),
        captions=[CaptionComparison(images[c["number"]], c["prompt"], c["captions"]) for c in served["captions"]],
        timings=stages.seconds,
        highlights=[
            Highlight("Text to image R@1", f"{figures['t2i_r1']:.1%}", f"{figures['zero_shot_t2i_r1']:.1%} zero-shot"),
            Highlight("Image to text R@1", f"{figures['i2t_r1']:.1%}", f"{figures['zero_shot_i2t_r1']:.1%} zero-shot"),
            Highlight("Adapter off", f"{figures['adapter_off_max_diff']:g}", "largest difference to the base's logits"),
            Highlight("Training", f"{figures['train_s']:.0f} s", "on this machine"),
        ],
    )
    return uri


def summary(stages: Stages) -> dict[str, Any]:
    """Every figure of the demo, flat."""
    figures: dict[str, Any] = {}
    models = stages.done["evaluate"]["models"]
    for prefix, label in (("zero_shot_", "zero-shot"), ("", "trained")):
        for scores in models[label]["scores"].values():
            figures |= {prefix + name: round(value, 4) for name, value in scores.items()}
    for stage in ("check", "serve"):
        figures |= {k: v for k, v in stages.done[stage].items() if isinstance(v, float | bool) and k != "seconds"}
    figures |= {f"{name}_s": seconds for name, seconds in stages.seconds.items()}
    return figures | {"total_s": round(sum(stages.seconds.values()), 2)}


# --------------------------------------------------------------------------------------------------------------- main


def run_demo(options: argparse.Namespace) -> dict[str, Any]:
    """All stages, in order; prints the table."""
    from rich.console import Console

    from serve.app import check_port
    from vladva.core.ray_tasks import connect
    from vladva.recipes import tiny
    from vladva.report.tables import as_rich, score_tables

    storage = str(options.storage.resolve())
    scenes, out = f"{storage}/scenes", f"{storage}/demo"
    stages = Stages(Path(out) / "stages.json")
    if "serve" not in stages.done:
        check_port("127.0.0.1", options.port)  # now rather than after the training
    recipe = tiny()
    train = replace(recipe.train, steps=options.steps or recipe.train.steps)
    config = replace(recipe, storage=storage, data=replace(recipe.data, uri=f"{scenes}/train"), train=train)
    command = "python -m jobs.demo " + " ".join(sys.argv[1:])

    connect()
    stages.run("scenes", "1 of 7  drawing scenes", lambda: make_scenes(scenes, options))
    stages.run("train", f"2 of 7  training an adapter, {train.steps} steps", lambda: train_adapter(config))
    stages.run("index", "3 of 7  embedding and indexing held-out images", lambda: index_images(scenes, config.uri))
    scores = stages.run(
        "evaluate",
        "4 of 7  scoring, zero-shot and trained",
        lambda: dict(score(scenes, config.uri, out, command)),
    )
    stages.run("check", "5 of 7  adapter off, adapter merged", lambda: check_adapter(config.uri))
    stages.run("serve", "6 of 7  serving both modes over HTTP", lambda: serve_and_call(config.uri, options))
    written = stages.run(
        "report", "7 of 7  report", lambda: {"uri": write_demo_page(scenes, config.uri, out, stages, command)}
    )

    console = Console()
    for table in score_tables(cast("Scores", scores)):
        console.print(as_rich(table))
    console.print(f"report: {written['uri']}")
    return summary(stages)


def quieten() -> None:
    """The demo shows its own progress: libraries speak up for warnings only."""
    import logging

    from ray import serve  # noqa: F401  (sets its level when it is imported)

    logging.getLogger("ray.serve").setLevel(logging.WARNING)


@user_errors
def main() -> None:
    import ray

    options = parse(sys.argv[1:])
    if importlib.util.find_spec("serve") is None:
        raise ValueError("serve/ is not found: run `python -m jobs.demo` in the folder of the repository")
    quieten()
    try:
        figures = run_demo(options)
    finally:
        ray.shutdown()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
