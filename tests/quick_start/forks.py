"""Processes that need not import torch, transformers, lm_eval and modal: they are forks of one that has.

    a process that a test starts: sitecustomize.py -> become_one()
        sends its arguments, variables, folders and standard files; passes signals on; ends as its fork does
    the server: python -u forks.py SOCKET FOLDER
        forks for each, and kills a fork whose process is gone; FOLDER/PROCESS is a link to the fork's number

A fork imports this package from where its process would, and runs its program as Python does. Only what libraries make
of environment variables when they are imported (HF_HOME, say) is as in the server.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

LIBRARIES = (
    "lm_eval.__main__", "lm_eval._cli", "lm_eval.evaluator", "lm_eval.loggers", "lm_eval.tasks", "torch._dynamo",
    "transformers.models.auto.tokenization_auto", "transformers.models.qwen3.modeling_qwen3",
    "accelerate.commands.launch", "torch.distributed.run", "modal.__main__", "modal._container_entrypoint",
)  # fmt: skip


def become_one(server: str) -> None:
    """Have a fork do what this process was started for, and end as it does."""
    program = sys.orig_argv[-len(sys.argv)]  # a file, or the module's name behind -m
    request = [os.getpid(), program, sys.argv, sys.path, str(Path.cwd()), dict(os.environ)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as keeper:
        keeper.connect(server)
        socket.send_fds(keeper, [json.dumps(request).encode()], [0, 1, 2])
        fork = int(keeper.recv(100))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(fork, number))
        code = int(keeper.recv(100))
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(listening: int, folder: str) -> tuple[list[Any], list[int]]:
    """Return in each fork, with its request and standard files; end when standard input does."""
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no keeper is waited for
    server = socket.socket(fileno=listening)
    while True:
        if 0 in select.select([0, server], [], [])[0]:
            os._exit(0)
        process, _ = server.accept()
        if os.fork() == 0:
            break
        process.close()
    # The keeper of one fork.
    server.close()
    message, files, *_ = socket.recv_fds(process, 1 << 20, 3)
    request = json.loads(message)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    fork = os.fork()
    if fork == 0:
        process.close()
        return request, files
    for file in files:
        os.close(file)
    link = Path(folder, str(request[0]))
    link.symlink_to(str(fork))
    process.send(str(fork).encode())
    if process in select.select([os.pidfd_open(fork), process], [], [])[0]:  # it is gone
        os.kill(fork, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
    link.unlink()
    with contextlib.suppress(OSError):
        process.send(str(code).encode())
    os._exit(0)


def run(request: list[Any], files: list[int]) -> None:
    """Be the process that was asked for, in this file's place as the main program."""
    _, program, arguments, path, folder, variables = request
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    is_module = arguments[0] == "-m"
    sys.argv[:] = arguments
    sys.path[:] = [folder if is_module else str(Path(program).absolute().parent), *path]
    importlib.invalidate_caches()
    main = f"{program}.__main__" if hasattr(sys.modules.get(program), "__path__") else program
    for name in [*sys.modules]:
        if name == main or name.partition(".")[0] == "sdar_lm_eval":
            del sys.modules[name]
    import quick_lm_eval  # noqa: F401

    if is_module:
        runpy._run_module_as_main(program)  # type: ignore[attr-defined]
    else:
        runpy.run_path(program, run_name="__main__")


def exit_code() -> int:
    """Do what Python does of the exception that ends a program, and return the code to end with."""
    error = sys.exc_info()[1]
    if not isinstance(error, SystemExit):
        sys.excepthook(*sys.exc_info())
        return 1
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    request, files = serve(int(sys.argv[1]), sys.argv[2])
    code = 0
    try:
        run(request, files)
    except BaseException:
        code = exit_code()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # to take all modules to pieces would take seconds
