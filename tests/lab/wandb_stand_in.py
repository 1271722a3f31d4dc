"""A stand-in for Weights & Biases' server, on a loopback port.

It stands in for the W&B cloud, the one part of tracking that is not ours and cannot be run here; the
client in the tests is the real `wandb` with its real service process. It answers the few requests of
`wandb.init`, `log` and `finish`, keeps what the client sent, and can die like a real server: all
connections cut, the port closed. Any other request gets a GraphQL error, as from a server that does not
know it. Never use it for anything but tests: it checks no key.
"""

import base64
import contextlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar


@dataclass
class ReceivedRun:
    """What the client sent of one run."""

    settings: dict[str, Any]
    """The variables of its first upsert: project, groupName, jobType, displayName, tags ..."""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    def column(self, key: str) -> list[Any]:
        """The values of one key, of the rows that have it."""
        return [row[key] for row in self.history if key in row]


class WandbStandIn(ThreadingHTTPServer):
    """The server; runs in a thread while entered."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs: dict[str, ReceivedRun] = {}
        self.artifacts: list[dict[str, Any]] = []
        """What was said of each: artifactCollectionName, artifactTypeName, metadata, runName, ..."""
        self.keys: set[str] = set()
        self.lock = threading.Lock()
        self._connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> "WandbStandIn":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.die()

    def die(self) -> None:
        """Closes the port and cuts every connection."""
        if self._thread.is_alive():
            self.shutdown()
            self._thread.join()
            self.server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.append(connection)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that `die` cut are no news."""

    # ---- GraphQL, by the name of the operation ----

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """The data for one operation, or None if it is unknown."""
        method = getattr(self, f"_answer_{operation}", None)
        return method(variables) if method else None

    def _answer_RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        bucket = None
        if run is not None:
            config = {key: {"value": value} for key, value in run.config.items()}
            bucket = {
                **{"id": "run", "name": variables["name"], "displayName": run.settings["displayName"]},
                **{"historyLineCount": len(run.history), "eventsLineCount": 0, "logLineCount": 0},
                **{"historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]])},
                **{"eventsTail": "[]", "summaryMetrics": json.dumps(run.summary)},
                **{"config": json.dumps(config), "tags": [], "notes": None},
                "wandbConfig": json.dumps({"t": {"value": {}}}),
            }
        return {"model": {**_project(variables["project"]), "bucket": bucket}}

    def _answer_UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        inserted = name not in self.runs
        run = self.runs.setdefault(name, ReceivedRun(variables))
        if variables.get("config"):
            run.config = {key: item["value"] for key, item in json.loads(variables["config"]).items()}
        if variables.get("summaryMetrics"):
            run.summary = json.loads(variables["summaryMetrics"])
        bucket = {
            **{"id": "run", "name": name, "displayName": run.settings["displayName"], "description": ""},
            **{"config": "{}", "sweepName": None, "historyLineCount": len(run.history)},
            "project": _project(run.settings["project"]),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _answer_CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["run"]
        files = [{"name": f, "uploadUrl": f"{self.url}/upload/{name}/{f}"} for f in variables["files"]]
        return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}

    def _answer_Viewer(self, variables: dict[str, Any]) -> dict[str, Any]:
        person = {"id": "user", "username": "tester", "entity": "tester", "name": "T", "email": "t@e.st"}
        nobody = {"edges": []}
        rest = {"admin": False, "deletedAt": None, "flags": "{}", "teams": nobody, "apiKeys": nobody}
        return {"viewer": {"__typename": "User", **person, **rest}}

    def _answer_CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Says that its files are here already: how they are uploaded is W&B's affair."""
        self.artifacts.append(variables["input"])
        sequence = {"id": "sequence", "latestArtifact": None}
        artifact = {"id": "artifact", "state": "COMMITTED", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    # ---- the stream of rows ----

    def receive(self, name: str, message: dict[str, Any]) -> None:
        """Takes one message of a run's file stream; rows are placed by their offset."""
        run = self.runs[name]
        for file, chunk in (message.get("files") or {}).items():
            rows = [json.loads(line) for line in chunk["content"]]
            if file == "wandb-history.jsonl":
                run.history[chunk["offset"] : chunk["offset"] + len(rows)] = rows
            elif file == "wandb-summary.json" and rows:
                run.summary = rows[-1]
        if message.get("complete"):
            run.exit_code = message.get("exitcode")


def _project(name: str) -> dict[str, Any]:
    return {"id": "project", "name": name, "entity": {"id": "entity", "name": "tester"}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbStandIn  # type: ignore[assignment]
    _STREAM: ClassVar = re.compile(r"/files/[^/]+/[^/]+/([^/]+)/file_stream")

    def do_POST(self) -> None:
        body = self._body()
        _, _, credentials = self.headers.get("Authorization", "").partition("Basic ")
        stream = self._STREAM.fullmatch(self.path)
        with self.server.lock:
            if credentials:
                self.server.keys.add(base64.b64decode(credentials).decode().removeprefix("api:"))
            if stream:
                self.server.receive(stream[1], json.loads(body))
                self._reply({})
            elif self.path == "/graphql":
                request = json.loads(body)
                name = request.get("operationName") or ""
                data = self.server.answer(name, request.get("variables") or {})
                errors = [{"message": f"the stand-in does not know {name!r}"}]
                self._reply({"errors": errors} if data is None else {"data": data})
            else:
                self._reply({}, 404)

    def do_PUT(self) -> None:
        _, _, run, file = self.path.partition("?")[0].split("/", 3)
        content = self._body()
        with self.server.lock:
            self.server.runs[run].files[file] = content
        self._reply({})

    def do_GET(self) -> None:
        self._reply({}, 404)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: tests read stderr."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _reply(self, value: Any, code: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
