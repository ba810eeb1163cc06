"""Has a process of Ray forked by the zygote (:mod:`zygote`) instead of importing everything itself.

Python imports this file when it starts, where the folder is on ``PYTHONPATH``. It changes only processes that run a
script of Ray or of ``jobs/``, and only where ``ZYGOTE`` names the zygote's socket.
"""

import json
import os
import shlex
import sys

PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when the thread that started it has ended
SETUP = "/ray/_private/workers/setup_worker.py"
STARTED_BY_RAYLETS = (
    "/ray/_private/workers/default_worker.py",
    "/ray/_private/runtime_env/agent/main.py",
    "/ray/dashboard/agent.py",
)
FORKED = (
    *STARTED_BY_RAYLETS,
    "/ray/_private/log_monitor.py",
    "/ray/autoscaler/_private/monitor.py",
    "/ray/dashboard/dashboard.py",
    "/bin/ray",
    "/bin/raypp",
    "/bin/serve",
)
FORK_SERVER = "from multiprocessing.forkserver import main; main("
"""How the code begins with which multiprocessing starts its fork server; two file descriptors follow."""
CLIENT_SERVER = "ray.util.client.server"


def _request() -> "dict[str, object] | None":
    """What this process was started to run; None where it has to run that itself."""
    arguments, variables, folder = sys.orig_argv[1:], {}, os.getcwd()
    while arguments and arguments[0] in ("-u", "-B"):
        del arguments[0]
    if not arguments:
        return None
    if arguments[0] == "-c" and arguments[1].startswith(FORK_SERVER):
        files = [int(number) for number in arguments[1].removeprefix(FORK_SERVER).split(",")[:2]]
        return {"arguments": arguments, "environment": dict(os.environ), "folder": folder, "files": [0, 1, 2, *files]}
    if arguments[0].endswith(SETUP):  # sets up a worker's environment and then runs default_worker.py
        name = "--serialized-runtime-env-context="
        (context,) = [json.loads(part[len(name) :]) for part in arguments if part.startswith(name)] or [{}]
        if context.get("py_executable", sys.executable) != sys.executable:
            return None
        match context.get("command_prefix") or []:
            case ["cd", path, "&&"]:  # a job's working folder
                (folder,) = shlex.split(path)
            case [_, *_]:
                return None
        variables = {name: os.path.expandvars(value) for name, value in (context.get("env_vars") or {}).items()}
        arguments = [part for part in arguments[1:] if not part.startswith((name, "--language="))]
    if arguments[:2] == ["-m", CLIENT_SERVER]:
        code = f"import runpy; runpy.run_module({CLIENT_SERVER!r}, run_name='__main__')"
        return {"arguments": ["-c", code, *arguments[2:]], "environment": dict(os.environ), "folder": folder}
    if not (arguments and (arguments[0].endswith(FORKED) or arguments[0].startswith("jobs/"))):
        return None
    return {"arguments": arguments, "environment": os.environ | variables, "folder": folder}


def _fork(request: "dict[str, object]") -> None:
    import ctypes
    import signal

    from zygote_client import ask

    if request["arguments"][0].endswith(STARTED_BY_RAYLETS):  # end with the raylet
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with ask(os.environ["ZYGOTE"], request, request.get("files", [0, 1, 2])) as zygote:
        pid = int.from_bytes(zygote.recv(4), "big")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: os.kill(pid, number))
        code = zygote.recv(4)
    os._exit(int.from_bytes(code, "big") if code else 1)


if "ZYGOTE" in os.environ and (_found := _request()) is not None:
    _fork(_found)
