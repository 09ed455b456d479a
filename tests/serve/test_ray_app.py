"""The application as Serve takes it. That it runs, and goes on when a replica dies, is tested by test_local_server."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gendist.artifact import digest
from gendist.protocols import UserError
from gendist.serve.http_app import http_app
from gendist.serve.request_ids import middlewares
from gendist.serve.server_config import server_config

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")  # of Ray's own

CLUSTER = Path(__file__).parents[2] / "cluster"


def serve_configs() -> dict[str, dict[str, Any]]:
    """By file, the Serve configs of cluster/."""
    service = yaml.safe_load((CLUSTER / "ray_service.yaml").read_text())
    return {
        "serve.yaml": yaml.safe_load((CLUSTER / "serve.yaml").read_text()),
        "ray_service.yaml": yaml.safe_load(service["spec"]["serveConfigV2"]),
    }


def test_asking_for_the_package_does_not_load_ray():
    program = "import sys, gendist.serve; print('ray' in sys.modules); print(gendist.serve.build_app.__module__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "gendist.serve.ray_app"]


@pytest.mark.parametrize("name", ["serve.yaml", "ray_service.yaml"])
def test_the_files_of_cluster_are_what_serve_takes(name):
    from ray._common.utils import import_attr
    from ray.serve.schema import ServeDeploySchema

    content = serve_configs()[name]
    schema = ServeDeploySchema.model_validate(content)
    known = {field: set(type(getattr(schema, field)).model_fields) for field in ("http_options", "logging_config")}
    assert set(content) <= set(ServeDeploySchema.model_fields)  # Serve would pass over what it does not know
    assert all(set(content[field]) <= fields for field, fields in known.items())
    (app,) = schema.applications
    deployment = import_attr(app.import_path)(app.args)._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == tuple(
        app.args["autoscaling"][key] for key in ("min_replicas", "max_replicas")
    )
    assert deployment.max_ongoing_requests > 10_000


def test_the_pods_of_ray_service_hold_what_the_application_is_told_of():
    service = yaml.safe_load((CLUSTER / "ray_service.yaml").read_text())
    cluster = service["spec"]["rayClusterConfig"]
    (app,) = serve_configs()["ray_service.yaml"]["applications"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        variables = {each["name"] for each in container["env"]}
        assert {app["args"]["token_variable"], "RAY_SERVE_ENABLE_HA_PROXY"} <= variables
        (mount,) = container["volumeMounts"]
        assert all(path.startswith(mount["mountPath"] + "/") for path in app["args"]["models"].values())
        assert {volume["name"] for volume in group["template"]["spec"]["volumes"]} == {mount["name"]}


def test_a_mistake_in_a_serve_config_is_one_line():
    from gendist.serve import build_app

    with pytest.raises(UserError, match="did you mean 'models'"):
        build_app({"model": {"a": "b"}})


def test_a_serve_config_says_who_may_call():
    from gendist.serve import build_app

    models = {"models": {"a": "b"}}
    with pytest.raises(UserError, match=r"token_file or token_variable, or say insecure"):
        build_app(models)
    for said in ({"token_file": "f"}, {"token_variable": "V"}, {"insecure": True}):
        build_app({**models, **said})


@pytest.mark.parametrize(
    "said", [["of-the-client"], ["two words"], ["\xfc"], ["x" * 1000], [], ["first", "second"], ["", "second"]]
)
def test_a_request_has_one_id_whatever_serve_says(said, hosted):
    """As Serve puts middlewares around an application, with its own, which has an id of the request."""
    from ray.serve._private.http_util import _apply_middlewares

    app = _apply_middlewares(http_app({"gmm": hosted["gmm"]}), middlewares())

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.get("/models", headers=[("x-request-id", each.encode("latin-1")) for each in said])

    (own,) = asyncio.run(asked()).headers.get_list("x-request-id")
    assert own == said[0] if said in (["of-the-client"], ["first", "second"]) else own not in said


def test_replicas_that_start_later_hold_the_same_model_or_none(artifacts, tmp_path, monkeypatch, caplog):
    from gendist.serve.local_server import _with_digests
    from gendist.serve.ray_app import Replica

    monkeypatch.setattr("gendist.serve.ray_app.write_log", lambda: None)
    shutil.copytree(artifacts["gmm"], tmp_path / "run")
    config = _with_digests(server_config({"models": {"gmm": str(tmp_path / "run")}}))
    content = config.model_dump(mode="json", exclude_unset=True)
    assert Replica(content).models["gmm"].digest == config.digests["gmm"] == digest(artifacts["gmm"])
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(artifacts["labelled_gmm"], tmp_path / "run")  # as one that is fitted anew
    with pytest.raises(UserError, match="another model lies there now"):
        Replica(content)
    assert "no replica can start" in caplog.text
    assert str(tmp_path / "run") in caplog.text


def test_a_replica_whose_thread_hangs_is_unhealthy(artifacts, monkeypatch):
    from gendist.serve.batcher import Work
    from gendist.serve.ray_app import Replica

    monkeypatch.setattr("gendist.serve.ray_app.write_log", lambda: None)  # this process keeps its own
    replica = Replica({"models": {"gmm": str(artifacts["gmm"])}, "limits": {"time_limit_s": 0.02}})
    replica.__serve_build_asgi_app__()
    goes_on, hangs = threading.Event(), threading.Event()

    def hang(*_: Any) -> list[Any]:
        hangs.set()
        goes_on.wait(60)
        return [None]

    async def in_one_loop() -> None:
        batcher = replica.http.state.server.batcher
        batcher._compute = hang
        replica.check_health()
        asked = asyncio.create_task(batcher.result(Work("key", 1, 8, None)))
        while not hangs.is_set():
            await asyncio.sleep(0.001)
        try:
            async with asyncio.timeout(60):
                while True:
                    try:
                        replica.check_health()
                    except RuntimeError:
                        break
                    await asyncio.sleep(0.001)
        finally:
            goes_on.set()
        with pytest.raises(TimeoutError):
            await asked
        async with asyncio.timeout(60):
            while batcher.stuck_for_s:
                await asyncio.sleep(0.001)
        replica.check_health()

    asyncio.run(in_one_loop())
