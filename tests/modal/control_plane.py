"""A stand-in for Modal's control plane on 127.0.0.1, so that `modal run` can be tested without an account.

The client is the real one, on both ends. Its settings name this server:

    modal run modal_runner.py …                      the user's command: MODAL_SERVER_URL points here
      -> AppCreate, ImageGetOrCreate, MountPutFile, FunctionCreate, FunctionMap, …
           the server records the requests, and writes the shipped files into a folder
      -> python -m modal._container_entrypoint       the client's own container program, one process for each input
           started in that folder, with the environment variables of the image's ENV lines and of the secrets
      -> FunctionGetInputs, FunctionPutOutputs, VolumeCommit, …
           the function's result travels back to the user's command, its output as the app's log

    with ControlPlane(folder) as plane:
        done = plane.modal("run", "modal_runner.py", "--num-samples", "4")
        done.returncode, done.stdout, plane.functions["evaluate"], plane.images, plane.volume("sdar-results")

What is and is not like the real one:
- Images are not built: the server records their commands, and containers run in this Python. A package that an image
  lacks is not noticed.
- A container has the shipped files only: a module or a YAML file that is not shipped is missing.
- Volumes are folders, which all containers see at once; commits are counted, but have no effect. Changes that a
  container makes in a read-only volume are listed in `trespasses`. Its network is not blocked.
- `trouble` interrupts a container (by SIGINT, as Modal preempts) and gives its input to a new one, or kills it.
- A method of Modal's protocol that has no function here gets an empty answer, and is counted in `unknown`.

`_make` makes the messages, and leaves out fields that the installed client does not have.

Compared with Modal: the client's classes, command line, container program and protocol (`modal_proto`) are Modal's own;
the tests have run with modal 1.6.4 only (2026-11-24 to 2026-11-29). This server was never compared with Modal's
service, which takes an account. To try another client, install it, then:

    python -m pytest tests/modal

To compare with the service, with an account (`modal token new`):

    modal run modal_runner.py --engine native --model-name demo --tasks gsm8k_sdar_demo --num-samples 4
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from google.protobuf import message_factory
from grpclib import GRPCError, Status
from grpclib.const import Cardinality, Handler
from grpclib.server import Server
from modal_proto import api_pb2
from support import QUICK_START, ROOT, environment, fork_of

AT_ONCE = 2  # containers
SUCCESS = api_pb2.GenericResult.GENERIC_STATUS_SUCCESS


@dataclass
class Function:
    """A function as the client created it, or a variant of it (`with_options`).

    Attributes:
        definition: the function as FunctionCreate defines it.
        options: a variant's own settings, as FunctionBindParams gives them.
    """

    name: str
    definition: Any
    options: Any = None
    calls: int = 0


@dataclass
class Image:
    """A layer of an image: its Dockerfile's lines, and the id of the layer below."""

    commands: list[str]
    base: str | None


@dataclass
class Call:
    """A function call with its inputs and outputs, by position."""

    function_id: str
    inputs: dict[str, tuple[int, Any]] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class ControlPlane:
    """The server; it runs within a `with` block.

    Args:
        folder: the folder for shipped files, volumes and containers.
        trouble: called with a container's process id, again and again while the container runs, until it returns a
            signal to send: SIGINT preempts the container, any other signal ends its input with a failure.
        troubled: the function whose containers `trouble` is called for.
        variables: environment variables of each container, beside the image's and the secrets'.
    """

    def __init__(
        self,
        folder: Path,
        trouble: Callable[[int], signal.Signals | None] | None = None,
        troubled: str = "evaluate",
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.variables = dict(variables or {})
        self.trespasses: list[tuple[str, str]] = []
        self.functions: dict[str, Function] = {}
        self.variants: dict[str, Function] = {}
        self.images: dict[str, Image] = {}
        self.started: list[str] = []
        self.hit: list[str] = []
        self.unknown: Counter[str] = Counter()
        self.commits: Counter[str] = Counter()
        self.trouble = trouble
        self.troubled = troubled
        self._files: dict[str, Path] = {}
        self._blobs: dict[str, Path] = {}
        self._mounts: dict[str, list[Any]] = {}
        self._names: dict[str, str] = {}
        self.secrets: dict[str, dict[str, str]] = {}
        self._calls: dict[str, Call] = {}
        self._numbers = itertools.count(1)
        self._waiting: dict[str, list[Any]] = {}  # container -> the input that it has not fetched yet
        self._logs: asyncio.Queue[Any] | None = None
        self._running: set[subprocess.Popen[bytes]] = set()

    # The server

    def __enter__(self) -> ControlPlane:
        self.folder.mkdir(parents=True, exist_ok=True)
        # A background job of a shell ignores SIGINT, and its children inherit that: no container could be preempted.
        self._interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self._thread.start()
        assert ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(30)
        signal.signal(signal.SIGINT, self._interrupt)

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._places = asyncio.Semaphore(AT_ONCE)
        server = Server([self])
        await server.start("127.0.0.1", 0)
        assert server._server is not None
        self.url = f"http://127.0.0.1:{server._server.sockets[0].getsockname()[1]}"
        http = web.Application(client_max_size=1 << 30)
        http.add_routes([web.put("/blob/{id}", self._put_blob), web.get("/file/{path:.*}", self._get_file)])
        runner = web.AppRunner(http)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        self._http = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        ready.set()
        await self._end.wait()
        for process in self._running:
            process.kill()
        for task in self._tasks:
            task.cancel()
        server.close()
        await runner.cleanup()

    def __mapping__(self) -> dict[str, Handler]:
        return dict(self._handlers())

    def _handlers(self) -> Iterator[tuple[str, Handler]]:
        service = api_pb2.DESCRIPTOR.services_by_name["ModalClient"]
        for method in service.methods:
            request, reply = (message_factory.GetMessageClass(t) for t in (method.input_type, method.output_type))
            streams = method.server_streaming
            cardinality = Cardinality.UNARY_STREAM if streams else Cardinality.UNARY_UNARY
            if method.client_streaming:
                continue
            yield (
                f"/{service.full_name}/{method.name}",
                Handler(self._handler(method.name, reply), cardinality, request, reply),
            )

    def _handler(self, name: str, reply: Any) -> Any:
        method = getattr(self, name, None)

        async def handle(stream: Any) -> None:
            request = await stream.recv_message()
            if method is None:
                self.unknown[name] += 1
                await stream.send_message(reply())
            elif name == "AppGetLogs":
                await method(request, stream)
            else:
                answer = method(request)
                if asyncio.iscoroutine(answer):
                    answer = await answer
                await stream.send_message(_make(reply, **answer))

        return handle

    def _id(self, prefix: str) -> str:
        return f"{prefix}-{next(self._numbers)}"

    # For tests

    def modal(self, *words: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the client's command line against this server, in the project's folder."""
        return subprocess.run(
            [sys.executable, "-m", "modal", *words],
            cwd=ROOT,
            env={**self._client_environment(), **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def volume(self, name: str) -> Path:
        """Return a volume's folder."""
        path = self.folder / "volumes" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def dockerfile(self, function: str) -> list[str]:
        """Return all Dockerfile lines of a function's image, the base's first."""
        image: str | None = self.functions[function].definition.image_id
        lines: list[str] = []
        while image is not None:
            lines = self.images[image].commands + lines
            image = self.images[image].base
        return lines

    def shipped(self, function: str) -> set[str]:
        """Return the paths of the files that are shipped into a function's container."""
        return {file.filename for file in self._shipped(self.functions[function].definition)}

    def volumes_of(self, function: str) -> dict[str, str]:
        """Return a function's volumes by mount path, with "(read-only)" after those."""
        return {
            m.mount_path: m.volume_id.removeprefix("vo-") + (" (read-only)" if m.read_only else "")
            for m in self.functions[function].definition.volume_mounts
        }

    def _client_environment(self) -> dict[str, str]:
        ours = environment(QUICK_START).items()
        kept = {name: value for name, value in ours if not name.startswith(("MODAL_", "HF_", "SDAR_"))}
        return kept | {
            "MODAL_SERVER_URL": self.url,
            "MODAL_TOKEN_ID": "ak-dummy",
            "MODAL_TOKEN_SECRET": "as-dummy",
            "MODAL_CONFIG_PATH": str(self.folder / "no-such-file.toml"),
            "COLUMNS": "200",
        }

    # The app

    def ClientHello(self, _: Any) -> dict[str, Any]:
        return {}

    def AppCreate(self, _: Any) -> dict[str, Any]:
        self._logs = asyncio.Queue()
        return {"app_id": "ap-1", "app_page_url": "http://app", "app_logs_url": "http://logs"}

    def EnvironmentGetOrCreate(self, _: Any) -> dict[str, Any]:
        settings = {"image_builder_version": "2025.06"}
        return {"environment_id": "en-1", "metadata": {"name": "main", "settings": settings}}

    def AppHeartbeat(self, _: Any) -> dict[str, Any]:
        return {}

    def AppPublish(self, _: Any) -> dict[str, Any]:
        return {"url": "http://app"}

    def AppClientDisconnect(self, _: Any) -> dict[str, Any]:
        if self._logs is not None:
            self._logs.put_nowait(None)
        return {}

    async def AppGetLogs(self, request: Any, stream: Any) -> None:
        assert self._logs is not None
        with contextlib.suppress(asyncio.TimeoutError):
            while True:
                item = await asyncio.wait_for(self._logs.get(), request.timeout or 55)
                if item is None:
                    await stream.send_message(_make(api_pb2.TaskLogsBatch, app_done=True, entry_id="end"))
                    return
                task, text, descriptor = item
                logs = [_make(api_pb2.TaskLogs, data=text, file_descriptor=descriptor, timestamp=time.time())]
                await stream.send_message(
                    _make(api_pb2.TaskLogsBatch, task_id=task, items=logs, entry_id=str(next(self._numbers)))
                )

    # Files

    def MountBatchedCheckExistence(self, request: Any) -> dict[str, Any]:
        return {"missing_sha256_hex_hashes": [sha for sha in request.sha256_hex_hashes if sha not in self._files]}

    def MountPutFile(self, request: Any) -> dict[str, Any]:
        if not request.data and not request.data_blob_id and request.sha256_hex != hashlib.sha256(b"").hexdigest():
            return {"exists": request.sha256_hex in self._files}  # a request without data is a question
        if request.data_blob_id:
            self._files[request.sha256_hex] = self._blobs[request.data_blob_id]
        else:
            path = self.folder / "files" / request.sha256_hex
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(request.data)
            self._files[request.sha256_hex] = path
        return {"exists": True}

    def BlobCreate(self, _: Any) -> dict[str, Any]:
        blob = self._id("bl")
        url = f"{self._http}/blob/{blob}"
        # The fields that older clients read, and those that newer ones read.
        return {"blob_id": blob, "upload_url": url, "blob_ids": [blob], "upload_urls": {"items": [url]}}

    async def _put_blob(self, request: web.Request) -> web.Response:
        path = self.folder / "blobs" / request.match_info["id"]
        path.parent.mkdir(exist_ok=True)
        content = await request.read()
        path.write_bytes(content)
        self._blobs[request.match_info["id"]] = path
        return web.Response(headers={"ETag": hashlib.md5(content).hexdigest()})

    def MountGetOrCreate(self, request: Any) -> dict[str, Any]:
        mount = self._id("mo")
        self._mounts[mount] = list(request.files)
        self._names[mount] = request.deployment_name
        return {"mount_id": mount, "handle_metadata": {}}

    def VolumeGetOrCreate(self, request: Any) -> dict[str, Any]:
        self.volume(request.deployment_name)
        return {"volume_id": f"vo-{request.deployment_name}", "metadata": {"name": request.deployment_name}}

    def VolumeCommit(self, request: Any) -> dict[str, Any]:
        self.commits[request.volume_id.removeprefix("vo-")] += 1
        return {}

    def VolumeReload(self, _: Any) -> dict[str, Any]:
        return {}

    def VolumeGetFile2(self, request: Any) -> dict[str, Any]:
        name = request.volume_id.removeprefix("vo-")
        path = self.volume(name) / request.path.lstrip("/")
        if not path.is_file():
            raise GRPCError(Status.NOT_FOUND, f"{request.path} is not there")
        size = path.stat().st_size
        url = f"{self._http}/file/{name}/{request.path.lstrip('/')}"
        return {"get_urls": [url], "size": size, "start": 0, "len": size}

    async def _get_file(self, request: web.Request) -> web.FileResponse:
        return web.FileResponse(self.folder / "volumes" / request.match_info["path"])

    # Images, secrets, functions

    def ImageGetOrCreate(self, request: Any) -> dict[str, Any]:
        image = self._id("im")
        bases = [base.image_id for base in request.image.base_images]
        commands = list(request.image.dockerfile_commands)
        if request.image.context_mount_id:
            commands.insert(1, f"# COPY is from {self._names.get(request.image.context_mount_id)}")
        self.images[image] = Image(commands, bases[0] if bases else None)
        metadata = {"image_builder_version": "2025.06", "python_version_info": "3.11.9"}
        return {"image_id": image, "result": {"status": SUCCESS}, "metadata": metadata}

    def SecretGetOrCreate(self, request: Any) -> dict[str, Any]:
        secret = self._id("st")
        self.secrets[secret] = dict(request.env_dict)
        return {"secret_id": secret}

    def FunctionPrecreate(self, request: Any) -> dict[str, Any]:
        return {"function_id": f"fu-{request.function_name}", "handle_metadata": self._handle(request.function_name)}

    def FunctionCreate(self, request: Any) -> dict[str, Any]:
        definition = request.function if request.HasField("function") else request.function_data
        name = definition.function_name
        self.functions[name] = Function(name, definition)
        data = {"function_name": name, "ranked_functions": [{"function": definition}]}
        return {
            "function_id": f"fu-{name}",
            "function": definition,
            "function_data": data,
            "handle_metadata": self._handle(name),
        }

    def FunctionBindParams(self, request: Any) -> dict[str, Any]:
        base = self.functions[request.function_id.removeprefix("fu-")]
        variant = f"{request.function_id}/{next(self._numbers)}"
        self.variants[variant] = Function(base.name, base.definition, request.function_options)
        return {"bound_function_id": variant, "handle_metadata": self._handle(base.name)}

    def _handle(self, name: str) -> Any:
        pickled = api_pb2.DATA_FORMAT_PICKLE
        return _make(
            api_pb2.FunctionHandleMetadata,
            function_name=name,
            function_type=api_pb2.Function.FUNCTION_TYPE_FUNCTION,
            supported_input_formats=[pickled],
            supported_output_formats=[pickled],
            app_id="ap-1",
        )

    # Calls

    def FunctionMap(self, request: Any) -> dict[str, Any]:
        call = self._id("fc")
        self._calls[call] = Call(request.function_id)
        inputs = self._accept(call, request.pipelined_inputs)
        return {"function_call_id": call, "function_call_jwt": call, "pipelined_inputs": inputs}

    def FunctionPutInputs(self, request: Any) -> dict[str, Any]:
        return {"inputs": self._accept(request.function_call_id, request.inputs)}

    def _accept(self, call_id: str, items: Any) -> list[Any]:
        accepted = []
        for item in items:
            input_id = self._id("in")
            self._calls[call_id].inputs[input_id] = (item.idx, item.input)
            task = self._loop.create_task(self._run(call_id, input_id))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            accepted.append({"idx": item.idx, "input_id": input_id, "input_jwt": input_id})
        return accepted

    async def FunctionGetOutputs(self, request: Any) -> dict[str, Any]:
        call = self._calls[request.function_call_id]
        start = 0 if request.last_entry_id in ("", "0-0") else int(request.last_entry_id)
        ends = time.monotonic() + min(request.timeout, 50)
        while len(call.outputs) <= start and time.monotonic() < ends:
            call.changed.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(call.changed.wait(), max(0.0, ends - time.monotonic()))
        return {"outputs": call.outputs[start:], "last_entry_id": str(len(call.outputs))}

    # Containers

    async def _run(self, call_id: str, input_id: str) -> None:
        call = self._calls[call_id]
        function = self.variants.get(call.function_id) or self.functions[call.function_id.removeprefix("fu-")]
        async with self._places:
            while not any(output.input_id == input_id for output in call.outputs):
                code = await self._container(function, call_id, input_id)
                answered = any(output.input_id == input_id for output in call.outputs)
                if not answered and code != "preempted":
                    idx, _ = call.inputs[input_id]
                    failure = api_pb2.GenericResult.GENERIC_STATUS_FAILURE
                    result = {"status": failure, "exception": f"the container ended with {code}"}
                    item = _make(api_pb2.FunctionGetOutputsItem, idx=idx, input_id=input_id, result=result)
                    call.outputs.append(item)
                    call.changed.set()

    async def _container(self, function: Function, call_id: str, input_id: str) -> int | str:
        container = self._id("ta")
        home = self.folder / "containers" / container
        for file in self._shipped(function.definition):
            target = home / file.filename.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            source = self._files.get(file.sha256_hex)
            if source is None:
                target.write_bytes(b"")
            elif not target.exists():
                os.link(source, target)
        layout = _make(api_pb2.AppLayout, function_ids={name: f"fu-{name}" for name in self.functions})
        for name in self.functions:
            layout.objects.add(object_id=f"fu-{name}").function_handle_metadata.CopyFrom(self._handle(name))
        for dependency in function.definition.object_dependencies:
            layout.objects.add(object_id=dependency.object_id)
        arguments = _make(
            api_pb2.ContainerArguments,
            task_id=container,
            function_id=container,
            app_id="ap-1",
            function_def=function.definition,
            app_layout=layout,
            environment_name="main",
        )
        (home / "arguments").write_bytes(arguments.SerializeToString())
        self._waiting[container] = [call_id, input_id]
        self.started.append(function.name)
        function.calls += 1
        before = self._read_only(function)
        process = await asyncio.to_thread(
            subprocess.Popen,
            [sys.executable, "-u", "-m", "modal._container_entrypoint"],
            cwd=home / "root",
            env=self._container_environment(function, home, container),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._running.add(process)
        reader = asyncio.create_task(asyncio.to_thread(self._forward, process, container))
        preempted = False
        while process.poll() is None:
            await asyncio.sleep(0.01)
            fork = fork_of(process.pid)
            if self.trouble is not None and function.name == self.troubled and (sent := self.trouble(fork)):
                self.trouble = None
                self.hit.append(container)
                preempted = sent == signal.SIGINT
                os.kill(fork, sent)
        await reader
        self._running.discard(process)
        changed = {path for path, _ in before ^ self._read_only(function)}
        self.trespasses += [(function.name, path) for path in sorted(changed)]
        shutil.rmtree(home, ignore_errors=True)
        return "preempted" if preempted else process.returncode

    def _read_only(self, function: Function) -> set[tuple[str, int]]:
        """Path and time of change of every file on the function's read-only volumes."""
        mounts = [mount for mount in function.definition.volume_mounts if mount.read_only]
        roots = [self.volume(mount.volume_id.removeprefix("vo-")) for mount in mounts]
        return {(str(path), path.stat().st_mtime_ns) for root in roots for path in root.rglob("*")}

    def _forward(self, process: subprocess.Popen[bytes], container: str) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            assert self._logs is not None
            text = line.decode("utf-8", "replace")
            self._loop.call_soon_threadsafe(self._logs.put_nowait, (container, text, api_pb2.FILE_DESCRIPTOR_STDOUT))

    def _container_environment(self, function: Function, home: Path, container: str) -> dict[str, str]:
        mounted = {m.mount_path: m.volume_id.removeprefix("vo-") for m in function.definition.volume_mounts}
        declared: dict[str, str] = {}
        for line in self.dockerfile(function.name):
            if line.startswith("ENV "):
                name, _, value = line.removeprefix("ENV ").partition("=")
                value = value.strip("'\"")
                for path, volume in mounted.items():
                    if value == path or value.startswith(f"{path}/"):
                        value = str(self.volume(volume)) + value.removeprefix(path)
                declared[name] = value
        for secret in function.definition.secret_ids:
            declared |= self.secrets[secret]
        declared.pop("PATH", None)
        ours = self._client_environment()
        installed = [path for path in sys.path if "site-packages" in path]
        return (
            {name: value for name, value in ours.items() if not name.startswith("MODAL_TOKEN")}
            | declared
            | self.variables
            | {
                "MODAL_IS_REMOTE": "1",
                "MODAL_TASK_ID": container,
                "MODAL_CONTAINER_ARGUMENTS_PATH": str(home / "arguments"),
                # Shipped files come first, then this Python's packages; the project's own folder is left out.
                "PYTHONPATH": os.pathsep.join([str(QUICK_START), str(home / "root"), *installed]),
            }
        )

    def _shipped(self, definition: Any) -> list[Any]:
        mounts = [*definition.mount_ids, *([definition.mount_id] if getattr(definition, "mount_id", "") else [])]
        return [file for mount in mounts for file in self._mounts[mount]]

    def ContainerHello(self, _: Any) -> dict[str, Any]:
        return {}

    def ContainerHeartbeat(self, _: Any) -> dict[str, Any]:
        return {}

    def FunctionGetInputs(self, request: Any) -> dict[str, Any]:
        waiting = self._waiting.pop(request.function_id, None)
        if waiting is None:
            return {"inputs": [{"kill_switch": True}]}
        call_id, input_id = waiting
        idx, content = self._calls[call_id].inputs[input_id]
        item = {"input_id": input_id, "input": content, "function_call_id": call_id, "function_map_idx": idx}
        return {"inputs": [item]}

    def FunctionPutOutputs(self, request: Any) -> dict[str, Any]:
        for item in request.outputs:
            call = next(call for call in self._calls.values() if item.input_id in call.inputs)
            idx, _ = call.inputs[item.input_id]
            call.outputs.append(
                _make(
                    api_pb2.FunctionGetOutputsItem,
                    idx=idx,
                    input_id=item.input_id,
                    result=item.result,
                    data_format=item.data_format,
                )
            )
            call.changed.set()
        return {}

    def TaskResult(self, request: Any) -> dict[str, Any]:
        print(f"control plane: a container could not start: {request.result.exception}", file=sys.stderr)
        return {}


def _make(kind: Any, **fields: Any) -> Any:
    """Make a message; fields that its kind does not have are left out."""
    return kind(**{name: value for name, value in fields.items() if name in kind.DESCRIPTOR.fields_by_name})
