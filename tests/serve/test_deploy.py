"""cluster/serve.yaml, given to a cluster with a token by `serve deploy`, as an operator does it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import gendist
from gendist.serve.client import Client

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "cluster"))
import testbed  # noqa: E402

TOKEN = "plantedTokenOfAServer0123456789"
SERVE = [sys.executable, "-m", "ray.serve.scripts"]


@pytest.mark.ray
@pytest.mark.multihost
@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_serve_deploy_answers_with_the_bytes_of_the_model(artifacts, tmp_path, monkeypatch):
    if reason := testbed.why_not():
        pytest.skip(reason)
    config = yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())
    args = config["applications"][0]["args"]
    args["models"] = {"gmm": str(artifacts["gmm"])}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv(args["token_variable"], TOKEN)
    monkeypatch.setitem(testbed.RAY_SETTINGS, "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # a busy machine takes its time
    with testbed.Testbed(num_hosts=1, num_cpus=2) as bed:
        bed.start_ray()

        def serve(*arguments: str, token: str | None) -> subprocess.CompletedProcess[str]:
            environment = {name: value for name, value in bed.environment().items() if not name.startswith("RAY_AUTH")}
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token or ""}
            command = [*SERVE, *arguments, "--address", bed.jobs_address]
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

        assert serve("deploy", str(tmp_path / "serve.yaml"), token="f" * 64).returncode != 0
        done = serve("deploy", str(tmp_path / "serve.yaml"), token=bed.token)
        assert done.returncode == 0, done.stderr
        await_application(bed)
        url = f"http://{bed.hosts[0].address}:{config['http_options']['port']}"
        x = Client(url, token=TOKEN).sample("gmm", 50, seed=3).x
        assert np.asarray(x).tobytes() == np.asarray(gendist.load(artifacts["gmm"]).sample(50, seed=3)).tobytes()
        for path in ("/models", "/readyz", "/metrics"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(url + path, timeout=30)
        # Neither token stands in what Serve keeps of the application, or in a log.
        kept = b"".join(path.read_bytes() for path in bed.folder.rglob("*") if path.is_file() and path.name != "token")
        assert bed.token is not None
        assert bed.token.encode() not in kept
        assert TOKEN.encode() not in kept + json.dumps(applications(bed)).encode()


def applications(bed: testbed.Testbed) -> dict[str, Any]:
    """What Serve says of what it runs."""
    request = urllib.request.Request(
        f"{bed.jobs_address}/api/serve/applications/", headers={"Authorization": f"Bearer {bed.token}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["applications"]


def await_application(bed: testbed.Testbed) -> None:
    until = time.monotonic() + 240
    while (told := applications(bed).get("gendist", {})).get("status") != "RUNNING":
        assert told.get("status") in (None, "DEPLOYING", "NOT_STARTED"), told["message"]
        assert time.monotonic() < until, told
        time.sleep(0.2)
