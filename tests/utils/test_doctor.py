"""The checks of `raypp doctor`: facts of the machine, and what is missing or in use."""

from __future__ import annotations

import json
import socket
from importlib.metadata import PackageNotFoundError, version

import pytest
from conftest import free_port

from raypp.cli.main import main
from raypp.utils import doctor


def test_an_occupied_port_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        occupied, free = server.getsockname()[1], free_port()
        monkeypatch.setattr(doctor, "PORTS", {occupied: "raypp serve", free: "Ray's dashboard"})
        checks = {check.name: check for check in doctor.check_machine()}
    assert (checks[f"port {occupied}"].ok, checks[f"port {occupied}"].value) == (None, "in use")
    assert (checks[f"port {free}"].ok, checks[f"port {free}"].value) == (True, "free")


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A required package is a fault with a hint; Ray is not required."""

    def installed(name: str) -> str:
        if name in ("torchvision", "ray"):
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", installed)
    checks = {check.name: check for check in doctor.check_machine()}
    assert (checks["torchvision"].ok, checks["torchvision"].hint) == (False, "reinstall raypp")
    assert checks["ray"].ok is None
    assert checks["torch"].value == version("torch")


def test_table_and_json_have_the_same_checks(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    checks = json.loads(capsys.readouterr().out)
    assert {"Python", "cores", "memory", "GPU", "HAProxy", "port 8000"} <= {check["name"] for check in checks}
    main(["doctor"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line[0] != " "]  # others continue a line
    assert [line.split()[0] for line in lines] == [{True: "ok", False: "no", None: "-"}[c["ok"]] for c in checks]
