"""Ray's undocumented interfaces in ``raypp.cluster.ray_internals``: each test fails where Ray changes one.

``test_workers.py`` has those that need a Ray: ``loopback_only``, ``HEAD``, ``is_running``, ``has_ended``,
``skip_second_checkpoint``, ``trial_error``, ``reserved_resources``, ``processes_ended`` and the command
``ray drain-node``. Jobs in ``test_cluster.py`` use ``JOBS_FOLDER`` and ``JOB_DRIVER``. Every service uses
``http_host``.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest
from ray._private.utils import write_ray_address
from test_layers import MODULES

from raypp.cluster import ray_internals
from raypp.serve import haproxy
from raypp.utils import errors, runtime

pytestmark = pytest.mark.ray

DOCUMENTED = {
    "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_UV_RUN_RUNTIME_ENV",
    "RAY_USAGE_STATS_ENABLED", "RAY_SERVE_THROUGHPUT_OPTIMIZED", "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "TUNE_DISABLE_SIGINT_HANDLER", "TUNE_GLOBAL_CHECKPOINT_S",
}  # fmt: skip
TRIAL = {"trial_id", "config"}  # attributes that the class documents
COMMANDS = {"start", "stop", "status", "job"}


def ray_file(name: str) -> str:
    import ray

    return (Path(ray.__file__).parent / name).read_text()


@pytest.mark.parametrize("name", ray_internals.ENVIRONMENT)
def test_ray_reads_the_environment_variable(name: str) -> None:
    assert f'"{name}"' in ray_file(ray_internals.ENVIRONMENT[name])


def test_every_environment_variable_of_ray_is_documented_or_listed() -> None:
    listed = DOCUMENTED | set(ray_internals.ENVIRONMENT) | {ray_internals.JOB_DRIVER}
    for name, path in MODULES.items():
        if name != "raypp.serve.haproxy":
            texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
            used = {text for text in texts if isinstance(text, str) and re.fullmatch(r"(RAY|TUNE)_\w+", text)}
            assert used <= listed, name
    assert set(runtime.SETTINGS) - {"CUBLAS_WORKSPACE_CONFIG"} <= listed


def private_uses(tree: ast.AST) -> list[str]:
    """Uses in a module of what Ray marks as private, of attributes of Tune's trials, and of commands that Ray hides.

    A class that inherits from one of Ray may use attributes with an underscore only if it assigns or defines them.
    """
    nodes = list(ast.walk(tree))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("ray.")]
    from_ray = {alias.asname or alias.name for node in imports for alias in node.names}
    names = [f"{node.module}.{alias.name}" for node in imports for alias in node.names]
    names += [dotted(node) for node in nodes if isinstance(node, ast.Attribute)]
    uses = [name for name in names if name.split(".")[0] in {"ray", *from_ray} and "._" in name]
    if from_ray:
        uses += [name for name in names if name.startswith("trial.") and name.split(".")[1] not in TRIAL]
    for node in nodes:
        if isinstance(node, ast.List) and ast.unparse(node).startswith("['ray', "):
            uses += [ast.unparse(node)] * (ast.unparse(node.elts[1]).strip("'") not in COMMANDS)
        if isinstance(node, ast.ClassDef) and {dotted(base).split(".")[0] for base in node.bases} & from_ray:
            uses += sorted(inherited_uses(node))
    return uses


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an expression that is one, else what follows its last other part."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def inherited_uses(node: ast.ClassDef) -> set[str]:
    own = {part.name for part in ast.walk(node) if isinstance(part, ast.FunctionDef)}
    read: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and dotted(part.value) in ("self", ""):  # "" also is super()
            (own if isinstance(part.ctx, ast.Store) else read).add(part.attr)
    return {f"self.{name}" for name in read - own if name.startswith("_") and not name.startswith("__")}


def test_private_uses_are_recognized() -> None:
    text = """
from ray import tune
from ray._private import worker
class Scheduler(tune.Scheduler):
    def __init__(self): super().__init__(); self._mine = 1
    def on_trial_result(self, trial): return self._mine, self._secret, self._own(), trial.trial_id, trial.is_saving
    def _own(self): return tune.execution._state
command = ["ray", "start"], ["ray", "drain-node", "--address"]
"""
    assert sorted(private_uses(ast.parse(text))) == [
        "['ray', 'drain-node', '--address']", "ray._private.worker", "self._secret", "trial.is_saving",
        "tune.execution._state",
    ]  # fmt: skip


def test_no_other_module_uses_what_ray_marks_as_private() -> None:
    uses = {name: private_uses(ast.parse(path.read_text())) for name, path in MODULES.items()}
    hidden = uses.pop("raypp.cluster.spot_notice")
    assert ["drain-node" in use for use in hidden] == [True]
    assert {name for name, private in uses.items() if private} == {"raypp.cluster.ray_internals"}, uses


def test_a_proxy_of_serve_has_longer_to_start_than_by_default() -> None:
    name = "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"
    (default,) = re.findall(rf'"{name}", ([\d.]+)', ray_file("serve/_private/constants.py"))
    assert float(os.environ[name]) > float(default)


def test_serve_reads_the_environment_variables_of_haproxy() -> None:
    text = ray_file("serve/_private/constants.py")
    with haproxy.ray_settings() as settings:
        for name in settings:
            assert f'"{name}"' in text, name


def test_a_job_has_its_variable_and_its_folder() -> None:
    assert f'"{ray_internals.JOB_DRIVER}"' in ray_file("_private/runtime_env/constants.py")
    assert "RAY_JOB_CONFIG_JSON_ENV_VAR" in ray_file("dashboard/modules/job/job_supervisor.py")
    parent, folder = ray_internals.JOBS_FOLDER.strip("/").split("/")
    assert f'"{parent}"' in ray_file("_private/ray_constants.py")
    assert f'"{folder}"' in ray_file("_private/runtime_env/working_dir.py")


def test_the_address_of_a_started_ray_is_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "write_ray_address(ray_params.gcs_address, temp_dir)" in ray_file("scripts/scripts.py")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert ray_internals.started_address() is None
    (tmp_path / "ray").mkdir()
    write_ray_address("192.0.2.1:6379")
    assert ray_internals.started_address() == "192.0.2.1:6379"


def test_serve_tells_its_host() -> None:
    assert "def _get_global_client(" in ray_file("serve/context.py")
    assert "def http_config(self)" in ray_file("serve/_private/client.py")


def test_a_callback_of_tune_may_end_a_search() -> None:
    """``TrialMonitor.on_step_begin`` raises in the driver's loop; a stopped search resumes in ``test_tune.py``."""
    assert "self._callbacks.on_step_begin(" in ray_file("tune/execution/tune_controller.py")


def test_the_reason_in_a_traceback_of_ray_is_one_of_raypps_errors() -> None:
    import ray

    def fail() -> None:
        raise errors.DataError("row 17 is damaged")

    try:
        fail()
    except errors.DataError as error:
        wrapped = ray.exceptions.RayTaskError("decode", ray._private.utils.format_error_message(text_of(error)), error)
    reported = errors.reported_error(str(wrapped))
    assert isinstance(reported, errors.DataError)
    assert (str(reported), reported.exit_code) == ("row 17 is damaged", 2)
    assert errors.reported_error("Traceback\nValueError: no error of raypp") is None


def text_of(error: Exception) -> str:
    import traceback

    return "".join(traceback.format_exception(error))
