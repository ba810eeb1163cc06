"""Ray's undocumented interfaces in ``raypp.cluster.ray_internals``: each test fails where Ray changes one.

``test_workers.py`` has those that need a Ray: ``loopback_only``, ``HEAD``, ``is_running`` and
``trial_error``. Jobs in ``test_cluster.py`` use ``JOBS_FOLDER`` and ``JOB_DRIVER``; every service uses ``http_host``.
"""

from __future__ import annotations

import ast
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
PRIVATE_USERS = {"raypp.cluster.ray_internals"}


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


def test_no_other_module_uses_what_ray_marks_as_private() -> None:
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            private: list[str] = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ray":
                private = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("ray."):
                private = ast.unparse(node).split(".")
            assert name in PRIVATE_USERS or not any(part.startswith("_") for part in private), f"{name}:{node.lineno}"


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
