"""A real S3 server on this machine, and a proxy that spoils its answers: what the storage tests run against.

with s3_server(tmp_path) as variables:          # the AWS_* variables that lead to it; a bucket "vladva" exists
    with faulty_proxy(variables["AWS_ENDPOINT_URL"]) as proxy:
        proxy.faults = iter(["503", "reset"])   # for the next requests; afterwards everything passes
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BUCKET = "vladva"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_DEFAULT_REGION": "us-east-1"}
READY_WITHIN = 60.0  # seconds


@contextmanager
def s3_server(folder: Path, address: str = "127.0.0.1") -> Iterator[dict[str, str]]:
    """Run SeaweedFS on `address` with its data below `folder`; gives the environment variables that lead to it."""
    config, data, log = folder / "s3.json", folder / "data", folder / "server.log"
    data.mkdir(parents=True)
    credentials = [{"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}]
    config.write_text(json.dumps({"identities": [{"name": "test", "credentials": credentials, "actions": ["Admin"]}]}))
    services = ("master.port", "volume.port", "filer.port", "s3.port")
    ports = free_ports(2 * len(services))
    command = [
        os.path.join(os.path.dirname(sys.executable), "weed"),
        *("server", "-filer", "-s3", f"-dir={data}", f"-s3.config={config}", f"-ip={address}", f"-ip.bind={address}"),
        *(f"-{name}={port}" for name, port in zip(services, ports, strict=False)),
        *(f"-{name}.grpc={port}" for name, port in zip(services, ports[len(services) :], strict=True)),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", "-master.telemetry=false"),
        *("-master.volumeSizeLimitMB=64", "-volume.max=100"),
    ]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            variables = KEYS | {"AWS_ENDPOINT_URL": f"http://{address}:{ports[3]}"}
            _create_bucket(variables, server, log)
            yield variables
        finally:
            server.kill()  # asked politely it takes 15 s, and what it holds is thrown away


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nothing listens."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _create_bucket(variables: dict[str, str], server: subprocess.Popen[bytes], log: Path) -> None:
    """Create the bucket; the server is ready when this succeeds."""
    from pyarrow import fs

    s3 = fs.S3FileSystem(
        access_key=variables["AWS_ACCESS_KEY_ID"],
        secret_key=variables["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=variables["AWS_ENDPOINT_URL"],
        region=variables["AWS_DEFAULT_REGION"],
        allow_bucket_creation=True,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
    )
    deadline = time.monotonic() + READY_WITHIN
    while True:
        try:
            s3.create_dir(BUCKET)
            with s3.open_output_stream(f"{BUCKET}/ready") as stream:
                stream.write(b"yes")
            s3.delete_file(f"{BUCKET}/ready")
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server did not start:\n{log.read_text()[-2000:]}") from None
            time.sleep(0.1)


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on to `backend` and spoils the answers as `faults` says, one item a request.

    "ok": as it is. "503": the backend is not asked. "reset": the connection is reset before an answer.
    "truncate": half of the body, then the connection ends. "short": half of the body, declared as if it were all.
    "stall": half of the body, then nothing for `stall` seconds.
    """

    daemon_threads = True

    def __init__(self, backend: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.backend = backend.removeprefix("http://")
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.faults: Iterator[str] = iter(())
        self.stall = 60.0
        self.requests: list[tuple[str, str | None, str]] = []  # (method, Range header, what was done to it)
        self.lock = threading.Lock()

    def next_fault(self, method: str, part: str | None) -> str:
        with self.lock:
            fault = next(self.faults, "ok")
            self.requests.append((method, part, fault))
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def do_GET(self) -> None:
        fault = self.server.next_fault(self.command, self.headers["Range"])
        body = self._read_body()
        if fault == "503":
            self._answer(503, [], b"")
        elif fault == "reset":
            self._reset()
        else:
            # The Host header is passed on as it came: the signature covers it.
            backend = http.client.HTTPConnection(self.server.backend)
            backend.request(self.command, self.path, body, dict(self.headers))
            response = backend.getresponse()
            self._spoil(fault, response.status, response.getheaders(), response.read())
            backend.close()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _read_body(self) -> bytes:
        """The body as it was sent, chunk frames included: http.client passes them on unchanged."""
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        frames = []
        size = -1
        while size != 0:
            line = self.rfile.readline()
            size = int(line.split(b";")[0], 16)
            frames += [line, self.rfile.read(size + 2)]
        return b"".join(frames)

    def _spoil(self, fault: str, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        half = body[: len(body) // 2]
        if fault == "short":
            self._answer(status, headers, half)
        elif fault in ("truncate", "stall") and body:
            self._answer(status, headers, half, declared=len(body))
            if fault == "stall":
                self.wfile.flush()
                time.sleep(self.server.stall)
            self.close_connection = True
        else:
            self._answer(status, headers, body)

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, declared: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = dict(headers).get("Content-Length", "0") if self.command == "HEAD" else str(declared or len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body)

    def _reset(self) -> None:
        # Closing with a linger time of zero sends a reset in place of a proper end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def finish(self) -> None:
        if self.connection.fileno() != -1:
            super().finish()

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def faulty_proxy(backend: str) -> Iterator[FaultyProxy]:
    """Run a FaultyProxy in front of the server at `backend` (an http:// URL)."""
    with FaultyProxy(backend) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
