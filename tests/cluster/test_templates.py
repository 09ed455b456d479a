"""What an operator edits, against what reads it: Ray's own schemas and options where its package has them, and the fields of
KubeRay's reference where not. Nothing here calls a cloud, or a cluster. The Serve configs are tested by serve/test_ray_app."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

import gendist
from gendist.config import load_spec

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")  # of Ray's own

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHER = ["aws.yaml", "on_premise.yaml"]
KUBERAY = ["ray_cluster.yaml", "ray_job.yaml", "ray_service.yaml"]
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD")

# https://docs.ray.io/en/master/kuberay/references/api.html, of KubeRay 1.7.0; `authOptions.secretName` came with 1.6.
FIELDS = {
    "RayCluster": {
        "upgradeStrategy", "authOptions", "suspend", "managedBy", "autoscalerOptions", "headServiceAnnotations",
        "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "historyServerOptions", "networkPolicy", "tlsOptions",
        "headGroupSpec", "rayVersion", "workerGroupSpecs",
    },
    "RayJob": {
        "activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata", "clusterSelector",
        "submitterConfig", "managedBy", "deletionStrategy", "entrypoint", "runtimeEnvYAML", "jobId", "submissionMode",
        "entrypointResources", "entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished", "preRunningDeadlineSeconds",
        "shutdownAfterJobFinishes", "suspend",
    },
    "RayService": {
        "rayClusterDeletionDelaySeconds", "serveService", "upgradeStrategy", "managedBy", "serveConfigV2", "rayClusterConfig",
        "excludeHeadPodFromServeSvc", "suspend",
    },
    "head": {"template", "headService", "enableIngress", "ingressOptions", "resources", "labels", "rayStartParams",
             "serviceType"},
    "workers": {
        "suspend", "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "priority", "resources",
        "labels", "rayStartParams", "template", "scaleStrategy", "numOfHosts",
    },
    "auth": {"enableK8sTokenAuth", "secretName", "mode"},
    "autoscaler": {
        "resources", "image", "imagePullPolicy", "securityContext", "idleTimeoutSeconds", "upscalingMode", "version", "env",
        "envFrom", "volumeMounts", "command", "args",
    },
}  # fmt: skip
POD = {"containers", "volumes", "securityContext", "tolerations", "nodeSelector", "serviceAccountName", "imagePullSecrets"}
CONTAINER = {"name", "image", "env", "ports", "resources", "volumeMounts", "readinessProbe", "livenessProbe", "securityContext"}


def ray_start_options() -> set[str]:
    from ray.scripts.scripts import start

    return {option for parameter in start.params for option in (*parameter.opts, *parameter.secondary_opts)}


def options_of(command: str) -> set[str]:
    """Of `ray start` within a command line."""
    started = command.split("ray start ", 1)[1]
    return set(re.findall(r"--[a-z-]+", started.split(";")[0]))


# Ray's cluster launcher


def prepared(name: str) -> dict[str, Any]:
    """As `ray up` does it, before it calls anybody."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    content = yaml.safe_load((CLUSTER / name).read_text())
    config = prepare_config(copy.deepcopy(content))
    validate_config(config)
    return config


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_takes_the_files_of_its_launcher(name):
    config = prepared(name)
    assert config["head_node_type"] in config["available_node_types"]


@pytest.mark.parametrize("name", LAUNCHER)
def test_a_mistake_in_them_would_be_seen(name):
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    content = yaml.safe_load((CLUSTER / name).read_text())
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**content, "worker_start_ray_command": []}))


@pytest.mark.parametrize("name", LAUNCHER)
def test_every_ray_that_the_launcher_starts_asks_for_the_token_that_it_brings(name):
    content = prepared(name)
    token_file = "~/.ray/auth_token"
    assert content["file_mounts"][token_file] == token_file
    for commands in (content["head_start_ray_commands"], content["worker_start_ray_commands"]):
        (start,) = [command for command in commands if "ray start" in command]
        assert "RAY_AUTH_MODE=token" in start
        assert f'RAY_AUTH_TOKEN_PATH="{token_file.replace("~", "$HOME")}"' in start
        assert options_of(start) <= ray_start_options()
        shlex.split(start)
    assert not SECRET.search(re.sub("RAY_AUTH_TOKEN_PATH|auth_token", "", yaml.safe_dump(content["file_mounts"])))


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_launcher_installs_what_there_is(name):
    extras = set(re.findall(r"\[([a-z,-]+)\]\"", " ".join(prepared(name)["setup_commands"]))) - {"default"}
    (ours,) = extras
    assert set(ours.split(",")) <= optional_dependencies()


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_commands_of_the_launcher_are_whole(name):
    """Of a line of YAML, what stands behind ` #` is no part."""
    config = prepared(name)
    for key in ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for command in config.get(key, []):
            subprocess.run(["bash", "-n", "-c", command], check=True, timeout=60)


def test_nodes_on_aws_have_an_image_and_a_profile_which_are_marked_and_explained():
    """Ray's own image has an older Python, and its own role may not hand the workers theirs."""
    text, page = (CLUSTER / "aws.yaml").read_text(), (CLUSTER / "README.md").read_text()
    nodes = {name: node["node_config"] for name, node in prepared("aws.yaml")["available_node_types"].items()}
    (image,) = {node["ImageId"] for node in nodes.values()}  # one, since the Python of all nodes must be the same
    assert image.startswith("ami-")
    assert re.search(rf"ImageId: (&\w+ )?{image} # <-", text)
    profiles = {name: node["IamInstanceProfile"]["Name"] for name, node in nodes.items()}
    assert len(set(profiles.values())) == 2
    for profile in profiles.values():
        assert f"IamInstanceProfile: {{Name: {profile}}} # <-" in text
        assert f"**`{profile}`**" in page
    (policy,) = map(json.loads, re.findall(r"```json\n(.*?)```", page, re.DOTALL))
    assert policy["Action"] == "iam:PassRole"
    assert policy["Resource"].endswith(f":role/{profiles['gpu']}")


def test_the_python_of_a_node_is_checked_before_anything_is_installed():
    first = prepared("aws.yaml")["setup_commands"][0]
    program = shlex.split(first)[2]
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
    older = program.replace("sys.version_info <", "(3, 10, 9) <")
    assert older != program
    done = subprocess.run([sys.executable, "-c", older], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, "choose another ImageId" in done.stderr) == (1, True)


def test_cloud_workers_come_and_go_and_the_head_computes_nothing():
    types = prepared("aws.yaml")["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["gpu"]["min_workers"] == 0
    assert types["gpu"]["max_workers"] > 0


# KubeRay


def manifests(name: str) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all((CLUSTER / name).read_text()) if each]


def resource(name: str) -> dict[str, Any]:
    (found,) = [each for each in manifests(name) if each["apiVersion"] == "ray.io/v1"]
    return found


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def groups(cluster: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield cluster["headGroupSpec"]
    yield from cluster["workerGroupSpecs"]


@pytest.mark.parametrize("name", KUBERAY)
def test_every_field_is_one_of_kuberay(name):
    manifest = resource(name)
    cluster = cluster_of(manifest)
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(manifest["spec"]) <= FIELDS[manifest["kind"]]
    assert set(cluster) <= FIELDS["RayCluster"]
    assert set(cluster["authOptions"]) <= FIELDS["auth"]
    assert set(cluster.get("autoscalerOptions", {})) <= FIELDS["autoscaler"]
    assert set(cluster["headGroupSpec"]) <= FIELDS["head"]
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= FIELDS["workers"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups(cluster):
        pod = group["template"]["spec"]
        assert set(pod) <= POD
        (container,) = pod["containers"]
        assert set(container) <= CONTAINER
        # What Kubernetes takes for a name, and what a mount must name.
        assert all(re.fullmatch(r"[a-z0-9-]{1,15}", port["name"]) for port in container.get("ports", []))
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_run_what_is_pinned_and_start_ray_as_it_can_be_started(name):
    cluster = cluster_of(resource(name))
    assert cluster["rayVersion"] == PINNED["ray"]
    assert tuple(map(int, cluster["rayVersion"].split(".")[:2])) >= (2, 52)  # without which there is no token
    for group in groups(cluster):
        (container,) = group["template"]["spec"]["containers"]
        assert re.fullmatch(rf"\S+/gendist:{re.escape(gendist.__version__)}(-cuda)?", container["image"])
        assert {f"--{key}" for key in group["rayStartParams"]} <= ray_start_options()
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        needs = container["resources"]
        assert needs["requests"] == needs["limits"]  # Ray takes the limits for what the node has
        assert ("nvidia.com/gpu" in needs["limits"]) == container["image"].endswith("-cuda")
        store = int(group["rayStartParams"].get("object-store-memory", 0))
        assert store <= in_bytes(needs["limits"]["memory"]) / 2
        context = group["template"]["spec"]["securityContext"]
        assert context["runAsNonRoot"]
        assert f"USER {context['runAsUser']}:{context['runAsGroup']}" in dockerfile()


def in_bytes(quantity: str) -> int:
    return int(quantity.removesuffix("Gi")) * 2**30


@pytest.mark.parametrize("name", KUBERAY)
def test_secrets_are_named_and_never_told(name):
    cluster = cluster_of(resource(name))
    assert cluster["authOptions"]["mode"] == "token"
    assert f"kubectl create secret generic {cluster['authOptions']['secretName']} " in (CLUSTER / name).read_text()
    assert {each["kind"] for each in manifests(name)} <= {"RayCluster", "RayJob", "RayService", "ConfigMap"}
    for group in groups(cluster):
        (container,) = group["template"]["spec"]["containers"]
        for variable in container["env"]:
            if SECRET.search(variable["name"]):
                assert set(variable) == {"name", "valueFrom"}
                assert set(variable["valueFrom"]) == {"secretKeyRef"}
    assert not re.search("[0-9a-fA-F]{24}", (CLUSTER / name).read_text())


@pytest.mark.parametrize("name", KUBERAY)
def test_every_variable_is_one_that_somebody_reads(name):
    import ray

    folder = Path(ray.__file__).parent
    places = [folder / "serve" / "_private", folder / "_private", folder / "_common"]
    read = "".join(path.read_text() for place in places for path in place.rglob("*.py"))
    ours = {"WANDB_API_KEY", "GENDIST_TOKENS"}  # wandb's, and what the service's `token_variable` names
    for group in groups(cluster_of(resource(name))):
        for variable in group["template"]["spec"]["containers"][0]["env"]:
            assert variable["name"] in ours or re.search(rf"\b{variable['name']}\b", read), variable["name"]


def test_the_job_fits_its_spec_on_the_workers_that_it_has():
    from gendist.launch.cli import app

    job, (config,) = resource("ray_job.yaml"), [each for each in manifests("ray_job.yaml") if each["kind"] == "ConfigMap"]
    program, verb, path, *options = shlex.split(job["spec"]["entrypoint"])
    assert (program, verb) == ("gendist", "fit")
    head, *workers = groups(cluster_of(job))
    mounts = {mount["name"]: mount["mountPath"] for mount in head["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert path == f"{mounts['spec']}/spec.yaml"
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert set(given) <= options_of_verb(app, "fit")
    assert given["--run-dir"].startswith(mounts["shared"] + "/")
    assert given["--address"] == "auto"
    spec = load_spec(yaml.safe_load(config["data"]["spec.yaml"]))
    cpus = sum(group["replicas"] * int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
               for group in workers)  # fmt: skip
    assert spec.cluster.fixed_num_workers <= cpus


def options_of_verb(app: Any, verb: str) -> set[str]:
    import typer.main

    return {option for parameter in typer.main.get_command(app).commands[verb].params for option in parameter.opts}


# The image, SLURM, and what is said of all of it


def dockerfile() -> str:
    return (CLUSTER / "Dockerfile").read_text()


def optional_dependencies() -> set[str]:
    import tomllib

    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def test_the_image_is_pinned_and_not_run_by_root():
    steps = [line.split(maxsplit=1) for line in re.sub(r"\\\n", " ", dockerfile()).splitlines() if line and line[0] not in "# "]
    said = [name for name, _ in steps]
    assert set(said) <= {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "USER", "ENV", "CMD"}
    (base,) = [rest for name, rest in steps if name == "FROM"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)
    (user,) = [rest for name, rest in steps if name == "USER"]
    assert not user.startswith(("0", "root"))
    assert said.index("USER") > max(place for place, name in enumerate(said) if name == "RUN")
    for name, rest in steps:
        if name == "RUN" and "pip install" in rest:
            assert all("--constraint constraints.txt" in part for part in rest.split("&&") if "pip install" in part)
        assert not re.search("(TOKEN|KEY|SECRET|PASSWORD)=", rest)
    given = {name: value.strip('"') for name, _, value in (rest.partition("=") for kind, rest in steps if kind == "ARG")}
    assert set(given["EXTRAS"].split(",")) <= optional_dependencies()
    assert given["TORCH_INDEX"].endswith("/cpu")
    assert "torch" in PINNED
    assert "wget" in dockerfile()  # by which KubeRay asks a pod how it is


def test_the_image_is_given_what_it_copies():
    kept = {line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {each for line in dockerfile().splitlines() if line.startswith("COPY") for each in line.split()[1:-1]}
    assert copied == kept
    assert all((ROOT / each).exists() for each in copied)


def test_slurm_starts_ray_as_it_can_be_started():
    script = re.sub(r"\\\n", " ", (CLUSTER / "slurm.sh").read_text())
    (start,) = re.findall(r" ray start .*", script)
    assert set(re.findall(r"--[a-z-]+", start.split(">")[0])) <= ray_start_options()
    for line in (line for line in script.splitlines() if "bash -c" in line and " ray " in line):
        assert set(re.findall(r"--[a-z-]+", line.split(" ray ", 1)[1])) <= ray_start_options()
    assert "RAY_AUTH_MODE=token" in script


def test_the_page_explains_every_file():
    page = (CLUSTER / "README.md").read_text()
    for path in CLUSTER.iterdir():
        if path.is_file() and path.suffix != ".dockerignore" and path.name != "README.md":
            assert f"`{path.name}`" in page, path.name
    for path in re.findall(r"`([a-z_]+\.(?:ya?ml|sh|py))`", page):
        assert (CLUSTER / path).exists() or (ROOT / path).exists(), path


def test_what_is_pinned_is_what_is_tested():
    assert version("ray") == PINNED["ray"]
