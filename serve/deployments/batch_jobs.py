"""Batch jobs: OpenAI's batches of embedding requests, computed by the same job as `jobs/embed.py`.

Each batch has an actor of its own, which outlives the application. One that is killed is started again when somebody
next asks after the batch, and goes on with the embeddings table that it has written so far.
"""

import json
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from serve.config import ServeArgs
from serve.protocol.batch_files import FINAL, BatchFiles
from serve.protocol.bodies import json_value, parse_body
from serve.protocol.errors import INTERNAL, ApiError, Failure
from serve.protocol.items import EmbedItem, ItemOptions, Limits, as_list, parse_items
from serve.protocol.schema import EmbeddingRequest
from serve.protocol.vectors import embedding_object

logger = logging.getLogger("ray.serve")

ENDPOINT = "/v1/embeddings"
NAMESPACE = "vladva"
MAX_REQUESTS = 50_000  # OpenAI's limit


@dataclass
class BatchLine:
    """A line of the input file: what it asks for, and its items; or why it cannot be answered."""

    custom_id: str
    failure: Failure | None = None
    request: EmbeddingRequest | None = None
    items: list[EmbedItem | Failure] = field(default_factory=list)


class BatchJob:
    """One batch, as an actor."""

    def __init__(self, args: ServeArgs, name: str) -> None:
        assert args.batches is not None
        self.args, self.name = args, name
        self.files = BatchFiles(args.batches)
        self.dtype = args.dtype or "float32"

    def run(self) -> None:
        """Compute the batch, or go on with it."""
        batch = self.files.read(self.name, "batch")
        if batch["status"] in FINAL:
            return
        try:
            self.compute(batch)
        except ApiError as error:
            self.fail(error.failure)
        except Exception:  # tried again, it would fail again, for as long as somebody asks after it
            logger.exception("the batch %s cannot be computed", self.name)
            self.fail(INTERNAL)

    def fail(self, failure: Failure) -> None:
        """Say why there will be no result."""
        errors = {"object": "list", "data": [{"code": failure.code, "message": failure.body()["message"]}]}
        self.files.write_batch(self.files.read(self.name, "batch"), status="failed", errors=errors)

    def compute(self, batch: dict[str, Any]) -> None:
        """Read the input file, embed, and write the output files."""
        from vladva.models.dual_encoders import is_dual_encoder
        from vladva.models.resolve import describe, preprocessor_of

        config, description = describe(self.args.model, adapter=True, dtype=self.dtype)
        preprocessor = preprocessor_of(config)
        context: int = preprocessor.config.get_text_config().max_position_embeddings
        limits = self.args.limits.of_model(context, cuts=False, mixes=not is_dual_encoder(config.checkpoint))
        # Nobody waits, and nothing else does: a line may hold more than the replicas take on at a time.
        limits = replace(limits, all_characters=self.args.max_body_bytes)
        lines = parse_lines(self.files.read_file(batch["input_file_id"]), limits)
        for line in lines:
            line.items = [fitting(item, preprocessor, context) for item in line.items]
        counts = {"total": len(lines), "completed": 0, "failed": 0}
        batch = self.files.write_batch(batch, status="in_progress", request_counts=counts)
        vectors = self.embed(lines)
        batch = self.files.write_batch(batch, status="finalizing")
        answered: list[str] = []
        refused: list[str] = []
        for number, line in enumerate(lines):
            status, body = self.answer(number, line, vectors, description["fingerprint"], preprocessor)
            (refused if status >= 400 else answered).append(json.dumps(output_line(line.custom_id, status, body)))
        self.files.write_batch(
            batch,
            status="completed",
            output_file_id=self.output_file(answered, "output"),
            error_file_id=self.output_file(refused, "error"),
            request_counts={"total": len(lines), "completed": len(answered), "failed": len(refused)},
        )

    def output_file(self, lines: Sequence[str], name: str) -> str | None:
        """The id of a new file of these lines; none where there are none."""
        content = "".join(f"{line}\n" for line in lines).encode()
        return self.files.write_file(content, f"{self.name}_{name}.jsonl", "batch_output")["id"] if lines else None

    def embed(self, lines: Sequence[BatchLine]) -> dict[str, np.ndarray]:
        """Vectors [D] by item: its line's number, `#`, and its own. What cannot be embedded is not there."""
        import pyarrow as pa

        from vladva.embed.corpus import ITEM
        from vladva.embed.pipeline import encode
        from vladva.embed.table import embedding_matrix, read_embeddings

        rows = [
            {
                "id": f"{number}#{i}",
                "kind": kind_of(item),
                "text": item.text,
                "image": item.image,
                "instruction": item.instruction,
            }
            for number, line in enumerate(lines)
            for i, item in enumerate(line.items)
            if line.failure is None and isinstance(item, EmbedItem)
        ]
        if not rows:
            return {}
        schema = ITEM.append(pa.field("instruction", pa.string()))
        columns = {name: [row.get(name) for row in rows] for name in schema.names}
        items = ray.data.from_arrow(pa.table(columns, schema))
        table = self.files.place(self.name, "")
        try:
            encode(
                items,
                self.args.model,
                table,
                actors=self.args.batch_actors,
                dtype=self.dtype,
                cpus_per_actor=self.args.batch_cpus,
                gpus_per_actor=self.args.num_gpus or 0,
                max_bad_fraction=1.0,
            )
        except ValueError as error:
            if not str(error).startswith("nothing was embedded"):
                raise
            return {}
        found = read_embeddings(table)
        return dict(zip(found["id"].to_pylist(), embedding_matrix(found), strict=True))

    def answer(
        self, number: int, line: BatchLine, vectors: dict[str, np.ndarray], fingerprint: str, preprocessor: Any
    ) -> tuple[int, dict[str, Any]]:
        """(status, body) as /v1/embeddings would answer."""
        if line.failure is not None or line.request is None:
            failure = line.failure or INTERNAL
            return failure.status, {"error": failure.body()}
        bad = Failure(422, "the item cannot be embedded", "invalid_value")
        results = [
            item if isinstance(item, Failure) else vectors.get(f"{number}#{i}", bad.with_param(f"input[{i}]"))
            for i, item in enumerate(line.items)
        ]
        failures = [result for result in results if isinstance(result, Failure)]
        if failures and not line.request.partial:
            return failures[0].status, {"error": failures[0].body()}
        request = line.request
        data = [
            embedding_object(i, result, request.dimensions, request.dtype, request.encoding_format)
            for i, result in enumerate(results)
        ]
        tokens = sum(
            cost(item, preprocessor)
            for item, result in zip(line.items, results, strict=True)
            if isinstance(item, EmbedItem) and not isinstance(result, Failure)
        )
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        model = request.model or self.args.name or self.args.model
        return 200, {"object": "list", "model": model, "fingerprint": fingerprint, "data": data, "usage": usage}


def kind_of(item: EmbedItem) -> str:
    """What an item is, as the embedding job calls it."""
    from vladva.embed.batching import MIXED

    if item.image is None:
        return "text"
    return "image" if item.text is None else MIXED


def cost(item: EmbedItem, preprocessor: Any) -> int:
    """Tokens that an item takes. Raises ValueError for one that the model does not take."""
    size = None if item.image is None else item.size
    return len(preprocessor.item_prompt(item.text, size, item.instruction))


def fitting(item: EmbedItem | Failure, preprocessor: Any, context: int) -> EmbedItem | Failure:
    """The item, or a refusal where the model cannot take it."""
    if isinstance(item, Failure):
        return item
    try:
        tokens = cost(item, preprocessor)
    except ValueError as error:
        return Failure(422, str(error), "invalid_value")
    if tokens <= context:
        return item
    return Failure(422, f"the item takes {tokens:,} tokens; the model takes {context:,}", "context_length_exceeded")


def parse_lines(content: bytes, limits: Limits) -> list[BatchLine]:
    """The lines of an input file. Raises ApiError for a file without any, with too many, or with an id twice."""
    lines = [parse_line(one, number, limits) for number, one in enumerate(content.splitlines(), 1) if one.strip()]
    if not 1 <= len(lines) <= MAX_REQUESTS:
        raise ApiError(422, f"the file holds {len(lines):,} requests; send 1 to {MAX_REQUESTS:,}", "invalid_value")
    names = [line.custom_id for line in lines]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ApiError(422, f"the custom_id {twice!r} is there twice", "invalid_value")
    return lines


def parse_line(text: bytes, number: int, limits: Limits) -> BatchLine:
    """A line. Raises ApiError where it has no `custom_id` under which it could be answered."""
    try:
        sent = json_value(text)
    except ApiError as error:
        raise ApiError(422, f"line {number}: {error.failure.message}", "invalid_json") from None
    match sent:
        case {"custom_id": str(name), "body": dict(body), "url": str(url), **rest} if rest.get("method") == "POST":
            if url != ENDPOINT:
                return BatchLine(name, Failure(422, f"url: send {ENDPOINT}", "invalid_value", "url"))
        case _:
            message = f'line {number}: send {{"custom_id", "method": "POST", "url": "{ENDPOINT}", "body": {{...}}}}'
            raise ApiError(422, message, "invalid_value")
    try:
        request = parse_body(json.dumps(body).encode(), EmbeddingRequest)
        value, options = request.input, ItemOptions(request.modality, request.truncate, request.instruction)
        field_name = "input" if value is not None else "messages"
        items = parse_items(as_list(request.messages if value is None else value), field_name, limits, options)
    except ApiError as error:
        return BatchLine(name, error.failure)
    return BatchLine(name, request=request, items=items)


def output_line(custom_id: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    """A line of an output file."""
    response = {"status_code": status, "request_id": uuid.uuid4().hex, "body": body}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": None}


def ensure_running(args: ServeArgs, name: str) -> None:
    """Start the actor of a batch that is not done, where there is none."""
    actor: Any = ray.remote(num_cpus=0)(BatchJob)
    try:
        ray.get_actor(name, NAMESPACE)
    except ValueError:
        job = actor.options(name=name, namespace=NAMESPACE, lifetime="detached", get_if_exists=True).remote(args, name)
        job.run.remote()
        # After `run`, in the order of its calls: nothing is left of a batch that is done.
        job.__ray_terminate__.remote()


def stop_running(name: str) -> None:
    """End the actor of a batch, where there is one."""
    try:
        ray.kill(ray.get_actor(name, NAMESPACE))
    except (ValueError, RayError):
        return
