"""Fitted models of any family behind HTTP: see `http_app` for the routes, `batcher` for what is computed when."""
