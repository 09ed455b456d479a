"""Fitted models of any family behind HTTP: see `http_app` for the routes, `batcher` for what is computed when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gendist.serve.ray_app import build_app as build_app


def __getattr__(name: str) -> Any:
    """`build_app`, for Serve config files, without importing ray for those who do not ask for it."""
    if name == "build_app":
        from gendist.serve.ray_app import build_app

        return build_app
    raise AttributeError(f"module 'gendist.serve' has no attribute '{name}'")
