"""Where a computation is done: in this process, or on Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gendist.blocks import LocalBlocks
from gendist.config import ClusterConfig
from gendist.data.domains import MakeBlocks
from gendist.protocols import UserError
from gendist.secrets_in_urls import without_secrets


@contextmanager
def execution(cluster: ClusterConfig, address: str | None = None) -> Iterator[MakeBlocks]:
    """Yields what makes blocks; the connection to Ray, where there is one, ends with the `with` block.

    address   of a Ray cluster; None is this machine (see `ray_cluster`)

    UserError where there is an address, but no worker to send there.
    """
    num_workers = cluster.fixed_num_workers
    if num_workers == 0:
        if address is not None:
            raise UserError(
                f"--address {without_secrets(address)}: cluster.num_workers is 0, which computes here; set it to 1 or more"
            )
        if cluster.use_gpu:
            check_gpu_here()
        yield LocalBlocks
        return
    # Only now: neither import needs to be paid for without Ray.
    from gendist.blocks.ray_blocks import RayBlocks
    from gendist.ray_cluster import ray_cluster

    num_gpus = 1 if cluster.use_gpu else 0
    with ray_cluster(num_workers, address, num_gpus):
        yield lambda load, leaves, most, keep: RayBlocks(load, leaves, num_workers, most, keep, num_gpus)


def check_gpu_here() -> None:
    """UserError where torch finds no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            "cluster.use_gpu: torch finds no GPU on this machine; leave it out, or install a torch that supports yours"
        )
