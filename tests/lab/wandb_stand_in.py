"""A stand-in for Weights & Biases' server, on a loopback port.

It stands in for the W&B cloud, the one part of tracking that is not ours and cannot be run here; the
client in the tests is the real `wandb` with its real service process. It answers the requests of
`wandb.init` (new and resumed), `log`, `finish`, artifacts and `wandb sync`, of `wandb.Api` (runs with
filters and order, history, files) and of wandb-workspaces (reports and saved views), and keeps what the
client sent. Any other request gets a GraphQL error, as from a server that does not know it. It can be ill
like a real server: see `WandbStandIn`. Never use it for anything but tests: it checks no key, and where the
real server's behaviour is not documented (rows sent twice, delays) it is only the simplest one possible.
"""

import base64
import contextlib
import json
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar

ENTITY = "tester"
HISTORY = "wandb-history.jsonl"
MANIFEST = "wandb_manifest.json"


@dataclass
class ReceivedRun:
    """What the client sent of one run."""

    name: str
    """W&B's name for its id."""
    settings: dict[str, Any]
    """The variables of its upserts, the newest of each: project, groupName, jobType, displayName, tags ..."""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None
    state: str = "running"
    created: float = field(default_factory=time.time)

    def column(self, key: str) -> list[Any]:
        """The values of one key, of the rows that have it."""
        return [row[key] for row in self.history if key in row]

    def get(self, path: str) -> Any:
        """What a filter such as `config.agent.lr` or `displayName` means; None if the run has none."""
        first, *rest = (part for part in path.split(".") if part != "value")  # W&B ignores it, too
        value: Any = {
            **{"name": self.name, "state": self.state, "created_at": self.created, "username": ENTITY},
            **{"config": self.config, "summary_metrics": self.summary, "tags": self.settings.get("tags")},
            **{"display_name": self.settings.get("displayName"), "group": self.settings.get("groupName")},
            **{"jobType": self.settings.get("jobType"), "sweep": self.settings.get("sweep")},
        }.get(first)
        for key in rest:
            value = value.get(key) if isinstance(value, dict) else None
        return value


@dataclass
class ReceivedArtifact:
    """A version of an artifact."""

    id: str
    mark: tuple[str, str, str]
    """Project, collection and digest."""
    about: dict[str, Any] = field(default_factory=dict)
    """What was said of it: artifactCollectionName, artifactTypeName, metadata, runName, ..."""
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False

    def node(self) -> dict[str, Any]:
        """As GraphQL has it."""
        project, name, digest = self.mark
        sequence = {"__typename": "ArtifactSequence", "name": name, "project": _project(project)}
        return {
            **{"__typename": "Artifact", "id": self.id, "artifactSequence": sequence, "versionIndex": 0},
            **{"artifactType": {"name": self.about["artifactTypeName"]}, "description": None},
            **{"metadata": self.about["metadata"], "ttlDurationSeconds": -2, "ttlIsInherited": True},
            **{"tags": [], "historyStep": None, "state": "COMMITTED", "size": 0, "digest": digest},
            **{"commitHash": None, "fileCount": len(self.files), "createdAt": _date(0), "updatedAt": None},
            "aliases": [],
        }


class WandbStandIn(ThreadingHTTPServer):
    """The server; runs in a thread while entered.

    Its illnesses, which may be changed at any time:

    die()               all connections are cut, the port is closed
    die_after_rows = n     the same, in the middle of the request that brings row n + 1 of all runs
    silent = True          it takes connections and never answers
    silent_after_rows = n  the same from the request on that brings row n + 1 of all runs
    drops_rows = True      it answers as if it had stored the rows, but has not
    errors = n             the next n requests are answered with status 500
    delay = seconds        every answer takes so long, as over a network
    hides_rows = n         the last n rows of a run are counted, but not shown (a real server takes a while)
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs: dict[str, ReceivedRun] = {}
        self.artifacts: list[ReceivedArtifact] = []
        self.aliases: dict[tuple[str, str], ReceivedArtifact] = {}
        """By project and name:alias."""
        self.uses: list[tuple[str, str]] = []
        """Runs, and the ids of the artifacts they started from."""
        self.views: dict[str, dict[str, Any]] = {}
        """Reports and saved views by id: type, displayName, spec, projectName, ..."""
        self.keys: set[str] = set()
        self.unknown: set[str] = set()
        """The operations it was asked for and does not know."""
        self.refused: set[str] = set()
        """Operations that the key is not allowed."""
        self.die_after_rows: int | None = None
        self.silent_after_rows: int | None = None
        self.drops_rows = False
        self.errors = 0
        self.silent = False
        self.hides_rows = 0
        self.delay = 0.0
        self.lock = threading.Lock()
        self._rows = 0
        self._dead = threading.Event()
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
        self._dead.set()
        if self._thread.is_alive():
            self.shutdown()
            self._thread.join()
            self.server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def falls_ill(self) -> bool:
        """Whether a request is to be answered with an error; never returns while the server is silent."""
        if self.silent:
            self._dead.wait()
        time.sleep(self.delay)
        self.errors -= (ill := self.errors > 0)
        return ill

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.append(connection)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that `die` cut are no news."""

    # ---- GraphQL, by the name of the operation; clients ignore what they did not ask for ----

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """The data for one operation, or None if it is unknown."""
        method = getattr(self, f"_answer_{operation}", None)
        if method is None:
            self.unknown.add(operation)
            return None
        return method(variables)

    def _answer_Viewer(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": _PERSON}

    _answer_GetViewer = _answer_GetDefaultEntity = _answer_Viewer

    def _answer_ServerFeaturesQuery(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    # -- what a running client asks --

    def _answer_RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        bucket = None
        if run is not None:
            bucket = {
                **self._run(run),
                **{"eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]"},
                "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
                "wandbConfig": json.dumps({"t": {"value": {}}}),
            }
        return {"model": {**_project(variables["project"]), "bucket": bucket}}

    def _answer_UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        inserted = name not in self.runs
        run = self.runs.setdefault(name, ReceivedRun(name, variables))
        run.settings |= {key: value for key, value in variables.items() if value is not None}
        if variables.get("config"):
            run.config = {key: item["value"] for key, item in json.loads(variables["config"]).items()}
        if variables.get("summaryMetrics"):
            run.summary = json.loads(variables["summaryMetrics"])
        run.state = variables.get("state") or "running"
        bucket = {**self._run(run), "project": _project(run.settings["project"])}
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _answer_CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["run"]
        files = [{"name": file, "uploadUrl": self._file_url(name, file)} for file in variables["files"]]
        return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}

    def _answer_CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        about = variables["input"]
        mark = (about["projectName"], about["artifactCollectionName"], about["digest"])
        artifact = next((one for one in self.artifacts if one.mark == mark and one.committed), None)
        if artifact is None:
            artifact = ReceivedArtifact(f"artifact{len(self.artifacts)}", mark)
            self.artifacts.append(artifact)
        artifact.about = about
        if artifact.committed:
            self._name(artifact)
        state = "COMMITTED" if artifact.committed else "PENDING"
        sequence = {"id": "sequence", "latestArtifact": None}
        return {
            "createArtifact": {"artifact": {"id": artifact.id, "state": state, "artifactSequence": sequence}}
        }

    def _answer_CreateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        id_ = variables["artifactID"]
        file = {"id": id_, "uploadUrl": self._artifact_url(id_, MANIFEST), "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": id_, "file": file}}}

    def _answer_UpdateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        answer = self._answer_CreateArtifactManifest({"artifactID": variables["artifactManifestID"]})
        return {"updateArtifactManifest": answer["createArtifactManifest"]}

    def _answer_CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                **{"storagePath": file["name"], "uploadHeaders": [], "uploadMultipartUrls": None},
                **{"uploadUrl": self._artifact_url(file["artifactID"], file["name"])},
                **{"artifact": {"id": file["artifactID"]}},
            }
            for file in variables["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _answer_CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        artifact = self._artifact(variables["artifactID"])
        artifact.committed = True
        self._name(artifact)
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.about["digest"]}}}

    def _name(self, artifact: "ReceivedArtifact") -> None:
        """Moves the aliases asked for to this version."""
        for alias in artifact.about["aliases"]:
            project, name, _ = artifact.mark
            self.aliases[project, f"{name}:{alias['alias']}"] = artifact

    def _artifact(self, id_: str) -> "ReceivedArtifact":
        return next(one for one in self.artifacts if one.id == id_)

    def _artifact_url(self, id_: str, file: str) -> str:
        return f"{self.url}/artifacts/{id_}/{urllib.parse.quote(file)}"

    def _answer_ArtifactType(self, variables: dict[str, Any]) -> dict[str, Any]:
        artifact = self.aliases.get((variables["project"], variables["name"]))
        kind = {"artifactType": {"name": artifact.about["artifactTypeName"]}} if artifact else None
        return {"project": {"artifact": kind}}

    def _answer_ArtifactByID(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"artifact": self._artifact(variables["id"]).node()}

    def _answer_ArtifactMembershipByName(self, variables: dict[str, Any]) -> dict[str, Any]:
        artifact = self.aliases.get((variables["project"], variables["name"]))
        membership = None
        if artifact is not None:
            node = artifact.node()
            membership = {
                **{"__typename": "ArtifactCollectionMembership", "id": artifact.id, "versionIndex": 0},
                **{"createdAt": _date(0), "aliases": [], "artifact": node},
                **{"artifactCollection": node["artifactSequence"]},
            }
        return {"project": {"artifactCollectionMembership": membership}}

    def _answer_UseArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.uses.append((variables["runName"], variables["artifactID"]))
        return {"useArtifact": {"artifact": self._artifact(variables["artifactID"]).node()}}

    # -- what wandb.Api asks --

    def _answer_Runs(self, variables: dict[str, Any]) -> dict[str, Any]:
        filters = json.loads(variables.get("filters") or "{}")
        of_project = [run for run in self.runs.values() if run.settings["project"] == variables["project"]]
        if not of_project:
            return {"project": None}
        runs = [run for run in of_project if _matches(run, filters)]
        for order in reversed((variables.get("order") or "+created_at").split(",")):
            key = order.lstrip("+-")
            runs.sort(key=lambda run: _rank(run.get(key)), reverse=order.startswith("-"))
        first = int(variables.get("cursor") or 0)
        last = first + (variables.get("perPage") or 50)
        edges = [
            {"node": self._run(run), "cursor": str(place)}
            for place, run in enumerate(runs[first:last], first + 1)
        ]
        page = {"endCursor": str(last), "hasNextPage": last < len(runs)}
        found = {"runCount": len(runs), "readOnly": False, "runs": {"edges": edges, "pageInfo": page}}
        return {"project": {**_project(variables["project"]), **found}}

    def _answer_Run(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables.get("name") or variables.get("run") or variables["runName"])
        if run is None or run.settings["project"] != variables["project"]:
            return {"project": {**_project(variables["project"]), "run": None}}
        return {"project": {**_project(variables["project"]), "run": self._run(run)}}

    _answer_RunHistoryKeys = _answer_RunFullHistory = _answer_RunParquetHistory = _answer_Run

    def _answer_HistoryPage(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[variables["run"]]
        steps = range(variables["minStep"], variables["maxStep"])
        shown = run.history[: len(run.history) - self.hides_rows]
        rows = [json.dumps(row) for row in shown if row["_step"] in steps]
        return {"project": {"run": {"history": rows}}}

    def _answer_RunSampledHistory(self, variables: dict[str, Any]) -> dict[str, Any]:
        spec = json.loads(variables.get("spec") or variables["specs"][0])
        run = self.runs[variables.get("name") or variables["run"]]
        steps = range(spec.get("minStep", 0), spec.get("maxStep", 2**62) + 1)
        rows = [
            {key: row[key] for key in spec["keys"]}
            for row in run.history
            if row["_step"] in steps and all(key in row for key in spec["keys"])
        ]
        every = -(-len(rows) // max(1, spec.get("samples", 500)))
        return {"project": {"run": {"sampledHistory": [rows[:: max(1, every)]]}}}

    _answer_SampledHistoryPage = _answer_RunSampledHistory

    def _answer_RunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        wanted = variables.get("fileNames") or list(self.runs[name].files)
        edges = [
            {
                "node": {
                    **{"id": file, "name": file, "mimetype": "", "md5": "", "updatedAt": _date(0)},
                    **{"sizeBytes": len(content), "url": self._file_url(name, file)},
                    "directUrl": self._file_url(name, file),
                },
                "cursor": file,
            }
            for file, content in self.runs[name].files.items()
            if file in wanted
        ]
        files = {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}
        return {"project": {"internalId": "1", "run": {"fileCount": len(edges), "files": files}}}

    # -- what wandb-workspaces asks --

    def _answer_ProjectInternalId(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": _project(variables["projectName"])}

    def _answer_GetProjects(self, variables: dict[str, Any]) -> dict[str, Any]:
        names = sorted({run.settings["project"] for run in self.runs.values()})
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"models": {"edges": [{"node": _project(name)} for name in names], "pageInfo": page}}

    def _answer_UpsertModel(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = (variables.get("input") or variables)["name"]
        return {"upsertModel": {"project": _project(name), "model": _project(name), "inserted": True}}

    _answer_upsertModel = _answer_CreateProject = _answer_UpsertModel

    def _answer_upsertView(self, variables: dict[str, Any]) -> dict[str, Any] | None:
        if variables.get("id") and variables["id"] not in self.views:
            return None
        name = variables.get("id") or base64.b64encode(f"View:{len(self.views)}".encode()).decode()
        inserted = name not in self.views
        self.views[name] = self.views.get(name, {}) | variables
        view = {**variables, **{"id": name, "updatedAt": _date(0), "createdAt": _date(0), "user": _PERSON}}
        view["project"] = _project(variables["projectName"])
        return {"upsertView": {"view": view, "inserted": inserted}}

    _answer_UpsertView2 = _answer_upsertView

    def _answer_SpecificReport(self, variables: dict[str, Any]) -> dict[str, Any]:
        view = self.views.get(variables["reportId"])
        if view is None:
            return {"view": None}
        about = {"id": variables["reportId"], "createdAt": _date(0), "updatedAt": _date(0)}
        return {"view": {**view, **about, "project": _project(view["projectName"])}}

    def _answer_View(self, variables: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {"id": id_, "displayName": view["displayName"], "spec": view["spec"]}
            for id_, view in self.views.items()
            if view["name"] == variables["viewName"] and view["projectName"] == variables["projectName"]
        ]
        return {"project": {"allViews": {"edges": [{"node": node} for node in nodes]}}}

    # -- the parts of the answers --

    def _run(self, run: ReceivedRun) -> dict[str, Any]:
        keys = sorted({key for row in run.history for key in row})
        last = max((row["_step"] for row in run.history), default=-1)
        counts = {key: {"typeCounts": [{"type": "number", "count": len(run.column(key))}]} for key in keys}
        return {
            **{"__typename": "Run", "id": "run", "name": run.name, "projectId": "1", "sweepName": None},
            **{"displayName": run.settings["displayName"], "group": run.settings.get("groupName")},
            **{"jobType": run.settings.get("jobType"), "tags": run.settings.get("tags") or []},
            **{"notes": run.settings.get("notes"), "description": "", "commit": None, "state": run.state},
            **{"config": json.dumps({key: {"value": value} for key, value in run.config.items()})},
            **{"summaryMetrics": json.dumps(run.summary), "systemMetrics": "{}", "readOnly": False},
            **{"createdAt": _date(run.created), "heartbeatAt": _date(run.created), "user": _PERSON},
            **{"historyLineCount": len(run.history), "historyKeys": {"lastStep": last, "keys": counts}},
            **{"history": [json.dumps(row) for row in run.history], "events": []},
            # Nothing is ever exported to Parquet here: all rows are still live.
            **{"parquetHistory": {"parquetUrls": [], "liveData": [{"_step": 0}]}},
        }

    def _file_url(self, run: str, file: str) -> str:
        return f"{self.url}/files/{run}/{urllib.parse.quote(file)}"

    # ---- the stream of rows ----

    def receive(self, name: str, message: dict[str, Any]) -> None:
        """Takes one message of a run's file stream; rows are placed by their offset.

        Raises:
            ConnectionAbortedError: the server dies of it, or falls silent.
        """
        run = self.runs[name]
        for file, chunk in (message.get("files") or {}).items():
            rows = [json.loads(line) for line in chunk["content"]]
            if file == HISTORY and not self.drops_rows:
                limits = [
                    limit for limit in (self.die_after_rows, self.silent_after_rows) if limit is not None
                ]
                kept = rows[: max(0, min(limits) - self._rows)] if limits else rows
                run.history[chunk["offset"] : chunk["offset"] + len(kept)] = kept
                self._rows += len(kept)
                if len(kept) < len(rows):
                    raise ConnectionAbortedError
            elif file == "wandb-summary.json" and rows:
                run.summary = rows[-1]
        if message.get("complete"):
            run.exit_code = message.get("exitcode")
            run.state = "finished" if run.exit_code == 0 else "failed"


_NOBODY = {"edges": []}
_PERSON = {
    **{"__typename": "User", "id": "user", "username": ENTITY, "entity": ENTITY, "name": "T"},
    **{"email": "t@e.st", "admin": False, "deletedAt": None, "flags": "{}", "isTeam": False},
    **{"teams": _NOBODY, "apiKeys": _NOBODY, "defaultEntity": {"id": "entity", "name": ENTITY}},
}


def _project(name: str) -> dict[str, Any]:
    return {
        **{"__typename": "Project", "id": "project", "internalId": "1", "name": name},
        **{"entityName": ENTITY, "entity": {"id": "entity", "name": ENTITY}, "createdAt": _date(0)},
        **{"isBenchmark": False, "user": None},
    }


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _rank(value: Any) -> tuple[bool, bool, Any]:
    """Sorts numbers before texts before nothing."""
    return value is None, isinstance(value, str), value


def _matches(run: ReceivedRun, filters: Mapping[str, Any]) -> bool:
    """Whether a run passes filters in MongoDB's words, of which a few are known."""
    for path, wanted in filters.items():
        if path in ("$and", "$or"):
            if not (all if path == "$and" else any)(_matches(run, part) for part in wanted):
                return False
            continue
        value = run.get(path)
        found = value if isinstance(value, list) else [value]
        tests: dict[str, Any] = wanted if isinstance(wanted, dict) else {"$eq": wanted}
        for test, right in tests.items():
            passes = {
                "$eq": lambda: right in found,  # noqa: B023
                "$ne": lambda: right not in found,  # noqa: B023
                "$in": lambda: any(one in right for one in found),  # noqa: B023
                "$nin": lambda: not any(one in right for one in found),  # noqa: B023
                "$regex": lambda: any(re.search(right, str(one)) for one in found),  # noqa: B023
                "$exists": lambda: (value is not None) == right,  # noqa: B023
                "$gt": lambda: value is not None and value > right,  # noqa: B023
                "$gte": lambda: value is not None and value >= right,  # noqa: B023
                "$lt": lambda: value is not None and value < right,  # noqa: B023
                "$lte": lambda: value is not None and value <= right,  # noqa: B023
            }[test]
            if not passes():
                return False
    return True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbStandIn  # type: ignore[assignment]
    _STREAM: ClassVar = re.compile(r"/files/[^/]+/[^/]+/([^/]+)/file_stream")
    _OPERATION: ClassVar = re.compile(r"(?:query|mutation)\s+(\w+)")

    def do_POST(self) -> None:
        body = self._body()
        _, _, credentials = self.headers.get("Authorization", "").partition("Basic ")
        stream = self._STREAM.fullmatch(self.path)
        if self.server.falls_ill():
            return self._reply({}, 500)
        try:
            with self.server.lock:
                if credentials:
                    self.server.keys.add(base64.b64decode(credentials).decode().removeprefix("api:"))
                if stream:
                    self.server.receive(stream[1], json.loads(body))
                    answer: Any = {}
                elif self.path == "/graphql":
                    request = json.loads(body)
                    name = request.get("operationName") or ""
                    if not name and (found := self._OPERATION.search(request["query"])):
                        name = found[1]
                    refused = name in self.server.refused
                    data = None if refused else self.server.answer(name, request.get("variables") or {})
                    why = "permission denied" if refused else f"the stand-in does not know {name!r}"
                    errors = [{"message": why}]
                    answer = {"errors": errors} if data is None else {"data": data}
                else:
                    return self._reply({}, 404)
        except ConnectionAbortedError:
            if self.server.die_after_rows is not None:
                return self.server.die()
            self.server.silent, self.server.silent_after_rows = True, None
            self.server.falls_ill()
            return None
        self._reply(answer)

    def do_PUT(self) -> None:
        _, kind, owner, file = self.path.partition("?")[0].split("/", 3)
        content = self._body()
        if self.server.falls_ill():
            return self._reply({}, 500)
        with self.server.lock:
            of = self.server.runs[owner] if kind == "files" else self.server._artifact(owner)
            of.files[urllib.parse.unquote(file)] = content
        self._reply({})

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].split("/", 3)
        if self.server.falls_ill():
            return self._reply({}, 500)
        with self.server.lock:
            run = self.server.runs.get(parts[2]) if len(parts) == 4 and parts[1] == "files" else None
            content = run.files.get(urllib.parse.unquote(parts[3])) if run else None
        if content is None:
            return self._reply({}, 404)
        self._send(content, "application/octet-stream", 200)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: tests read stderr."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _reply(self, value: Any, code: int = 200) -> None:
        self._send(json.dumps(value).encode(), "application/json", code)

    def _send(self, data: bytes, kind: str, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
