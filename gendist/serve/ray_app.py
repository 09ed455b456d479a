"""The application on Ray Serve: replicas that hold all models, with the HTTP application as their ingress.

A replica is a process with one thread that computes; what is computed together is decided by its batcher and not by Serve,
which only spreads the requests.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from ray import serve

from gendist.serve.hosted_model import HostedModel
from gendist.serve.http_app import http_app
from gendist.serve.server_config import ServerConfig, server_config

NAME = "gendist"

# Serve's own bound of a replica's requests must never be what holds a batch back (ray #43288): the queue has its own bounds,
# in rows and bytes, and says so to whoever comes when it is full.
MAX_ONGOING_REQUESTS = 1_000_000
QUIET = {"enable_access_log": False, "log_level": "WARNING"}


@serve.ingress()
class Replica:
    """All models of a server, each in memory once, behind one batcher."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        import torch

        torch.set_num_threads(1)
        config = server_config(content)
        self._config = config
        self._models = {name: HostedModel(name, path) for name, path in config.models.items()}

    def __serve_build_asgi_app__(self) -> Any:
        self._http = http_app(self._models, self._config.limits)
        return self._http


def build_app(args: Mapping[str, Any]) -> serve.Application:
    """The application of a Serve config file whose `args` are those of `ServerConfig`; UserError where they are not."""
    config = server_config(args)
    return application(config)


def application(config: ServerConfig) -> serve.Application:
    autoscaling = config.autoscaling
    deployment: Any = serve.deployment(
        name="models",
        num_replicas=config.num_replicas if autoscaling is None else None,
        autoscaling_config=None if autoscaling is None else autoscaling.model_dump(),
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 1, "num_gpus": config.gpus_per_replica},
        # What runs is finished: no request takes longer than its time limit.
        graceful_shutdown_timeout_s=config.limits.time_limit_s + 5.0,
        health_check_period_s=5.0,
        health_check_timeout_s=30.0,
        logging_config=QUIET,
    )(Replica)
    bound: serve.Application = deployment.bind(config.model_dump(mode="json", exclude_unset=True))
    return bound
