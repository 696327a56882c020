"""A stand-in for Google Cloud Storage on this machine: as much of its JSON interface as TensorStore, gcsfs and
google-cloud-storage use. Objects lie in memory; a PUT is whole or absent, and nothing is renamed."""

import contextlib
import email
import json
import os
import re
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENVIRONMENT = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT")

NO_BUCKET = "no-such-bucket"


class Store(ThreadingHTTPServer):
    """Objects by bucket and name; ``uploads`` counts the writes of each."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[tuple[str, str], tuple[bytes, int]] = {}
        self.sessions: dict[str, tuple[str, str, bytearray]] = {}
        self.uploads: dict[str, int] = {}
        self.lock, self.generation = threading.Lock(), 0

    def handle_error(self, *args: Any) -> None:
        """Nothing: clients hang up on answers that they no longer need."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, bucket: str, name: str, data: bytes) -> dict[str, Any]:
        with self.lock:
            self.generation += 1
            self.objects[bucket, name] = data, self.generation
            self.uploads[name] = self.uploads.get(name, 0) + 1
            return self.about(bucket, name)

    def about(self, bucket: str, name: str) -> dict[str, Any]:
        data, generation = self.objects[bucket, name]
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "updated": "2026-11-30T00:00:00Z",
            "timeCreated": "2026-11-30T00:00:00Z",
        }

    def names(self, prefix: str = "") -> list[str]:
        """The objects below a prefix, of all buckets, as ``bucket/name``."""
        with self.lock:
            return sorted(path for path in (f"{b}/{n}" for b, n in self.objects) if path.startswith(prefix))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Store

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes | dict | None = None, **headers: str) -> None:
        data = json.dumps(body).encode() if isinstance(body, dict) else body or b""
        self.send_response(status)
        named = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        for name, value in {**named, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_one(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        data = self.body()
        path = re.sub("^/(download/)?storage/v1/", "/", url.path)
        if url.path.startswith("/upload/"):
            return self.upload(url.path, query, data)
        if url.path == "/batch/storage/v1":
            return self.batch(data)
        if copy := re.fullmatch("/b/([^/]+)/o/(.+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/(.+)", path):
            source, target = (tuple(map(urllib.parse.unquote, copy.groups()[i : i + 2])) for i in (0, 2))
            if source not in self.server.objects:
                return self.answer(404, {"error": {"code": 404}})
            resource = self.server.put(*target, self.server.objects[source][0])
            return self.answer(200, {"done": True, "resource": resource})
        if move := re.fullmatch("/b/([^/]+)/o/(.+)/moveTo/o/(.+)", path):
            bucket, source, target = map(urllib.parse.unquote, move.groups())
            with self.server.lock:
                data, _ = self.server.objects.pop((bucket, source), (None, 0))
            gone = {"error": {"code": 404}}
            return self.answer(404, gone) if data is None else self.answer(200, self.server.put(bucket, target, data))
        if found := re.fullmatch("/b/([^/]+)/o/(.+)", path):
            return self.object(*map(urllib.parse.unquote, found.groups()), query)
        if found := re.fullmatch("/b/([^/]+)/o/?", path):
            return self.list(found[1], query)
        if found := re.fullmatch("/b/([^/]+)", path):
            return self.answer(200, {"kind": "storage#bucket", "name": found[1], "id": found[1]})
        return self.answer(404, {"error": {"code": 404, "message": self.path}})

    do_GET = do_POST = do_PUT = do_DELETE = handle_one

    def unmet(self, bucket: str, name: str, query: dict[str, str]) -> bool:
        """Whether a condition on the object's generation does not hold."""
        wanted = query.get("ifGenerationMatch")
        there = self.server.objects.get((bucket, name), (b"", 0))[1]
        return wanted is not None and int(wanted) != there

    def object(self, bucket: str, name: str, query: dict[str, str]) -> None:
        there = self.server.objects.get((bucket, name))
        if there is None:
            return self.answer(404, {"error": {"code": 404, "message": f"No such object: {name}"}})
        if self.unmet(bucket, name, query):
            return self.answer(412, {"error": {"code": 412}})
        data, generation = there
        if self.command == "DELETE":
            with self.server.lock:
                self.server.objects.pop((bucket, name), None)
            return self.answer(204)
        if query.get("alt") != "media":
            return self.answer(200, self.server.about(bucket, name))
        if query.get("ifGenerationNotMatch") == str(generation):
            return self.answer(304)
        known = {"x_goog_generation": str(generation), "Content_Type": "application/octet-stream"}
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return self.answer(200, data, **known)
        first = int(span[1]) if span[1] else len(data) - int(span[2])
        last = min(int(span[2]) if span[1] and span[2] else len(data) - 1, len(data) - 1)
        if first >= len(data):
            return self.answer(416)
        return self.answer(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", **known)

    def list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        start, end = query.get("startOffset", ""), query.get("endOffset")
        items, prefixes = [], set()
        with self.server.lock:
            for b, name in sorted(self.server.objects):
                if b != bucket or not name.startswith(prefix) or name < start or (end and name >= end):
                    continue
                rest = name[len(prefix) :]
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest[: rest.index(delimiter) + 1])
                else:
                    items.append(self.server.about(bucket, name))
        self.answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def upload(self, path: str, query: dict[str, str], data: bytes) -> None:
        (bucket,) = re.fullmatch("/upload/storage/v1/b/([^/]+)/o", path).groups()  # type: ignore[union-attr]
        name, kind = query.get("name", ""), query.get("uploadType")
        if bucket == NO_BUCKET:
            return self.answer(404, {"error": {"code": 404, "message": "The specified bucket does not exist."}})
        if "upload_id" in query:
            return self.resume(query["upload_id"], data)
        if kind == "multipart":
            boundary = re.search('boundary="?([^";]+)"?', self.headers["Content-Type"])[1].encode()  # type: ignore[index]
            about, content = (part.lstrip(b"\r\n") for part in data.split(b"--" + boundary)[1:3])
            name = json.loads(re.split(b"\r?\n\r?\n", about, maxsplit=1)[1])["name"]
            data = re.split(b"\r?\n\r?\n", content, maxsplit=1)[1].removesuffix(b"\n").removesuffix(b"\r")
        if kind == "resumable":
            name = name or json.loads(data)["name"]
            session = str(len(self.server.sessions))
            self.server.sessions[session] = bucket, name, bytearray()
            return self.answer(200, Location=f"{self.server.url}{path}?uploadType=resumable&upload_id={session}")
        if self.unmet(bucket, name, query):
            return self.answer(412, {"error": {"code": 412}})
        return self.answer(200, self.server.put(bucket, name, data))

    def resume(self, session: str, data: bytes) -> None:
        bucket, name, held = self.server.sessions[session]
        held += data
        total = self.headers.get("Content-Range", "").rpartition("/")[2]
        if total in ("", "*"):
            return self.answer(308, Range=f"bytes=0-{len(held) - 1}")
        return self.answer(200, self.server.put(bucket, name, bytes(held)))

    def batch(self, data: bytes) -> None:
        """Deletions, several in a request."""
        boundary = re.search('boundary="?([^";]+)"?', self.headers["Content-Type"])[1]  # type: ignore[index]
        message = email.message_from_bytes(f"Content-Type: multipart/mixed; boundary={boundary}\n\n".encode() + data)
        answers = []
        for part in message.get_payload():  # type: ignore[union-attr]
            line = str(part.get_payload()).strip().splitlines()[0]  # type: ignore[union-attr]
            bucket, name = re.search("/b/([^/]+)/o/([^ ?]+)", line).groups()  # type: ignore[union-attr]
            with self.server.lock:
                gone = self.server.objects.pop((bucket, urllib.parse.unquote(name)), None)
            status = "HTTP/1.1 204 No Content" if gone else "HTTP/1.1 404 Not Found"
            answers.append(f"--parts\r\nContent-Type: application/http\r\n\r\n{status}\r\n\r\n{{}}\r\n")
        self.answer(200, "".join([*answers, "--parts--"]).encode(), Content_Type="multipart/mixed; boundary=parts")


@contextlib.contextmanager
def store() -> Iterator[Store]:
    """A store, which this process and its children find under ``gs://`` from now on."""
    server = Store()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ |= dict(zip(ENVIRONMENT, (server.url, server.url, "false"), strict=True))
    try:
        yield server
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        server.shutdown()
        server.server_close()
