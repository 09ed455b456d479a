"""The application on Ray Serve: replicas that hold all models, with the HTTP application as their ingress.

A replica is a process with one thread that computes; what is computed together is decided by its batcher and not by Serve,
which only spreads the requests.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from fastapi import FastAPI
from ray import serve

from gendist.protocols import UserError
from gendist.serve.hosted_model import HostedModel
from gendist.serve.http_app import http_app
from gendist.serve.server_config import ServerConfig, server_config
from gendist.serve.server_log import write_log

logger = logging.getLogger("gendist")

NAME = "gendist"

# Serve's own bound of a replica's requests must never be what holds a batch back (ray #43288): the queue has its own bounds,
# in rows and bytes, and says so to whoever comes when it is full.
MAX_ONGOING_REQUESTS = 1_000_000
QUIET = {"enable_access_log": False, "log_level": "WARNING"}  # the application has an access log of its own
HEALTH_CHECK_PERIOD_S, HEALTH_CHECK_TIMEOUT_S = 5.0, 30.0
SHUTDOWN_S = 5.0  # on top of the time limit of what runs
STUCK_AFTER = 2.0  # time limits in one batch


class Replica:
    """All models of a server, each in memory once, behind one batcher."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        """content: of a ServerConfig, in plain types."""
        import torch

        write_log()
        torch.set_num_threads(1)
        self.config = server_config(content)
        device = "cuda" if self.config.gpus_per_replica > 0 else "cpu"
        try:
            self.models = {
                name: HostedModel(name, path, device, self.config.digests.get(name))
                for name, path in self.config.models.items()
            }
        except UserError as error:
            logger.error("no replica can start: %s", error)  # Serve tries again, and tells its own log alone
            raise

    def __serve_build_asgi_app__(self) -> FastAPI:
        tokens = self.config.tokens()
        self.http = http_app(
            self.models,
            self.config.limits,
            tokens=tokens,
            loopback_only=not (tokens or self.config.insecure),
            cors_origins=self.config.cors_origins,
        )
        # What stands now stays. A collection that went through it (300,000 objects of torch and Ray alone) would hold up all
        # requests for 0.2 s and more, every few thousand of them.
        gc.collect()
        gc.freeze()
        return self.http

    def check_health(self) -> None:
        """Serve asks this now and then, and puts another replica in the place of one that raises, or that does not answer since
        its event loop is held up."""
        stuck_for_s = self.http.state.server.batcher.stuck_for_s
        if stuck_for_s > STUCK_AFTER * self.config.limits.time_limit_s:
            raise RuntimeError(f"the thread that computes has been in one batch for {stuck_for_s:.0f} s")


def build_app(args: Mapping[str, Any]) -> serve.Application:
    """The application of a Serve config file, whose `args` are the fields of `ServerConfig`; UserError where they are not, or
    where nobody said who may call: the proxies of a cluster listen for all."""
    config = server_config(args)
    if config.token_file is None and config.token_variable is None and not config.insecure:
        raise UserError(
            "serve: whoever reaches the cluster could call the models; name the tokens that a caller must have by "
            "token_file or token_variable, or say insecure: true"
        )
    return application(config)


def application(config: ServerConfig) -> serve.Application:
    scaling: dict[str, Any] = {"num_replicas": config.num_replicas}
    if config.autoscaling is not None:
        scaling = {"autoscaling_config": config.autoscaling.model_dump()}
    deployment: Any = serve.deployment(
        name="models",
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 1, "num_gpus": config.gpus_per_replica},
        graceful_shutdown_timeout_s=config.limits.time_limit_s + SHUTDOWN_S,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        logging_config=QUIET,
        **scaling,
    )(serve.ingress()(Replica))
    # By their own names, not as defaults: what was left out stays left out.
    bound: serve.Application = deployment.bind(config.model_dump(mode="json", exclude_unset=True))
    return bound
