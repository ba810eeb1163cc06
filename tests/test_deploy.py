"""What is shipped for clusters: understood by those who read it, and closed to strangers."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import kubernetes_validate
import pytest
import yaml
from conftest import ROOT, Trained
from packaging.requirements import Requirement
from pydantic import BaseModel, ConfigDict, Field

import raypp
from raypp.cli.main import main
from raypp.config.presets import load_config
from raypp.experiments.run_folder import point_latest
from raypp.experiments.search import make_search_plan
from raypp.serve.server import ATTACK, CONFIG, config_template
from raypp.utils.errors import ConfigError
from raypp.utils.runtime import SETTINGS
from raypp.utils.storage import Storage

CLUSTERS = ("cluster.yaml", "deploy/cluster-on-premise.yaml")
MANIFESTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "deploy/kuberay").glob("*.yaml"))
KUBERNETES = "1.30"


def read(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return tree


def check_deployable(config: dict[str, Any]) -> None:
    from ray.serve.schema import ServeDeploySchema  # a second, also where no test of this file is chosen

    ServeDeploySchema.model_validate(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_up_understands_the_cluster(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(read(name)))


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_asks_for_its_token(name: str) -> None:
    config = read(name)
    for side in ("head", "worker"):
        starts = [line for line in config[f"{side}_start_ray_commands"] if "ray start" in line]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token" in starts[0]
        assert "--dashboard-host=127.0.0.1" in starts[0] or side == "worker"
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert "0.0.0.0" not in json.dumps(config)


class Metadata(BaseHTTPRequestHandler):
    """AWS's metadata service: a notice from the third question on, and an error before it."""

    questions: ClassVar[list[str]] = []
    end: ClassVar[datetime]

    def do_PUT(self) -> None:
        self.reply(200, "token" if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else "")

    def do_GET(self) -> None:
        assert self.headers["X-aws-ec2-metadata-token"] == "token"
        self.questions.append(self.path)
        notice = json.dumps({"action": "terminate", "time": f"{self.end:%Y-%m-%dT%H:%M:%SZ}"})
        self.reply({1: 404, 2: 500}.get(len(self.questions), 200), notice)

    def reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_a_spot_notice_drains_the_node(tmp_path: Path) -> None:
    """The line of ``cluster.yaml``, with another metadata service and a ``ray`` that notes how it is called."""
    line = read("cluster.yaml")["worker_start_ray_commands"][-1]
    assert line.endswith("&")
    log, lock, calls = tmp_path / "log", tmp_path / "lock", tmp_path / "calls"
    Metadata.end = datetime.now(UTC) + timedelta(seconds=110)
    with HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = f"--metadata=http://127.0.0.1:{server.server_port} --poll-seconds=0.01 >"
        for before, after in (
            (" >", f" {flags}"),
            ("/tmp/spot_notice.log", str(log)),
            ("/tmp/spot_notice.lock", str(lock)),
        ):
            line = line.replace(before, after)
        (tmp_path / "ray").write_text(f'#!/bin/sh\nprintf "%s\\n" "$RAY_ADDRESS" "$@" > {calls}\n')
        (tmp_path / "ray").chmod(0o755)
        path = os.pathsep.join((str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]))
        command = line.removesuffix("&")
        subprocess.run(
            ["bash", "-c", command], env=os.environ | {"PATH": path, "RAY_HEAD_IP": "192.0.2.1"}, check=True, timeout=30
        )
        server.shutdown()
    assert "HTTP Error 500" in log.read_text()
    assert set(Metadata.questions) == {"/latest/meta-data/spot/instance-action"}
    address, name, *options = calls.read_text().splitlines()
    assert (address, name) == ("192.0.2.1:6379", "drain-node")
    assert 100 <= int(options[-1].removeprefix("--deadline-remaining-seconds=")) <= 110
    from ray.scripts.scripts import drain_node

    parsed = drain_node.make_context("drain-node", options).params
    assert parsed["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert parsed["address"] == address


def test_machines_on_aws_are_not_public_and_may_do_what_they_have_to() -> None:
    config = read("cluster.yaml")
    assert config["provider"]["use_internal_ips"]
    for name, kind in config["available_node_types"].items():
        node = kind["node_config"]
        assert node["SecurityGroupIds"], "Ray's own group lets SSH in from everywhere"
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        role = node["IamInstanceProfile"]["Name"].removeprefix("raypp-")
        policy = json.loads((ROOT / f"deploy/aws/{role}.json").read_text())
        actions = {action for part in policy["Statement"] for action in [part["Action"]] for action in _listed(action)}
        assert {"s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:ListBucket"} <= actions
        assert ("ec2:RunInstances" in actions) == (name == "head")
        assert not any(action in ("*", "s3:*", "ec2:*", "iam:*") for action in actions)


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Auth(Closed):
    mode: str = Field(pattern="^token$")


class Head(Closed):
    """HeadGroupSpec of the API reference of KubeRay 1.5: the fields in use here."""

    serviceType: str = Field(pattern="^ClusterIP$")  # noqa: N815 (Kubernetes' names)
    rayStartParams: dict[str, str]  # noqa: N815
    template: dict[str, Any]


class Worker(Closed):
    groupName: str  # noqa: N815
    replicas: int
    minReplicas: int  # noqa: N815
    maxReplicas: int  # noqa: N815
    rayStartParams: dict[str, str]  # noqa: N815
    template: dict[str, Any]


class Secret(Closed):
    name: str
    key: str


class SecretSource(Closed):
    secretKeyRef: Secret  # noqa: N815


class Password(Closed):
    valueFrom: SecretSource  # noqa: N815


class FaultTolerance(Closed):
    redisAddress: str  # noqa: N815
    redisPassword: Password  # noqa: N815


class Autoscaler(Closed):
    idleTimeoutSeconds: int  # noqa: N815


class RayCluster(Closed):
    rayVersion: str  # noqa: N815
    authOptions: Auth  # noqa: N815
    enableInTreeAutoscaling: bool  # noqa: N815
    autoscalerOptions: Autoscaler | None = None  # noqa: N815
    gcsFaultToleranceOptions: FaultTolerance | None = None  # noqa: N815
    headGroupSpec: Head  # noqa: N815
    workerGroupSpecs: list[Worker]  # noqa: N815


class RayJob(Closed):
    entrypoint: str
    runtimeEnvYAML: str  # noqa: N815
    shutdownAfterJobFinishes: bool  # noqa: N815
    ttlSecondsAfterFinished: int  # noqa: N815
    backoffLimit: int  # noqa: N815
    submitterPodTemplate: dict[str, Any]  # noqa: N815
    rayClusterSpec: RayCluster  # noqa: N815


class RayService(Closed):
    serveConfigV2: str  # noqa: N815
    rayClusterConfig: RayCluster  # noqa: N815


KINDS = {"RayCluster": RayCluster, "RayJob": RayJob, "RayService": RayService}


def templates(tree: Any) -> Iterator[dict[str, Any]]:
    """Every pod template in a manifest."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key in ("template", "submitterPodTemplate"):
                yield value
            yield from templates(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from templates(value)


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_understands_a_manifest(name: str) -> None:
    for tree in yaml.safe_load_all((ROOT / name).read_text()):
        check_manifest(tree)


def check_manifest(tree: dict[str, Any]) -> None:
    if tree["apiVersion"] == "ray.io/v1":
        spec = KINDS[tree["kind"]].model_validate(tree["spec"])
        cluster = getattr(spec, "rayClusterSpec", None) or getattr(spec, "rayClusterConfig", spec)
        assert cluster.rayVersion == version("ray")
    else:
        kubernetes_validate.validate(tree, KUBERNETES, strict=True)
    for pod_template in templates(tree):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"} | pod_template["metadata"]}
        kubernetes_validate.validate(pod | {"spec": pod_template["spec"]}, KUBERNETES, strict=True)
        assert pod_template["spec"]["securityContext"]["runAsNonRoot"]
        if pod_template["spec"]["containers"][0]["name"] != "ray-head":  # which asks Kubernetes for more pods
            assert pod_template["spec"]["automountServiceAccountToken"] is False
        assert pod_template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "raypp"  # the network policy's
        for container in pod_template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert "memory" in container["resources"]["limits"]


def test_what_begins_without_workers_asks_for_them() -> None:
    """A search takes as many trials at once as there is room for when it starts; spot nodes leave more than thrice."""
    assert "--search.max_concurrent 8" in read("deploy/kuberay/rayjob-tune.yaml")["spec"]["entrypoint"]
    assert "--cluster.max_failures -1" in read("deploy/kuberay/rayjob-train.yaml")["spec"]["entrypoint"]


def test_a_service_on_kubernetes_serves_what_a_run_publishes() -> None:
    """Classifier and attacks read the repository on the volume of the run."""
    job, service = (read(f"deploy/kuberay/{name}.yaml")["spec"] for name in ("rayjob-train", "rayservice"))
    words = job["entrypoint"].split()
    repository = words[words.index("--publish") + 1]
    locations = re.findall(r"{bundle: ([^,]+),", service["serveConfigV2"])
    assert locations == [repository, repository]
    for spec in (job["rayClusterSpec"], service["rayClusterConfig"]):
        for pod in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            (volume,) = (part for part in pod["template"]["spec"]["volumes"] if part["name"] == "shared")
            assert volume["persistentVolumeClaim"] == {"claimName": "raypp-shared"}
            mounts = pod["template"]["spec"]["containers"][0]["volumeMounts"]
            assert any(mount["name"] == "shared" and repository.startswith(mount["mountPath"]) for mount in mounts)


def test_a_service_outlives_its_head_and_a_node() -> None:
    """Its head has a Redis; its replicas lie on two nodes, and a node that ends waits for their requests."""
    from raypp.serve.deployments import ClassifierDeployment

    service, jobs = read("deploy/kuberay/rayservice.yaml")["spec"], "rayClusterConfig"
    cluster = RayCluster.model_validate(service[jobs])
    redis_service, redis = yaml.safe_load_all((ROOT / "deploy/kuberay/redis.yaml").read_text())
    assert cluster.gcsFaultToleranceOptions is not None
    name, _, port = cluster.gcsFaultToleranceOptions.redisAddress.partition(":")
    assert (name, int(port)) == (redis_service["metadata"]["name"], redis_service["spec"]["ports"][0]["port"])
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    (password,) = (variable["valueFrom"] for variable in container["env"])
    assert cluster.gcsFaultToleranceOptions.redisPassword.model_dump() == {"valueFrom": password}
    assert redis_service["spec"]["selector"].items() <= redis["spec"]["template"]["metadata"]["labels"].items()

    (application,) = yaml.safe_load(service["serveConfigV2"])["applications"]
    (deployment,) = application["deployments"]
    (group,) = cluster.workerGroupSpecs
    assert deployment["max_replicas_per_node"] == 1
    assert deployment["autoscaling_config"]["min_replicas"] == group.minReplicas == group.replicas == 2
    assert deployment["autoscaling_config"]["max_replicas"] == group.maxReplicas
    finish = ClassifierDeployment._deployment_config.graceful_shutdown_timeout_s
    for template in (cluster.headGroupSpec.template, group.template):
        (node,) = template["spec"]["containers"]
        variables = {variable["name"]: variable.get("value") for variable in node["env"]}
        drain = float(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert finish < drain < template["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.slow
def test_the_dashboard_shows_what_is_exported() -> None:
    exported = {
        node.value
        for path in (ROOT / "raypp").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and str(node.value).startswith("raypp_")
    }
    dashboard = json.loads((ROOT / "deploy/grafana/raypp.json").read_text())
    panels = {title: [] for title in ("Training", "Serving")}
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            queries = panels[panel["title"]]
        else:
            queries += [target["expr"] for target in panel["targets"]]
    named = {
        row: set(re.findall(r"ray_(raypp_\w+?)(?:_bucket|_sum|_count)?\b", " ".join(queries)))
        for row, queries in panels.items()
    }
    assert named["Training"] == {"raypp_train_loss", "raypp_train_images_per_second", "raypp_train_epoch"}
    assert {"raypp_request_duration_seconds", "raypp_waiting_images", "raypp_batch_images"} <= named["Serving"]
    assert named["Training"] | named["Serving"] <= exported
    variables = [part["query"]["query"] for part in dashboard["templating"]["list"] if part["type"] == "query"]
    assert variables == ["label_values(ray_raypp_train_epoch, run)", "label_values(ray_raypp_requests_total, route)"]
    guide = (ROOT / "docs/how-to/monitor.md").read_text()
    assert all(f"ray_{name}`" in guide for name in named["Training"] | named["Serving"])


def test_a_stock_image_gets_the_project_s_dependencies() -> None:
    """And what a job takes along is the same; Ray knows each key, and checks the types."""
    from ray.runtime_env import RuntimeEnv

    stock, built = read("jobs/runtime_env-uv.yaml"), read("jobs/runtime_env.yaml")
    ranges = [Requirement(line) for line in read_toml()["project"]["dependencies"]]
    assert list(map(Requirement, stock["uv"]["packages"])) == [kind for kind in ranges if kind.name != "ray"]
    assert {key: stock[key] for key in built} == built
    assert RuntimeEnv(**stock).uv_config()["packages"] == stock["uv"]["packages"]
    with pytest.raises(ValueError, match="can only have these fields"):
        RuntimeEnv(**stock | {"uv": stock["uv"] | {"package": []}})


def test_a_mistake_in_a_manifest_is_found() -> None:
    tree = read("deploy/kuberay/rayjob-train.yaml")
    tree["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "disabled"
    with pytest.raises(ValueError, match="authOptions"):
        RayJob.model_validate(tree["spec"])
    template = next(templates(tree))
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"] | {"contaners": []}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", ["rayjob-train", "rayjob-tune"])
def test_a_job_has_time_to_write_a_checkpoint_before_it_is_killed(name: str) -> None:
    wanted = read("jobs/runtime_env.yaml")["env_vars"]
    assert int(wanted["RAY_JOB_STOP_WAIT_TIME_S"]) > 3, "Ray's own default"
    assert yaml.safe_load(read(f"deploy/kuberay/{name}.yaml")["spec"]["runtimeEnvYAML"])["env_vars"] == wanted


@pytest.mark.parametrize("name", ["rayjob-train", "rayjob-tune"])
def test_the_entrypoint_of_a_job_is_a_command_that_raypp_takes(name: str, tmp_path: Path) -> None:
    words = read(f"deploy/kuberay/{name}.yaml")["spec"]["entrypoint"].split()
    assert words[0] == "python"
    assert (ROOT / words[1]).exists()
    options = dict(zip(words[3::2], words[4::2], strict=True))
    places = {"--name": options.pop("--name"), "--storage": options.pop("--storage", None)}
    if name == "rayjob-tune":
        flags = [word for pair in options.items() for word in pair]
        make_search_plan(words[2], (), flags, storage=tmp_path, name=places["--name"])
        assert str(places["--storage"]).startswith("/shared/")
    else:
        assert options.pop("--publish").startswith("/shared/")
        flags = [word for pair in options.items() for word in pair]
        assert load_config(words[2], flags=flags).cluster.storage.startswith("/shared/")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["serve_config.yaml", "deploy/kuberay/rayservice.yaml"])
def test_services_that_others_reach_ask_for_a_token(name: str) -> None:
    tree = read(name)
    config = yaml.safe_load(tree["spec"]["serveConfigV2"]) if "spec" in tree else tree
    check_deployable(config)
    for application in config["applications"]:
        assert config["http_options"]["host"] == "127.0.0.1" or application["args"]["tokens"]


@pytest.mark.slow
def test_the_shipped_configuration_needs_no_editing(tmp_path: Path) -> None:
    """Its one setting is the bundle; attacks are off; what is behind # is what ``raypp serve --attack`` adds."""
    config = read("serve_config.yaml")
    check_deployable(config)
    (classifier,) = config["applications"]
    assert (classifier["name"], classifier["route_prefix"]) == ("classifier", "/")
    assert classifier["args"]["bundle"] == "runs/latest/bundle"
    assert (config["http_options"]["host"], config["http_options"]["port"]) == ("127.0.0.1", 8000)
    lines = (ROOT / "serve_config.yaml").read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line == "  # - name: attack")
    shown = [line.replace("  # ", "  ", 1) for line in lines[begin:]]
    _, attack = yaml.safe_load("\n".join(lines[:begin] + shown))["applications"]
    assert attack["args"].pop("bundle") == "runs/latest/bundle"
    assert attack["args"].pop("tokens") is None
    assert attack == ATTACK


@pytest.mark.slow
def test_the_shown_autoscaling_is_the_default() -> None:
    """It replaces the default, so all of it must be there, the policy too."""
    from raypp.serve.deployments import ClassifierDeployment

    lines = (ROOT / "serve_config.yaml").read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line == "    # deployments:")
    end = next(i for i in range(begin, len(lines)) if not lines[i].startswith("    #"))
    shown = [line.replace("    # ", "    ", 1) for line in lines[begin:end]]
    config = yaml.safe_load("\n".join([*lines[:begin], *shown, *lines[end:]]))
    check_deployable(config)
    (options,) = config["applications"][0]["deployments"]
    default = ClassifierDeployment._deployment_config.autoscaling_config
    policy = options["autoscaling_config"].pop("policy")["policy_function"]
    assert policy.replace(":", ".") == default.policy.policy_function
    assert options["autoscaling_config"] == {key: getattr(default, key) for key in options["autoscaling_config"]}
    assert options["num_replicas"] == "auto"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"bundle": "runs/none"}, "there is no 'runs/none' in {here} or in {root}; `raypp quickstart` makes"),
        ({"bundle": "{here}/none"}, "bundle '{here}/none' does not exist"),
        ({"bundle": "{here}"}, "'{here}' holds no bundle; allowed is a bundle, a model repository, a run, a search"),
        ({"bundle": ""}, "a location is not understood: '' is empty; allowed is a path or a URI"),
        ({"bundle": 7}, "bundle is 7: expected text"),
        ({}, "bundle is missing; set it, or RAYPP_BUNDLE in the environment of every node's `ray start`"),
        ({"bundel": "x"}, "unknown key 'bundel' (did you mean 'bundle'?); allowed there: bundle, tokens"),
        ({"bundle": "{run}/bundle", "max_images": 0}, "max_images is 0; allowed is at least 1"),
        ({"bundle": "{run}/bundle", "tokens": "env:NONE"}, "the environment variable 'NONE' is not set; put the text"),
        ({"bundle": "{run}/bundle", "tokens": "none.json"}, "there is no 'none.json' in {here} or in {root}"),
        ({"bundle": "{run}/bundle", "tokens": "{here}/none.json"}, "token file '{here}/none.json' cannot be read"),
        ({"bundle": "{run}/damaged"}, "was altered: private/classifier.json does not match its SHA-256"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("name", ["classifier", "attack"])
def test_what_cannot_be_deployed_is_one_sentence(
    name: str, args: dict[str, Any], sentence: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve shows a RayServeException by its message, anything else by its traceback."""
    from ray.serve.exceptions import RayServeException

    from raypp.serve import deployments

    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained.bundle, tmp_path / "run" / "bundle")
    damaged = shutil.copytree(trained.bundle, tmp_path / "run" / "damaged") / "private" / "classifier.json"
    damaged.write_text(damaged.read_text() + " ")
    places = {"here": str(tmp_path), "root": str(ROOT), "run": str(tmp_path / "run")}
    filled = {key: value.format(**places) if isinstance(value, str) else value for key, value in args.items()}
    with pytest.raises(RayServeException) as refusal:
        getattr(deployments, f"build_{name}")(filled)
    assert str(refusal.value).startswith(f"args of {name}: ")
    assert sentence.format(**places) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
def test_a_relative_bundle_is_found_from_where_ray_was_started_and_in_the_checkout(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where both have it, the folder in which Ray was started wins; replicas get an absolute path."""
    from ray.serve.exceptions import RayServeException

    from raypp.serve import deployments

    started, checkout = tmp_path / "started", tmp_path / "checkout"
    (checkout / "raypp").mkdir(parents=True)
    started.mkdir()
    monkeypatch.chdir(started)
    monkeypatch.setattr(raypp, "__file__", str(checkout / "raypp" / "__init__.py"))
    with pytest.raises(ConfigError, match=r"there is no 'runs/latest/bundle' in .*started or in .*checkout"):
        deployments.located("runs/latest/bundle")
    for folder in (checkout, started):
        shutil.copytree(trained.bundle, folder / "runs" / "one" / "bundle")
        point_latest(Storage(folder / "runs" / "one"))
        assert deployments.located("runs/latest/bundle") == f"{folder}/runs/latest/bundle"
        assert deployments.located("./runs/latest/bundle") == f"{folder}/runs/latest/bundle"
    assert deployments.located("s3://bucket/bundle") == "s3://bucket/bundle"
    assert deployments.located("/elsewhere") == "/elsewhere"
    deployments.build_classifier({"bundle": "runs/latest/bundle"})
    best = shutil.copytree(trained.bundle, started / "runs" / "found" / "best" / "knee")
    for file in ("search.yaml", "search.json"):
        (best.parents[1] / file).write_text("{}")
    assert deployments.located("runs/found#knee") == f"{started}/runs/found#knee"
    monkeypatch.setenv("RAYPP_BUNDLE", "runs/found#knee")  # where args.bundle is absent
    deployments.build_classifier({})
    monkeypatch.setenv("RAYPP_BUNDLE", "runs/none")
    with pytest.raises(RayServeException, match=r"there is no 'runs/none' in "):
        deployments.build_classifier({})


@pytest.mark.slow
def test_the_wheel_has_the_only_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout finds it at the top of the repository, an installed wheel in the package."""
    assert [p.relative_to(ROOT).as_posix() for p in ROOT.glob("raypp/**/*.yaml") if p.name == CONFIG] == []
    of_checkout = config_template()
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith(CONFIG)] == [f"raypp/serve/{CONFIG}"]
        assert archive.read(f"raypp/serve/{CONFIG}") == (ROOT / CONFIG).read_bytes()
        archive.extractall(tmp_path / "site-packages")
    monkeypatch.setattr(raypp, "__file__", str(tmp_path / "site-packages" / "raypp" / "__init__.py"))
    assert config_template() == of_checkout
    (tmp_path / "site-packages" / "raypp" / "serve" / CONFIG).unlink()
    with pytest.raises(ConfigError, match=r"serve_config\.yaml is missing"):
        config_template()


def test_a_ray_that_starts_here_leaves_no_token_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else `ray start` would ask for it after `raypp quickstart`, and `serve deploy` would be refused."""
    from raypp.cluster.session import _create_token

    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))

    def token(**surroundings: str) -> str | None:
        with monkeypatch.context() as patch:
            for name in names:
                patch.delenv(name, raising=False)
            for name, value in surroundings.items():
                patch.setenv(name, value)
            patch.setenv("RAY_AUTH_TOKEN", "")  # so that it is put back at the end
            del os.environ["RAY_AUTH_TOKEN"]
            os.environ.update(surroundings)
            _create_token()
            return os.environ.get("RAY_AUTH_TOKEN")

    own = token()
    assert own is not None
    assert len(own) == 64
    assert own != token()
    assert token(RAY_AUTH_TOKEN="mine") == "mine"
    assert token(RAY_AUTH_TOKEN_PATH="file") is None
    assert token(RAY_AUTH_MODE="token") is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("theirs")
    assert token() is None


def test_attacks_are_served_only_where_asked_for(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, flags in (("off.yaml", []), ("on.yaml", ["--with-attacks"])):
        main(["serve", str(trained.bundle), "--output", str(tmp_path / name), *flags])
        applications = yaml.safe_load((tmp_path / name).read_text())["applications"]
        assert [application["name"] for application in applications] == ["classifier", "attack"][: 1 + len(flags)]
    with pytest.raises(SystemExit):
        main(["serve", str(trained.bundle), "--no-attack", "--output", str(tmp_path / "no.yaml")])
    main(["serve", "--help"])
    assert "--no-attack" not in capsys.readouterr().out


def read_toml() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_container_installs_what_the_project_allows() -> None:
    """Every dependency at one version, each within the project's range, and only files that there are."""
    pinned = {}
    for line in (ROOT / "deploy/requirements.txt").read_text().splitlines():
        if "==" in line:
            requirement = Requirement(line.removesuffix("\\"))
            (version,) = requirement.specifier
            assert version.operator == "=="
            pinned[requirement.name] = version.version
    project = read_toml()["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["aws"]]
    for requirement in map(Requirement, [*wanted, *read_toml()["dependency-groups"]["container"]]):
        assert pinned[requirement.name] in requirement.specifier
    assert (ROOT / "deploy/requirements.txt").read_text().count("--hash=sha256:") >= len(pinned)
    text = (ROOT / "deploy/Containerfile").read_text()
    sent = (ROOT / ".dockerignore").read_text()
    for line in re.findall(r"^COPY --chown=ray (.+) \S+$", text, flags=re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists()
            assert f"!{source}" in sent or f"!{source}requirements.txt" in sent
    assert "USER ray" in text
    assert "python:3.11" in text
    shared = {key: value for key, value in re.findall(r"(RAY_SERVE_\w+)=(\S+)", text) if key in SETTINGS}
    assert len(shared) == 3
    assert shared.items() <= SETTINGS.items()


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.stem)
def test_a_job_says_how_it_is_submitted(path: Path) -> None:
    documentation = ast.get_docstring(ast.parse(path.read_text()))
    assert documentation is not None
    assert (
        f"ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/{path.name}"
        in documentation
    )
