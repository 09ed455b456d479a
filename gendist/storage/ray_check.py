"""Before training begins on the nodes of a Ray cluster: whether all of them can write to the run directory, and see what the
others write."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gendist.errors import UserError
from gendist.storage.check import Marks
from gendist.storage.objects import is_url

ANSWER_LIMIT_S = 120.0  # a node may have to start a worker and to install what the run needs
REMOVAL_LIMIT_S = 10.0


def check_storage(place: str, uses_gpu: bool = False) -> None:
    """UserError, which names the node, the place and the reason, where one does not share the place. No trace stays of it.

    place     a path or a URL
    uses_gpu  then only the nodes that have one take part

    Nodes that join later are not asked: what they do not see they say themselves.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU" if uses_gpu else "CPU", 0) >= 1]
    here = ray.get_runtime_context().get_node_id()
    if not is_url(place) and all(node["NodeID"] == here for node in nodes):
        return  # this machine has made the folder
    driver = f"driver-{socket.gethostname()}"
    by_name = {f"{node['NodeManagerAddress']}-{node['NodeID'][:6]}": node for node in nodes}
    names = [driver, *by_name]
    marks = Marks(place, uuid.uuid4().hex[:12])
    try:
        if why := marks.leave(driver):
            raise UserError(f"{place}: {why} on this machine")
        _ask(by_name, place, {name: _on(node, _leave).remote(marks, name) for name, node in by_name.items()})
        _ask(by_name, place, {name: _on(node, _missing).remote(marks, names) for name, node in by_name.items()})
        if why := marks.missing(names):
            raise UserError(f"{place}: {why} on this machine")
    except UserError:
        _remove_everywhere(by_name, marks, names)
        raise
    finally:
        marks.remove(names)


def _leave(marks: Marks, name: str) -> str | None:
    return marks.leave(name)


def _missing(marks: Marks, names: Sequence[str]) -> str | None:
    return marks.missing(names)


def _remove(marks: Marks, names: Sequence[str]) -> None:
    marks.remove(names)


def _remove_everywhere(nodes: dict[str, Any], marks: Marks, names: Sequence[str]) -> None:
    """What is not shared, each machine has to remove by itself."""
    removing = [_on(node, _remove).remote(marks, names) for node in nodes.values()]
    ray.wait(removing, num_returns=len(removing), timeout=REMOVAL_LIMIT_S)


def _on(node: dict[str, Any], function: Callable[..., Any]) -> Any:
    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(num_cpus=0, max_retries=1)(function).options(scheduling_strategy=strategy)


def _ask(nodes: dict[str, Any], place: str, answers: dict[str, Any]) -> None:
    """UserError with the first reason that a node gives, or where one does not answer."""
    asked = {answer: name for name, answer in answers.items()}
    done, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_LIMIT_S)
    failures: list[tuple[str, str]] = []
    for answer in done:
        try:
            why = ray.get(answer)
        except ray.exceptions.RayError as error:
            why = f"the look at it has failed ({(str(error).strip().splitlines() or [type(error).__name__])[0]})"
        if why:
            failures.append((asked[answer], why))
    failures += [(asked[answer], f"no answer in {ANSWER_LIMIT_S:.0f} s") for answer in silent]
    for answer in silent:
        ray.cancel(answer, force=True)
    if failures:
        name, why = failures[0]
        others = f" (and on {len(failures) - 1} nodes more)" if len(failures) > 1 else ""
        raise UserError(
            f"{place}: {why} on node {nodes[name]['NodeManagerAddress']}{others}; --run-dir must be a folder or a URL that all "
            "nodes can write to"
        )
