"""Every command in the documentation is run, in a folder of its own, in the order in which a reader meets it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Cluster

from raypp import env
from raypp.cli import main

ROOT = Path(__file__).parents[1]
GUIDES = (
    "docs/train.md",
    "docs/data.md",
    "docs/bundle.md",
    "docs/protections.md",
    "docs/attack.md",
    "docs/tune.md",
    "docs/serve.md",
)
NOT_RUN = "# not run by the tests"
WITHOUT_RAY = {"config", "data", "evaluate", "protect", "report", "publish", "serve", "token"}


def commands(page: str) -> list[str]:
    """The lines of a page's bash blocks, without comments; blocks that say so are left out."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    lines = [line for block in blocks if not block.startswith(NOT_RUN) for line in block.splitlines()]
    return [line for line in lines if shlex.split(line, comments=True)]


def test_guides_are_readable_by_this_test() -> None:
    assert all(commands(page) for page in GUIDES)


@pytest.mark.ray
def test_the_commands_of_the_guides(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("images", "examples"):
        shutil.copytree(ROOT / "docs" / folder, tmp_path / "docs" / folder)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(env.num_cores())
    for page in GUIDES:
        for line in commands(page):
            arguments = shlex.split(line, comments=True)
            if arguments[0] == "raypp" and (arguments[1] in WITHOUT_RAY or "--local" in arguments):
                main(arguments[1:])  # a process of its own would spend most of its time on importing torch
                continue
            result = subprocess.run(arguments, env=cluster.client, capture_output=True, text=True, timeout=400)
            assert result.returncode == 0, f"{page}: {line}\n{result.stdout}\n{result.stderr}"
    torch.set_num_threads(threads)


@pytest.mark.ray
def test_quickstart_ends_with_a_bundle_and_what_to_do_next(tmp_path: Path) -> None:
    line = next(text for text in commands("README.md") if "quickstart" in text)
    _, _, quickstart = line.partition("uv run ")
    arguments = [str(Path(sys.executable).parent / "raypp"), *shlex.split(quickstart, comments=True)[1:]]
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    (folder,) = {path.resolve() for path in (tmp_path / "runs").iterdir()}  # `latest` is a link to it
    assert (folder / "bundle" / "public" / "protection.safetensors").exists()
    assert (folder / "protected.png").exists()
    assert "protected, 8 bit" in result.stdout
    assert "Next" in result.stdout


def test_the_cluster_guide_submits_what_the_jobs_say() -> None:
    jobs = [re.search(r"jobs/\w+\.py", line) for line in commands("docs/cluster.md")]
    for line, job in zip(commands("docs/cluster.md"), jobs, strict=True):
        assert job is not None
        assert line in (ROOT / job[0]).read_text()
