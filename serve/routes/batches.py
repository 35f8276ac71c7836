"""Batches: OpenAI's files and batches, /v1/files and /v1/batches, where the application has batches=FOLDER."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Response, UploadFile

from serve.deployments.batch_jobs import ENDPOINT, ensure_running, stop_running
from serve.deployments.client import Backend
from serve.protocol.batch_files import FINAL, BatchFiles, Kind, new_batch
from serve.protocol.errors import ApiError
from serve.protocol.json_route import json_router
from serve.protocol.schema import BatchRequest


def routes(backend: Backend) -> APIRouter:
    """The routes of files and of batches."""
    router = json_router()
    add_files(router, backend)
    add_batches(router, backend)
    return router


def kept(backend: Backend) -> BatchFiles:
    """Files and batches. Raises ApiError where none are kept."""
    if backend.args.batches is None:
        raise ApiError(404, "no batches are computed here; start the application with batches=FOLDER", "not_found")
    return BatchFiles(backend.args.batches)


def add_files(router: APIRouter, backend: Backend) -> None:
    """The routes of files."""

    @router.post("/v1/files")
    async def upload(file: Annotated[UploadFile, File()], purpose: Annotated[str, Form()] = "batch") -> dict[str, Any]:
        if purpose != "batch":
            raise ApiError(422, "purpose: files are for batches here; send batch", "invalid_value", "purpose")
        name = (file.filename or "batch.jsonl")[:200]
        return await asyncio.to_thread(kept(backend).write_file, await file.read(), name, purpose)

    @router.get("/v1/files")
    async def files() -> dict[str, Any]:
        return await listed(kept(backend), "file")

    @router.get("/v1/files/{name}")
    async def about(name: str) -> dict[str, Any]:
        return await asyncio.to_thread(kept(backend).read, name, "file")

    @router.get("/v1/files/{name}/content")
    async def content(name: str) -> Response:
        return Response(await asyncio.to_thread(kept(backend).read_file, name), media_type="application/jsonl")

    @router.delete("/v1/files/{name}")
    async def delete(name: str) -> dict[str, Any]:
        await asyncio.to_thread(kept(backend).delete_file, name)
        return {"id": name, "object": "file", "deleted": True}


def add_batches(router: APIRouter, backend: Backend) -> None:
    """The routes of batches."""

    @router.post("/v1/batches")
    async def create(body: BatchRequest) -> dict[str, Any]:
        files = kept(backend)
        if body.endpoint != ENDPOINT:
            raise ApiError(422, f"endpoint: send {ENDPOINT}", "invalid_value", "endpoint")
        await asyncio.to_thread(files.read, body.input_file_id, "file")
        batch = new_batch(
            files.new_id("batch"), body.input_file_id, body.endpoint, body.completion_window, body.metadata
        )
        batch = await asyncio.to_thread(files.write_batch, batch)
        await asyncio.to_thread(ensure_running, backend.args, batch["id"])
        return batch

    @router.get("/v1/batches")
    async def batches() -> dict[str, Any]:
        return await listed(kept(backend), "batch")

    @router.get("/v1/batches/{name}")
    async def about(name: str) -> dict[str, Any]:
        batch = await asyncio.to_thread(kept(backend).read, name, "batch")
        if batch["status"] not in FINAL:  # the cluster may have been another one when it began
            await asyncio.to_thread(ensure_running, backend.args, name)
        return batch

    @router.post("/v1/batches/{name}/cancel")
    async def cancel(name: str) -> dict[str, Any]:
        files = kept(backend)
        batch = await asyncio.to_thread(files.read, name, "batch")
        if batch["status"] in FINAL:
            raise ApiError(409, f"the batch is {batch['status']}", "batch_is_done")
        await asyncio.to_thread(stop_running, name)
        batch = await asyncio.to_thread(files.read, name, "batch")
        if batch["status"] in FINAL:  # it was done just before it was stopped
            return batch
        return await asyncio.to_thread(lambda: files.write_batch(batch, status="cancelled"))


async def listed(files: BatchFiles, kind: Kind) -> dict[str, Any]:
    """OpenAI's list of all files or batches."""
    data = await asyncio.to_thread(files.listing, kind)
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": False, **ends}
