"""The Ray cluster that a run's `kind: ray` sections name: joined once, checked before anything is sampled or trained.

What is refused at once, with its reason: Ray that is missing or too old (before 2.56 its dashboard and jobs interface ran
code for strangers), a cluster that lets in whoever has no token, and one without room for the plan, on which Ray would wait
for ever. A cluster of our own (no address) lives as long as the run; it has a token that no file holds, sends no usage
statistics and starts no dashboard.

Left out on purpose: what runs on the cluster (`engines/ray.py`, `training/launch.py`), and starting nodes.
"""

import importlib
import logging
import os
import secrets
import signal
import threading
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Self

from packaging.version import Version

from selfsteer.recipe.sections import Launcher, Recipe

log = logging.getLogger(__name__)

OLDEST = "2.56"
"""The oldest Ray that is taken."""

_MODE, _TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"

_OBJECTS = 128 * 2**20
"""Bytes of the object store of a cluster of our own: prompts and completions pass through it, weights do not."""

_GCS_DOOR, _CLIENT_DOOR = "/ray.rpc.NodeInfoGcsService/CheckAlive", "/ray.rpc.RayletDriver/ClusterInfo"
"""What a stranger may ask first: of a cluster's head, and of its server for Ray clients (ray://)."""

_DOOR_SECONDS = 20.0


class ClusterError(OSError):
    """A Ray cluster that can't be joined, or that has lost what was running on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one section wants of the cluster at the same time."""

    field: str
    """The recipe's field with the number of copies."""
    copies: int
    cpus: float
    """Of each copy, which has to fit on one node; so do the gpus."""
    gpus: float


class Node(NamedTuple):
    """What a node of the cluster has in all."""

    cpus: float
    gpus: float


class SharedFolder(NamedTuple):
    """A model's folder, as the process of the run sees it; the nodes of the cluster have to see it too."""

    folder: str
    sizes: dict[str, int]
    """Bytes of each file."""

    @classmethod
    def of(cls, folder: str) -> Self:
        """The folder as it is on this machine."""
        path = Path(folder).absolute()
        return cls(str(path), {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()})

    def check(self) -> None:
        """Raises ValueError unless this machine sees the same files."""
        path, node = Path(self.folder), os.uname().nodename
        if not path.is_dir():
            raise ValueError(
                f"the node {node} does not see the model's folder {path}: put the model and the run folder (output) on"
                " storage that all nodes have at the same path"
            )
        seen = {name: (path / name).stat().st_size for name in self.sizes if (path / name).is_file()}
        if differing := sorted(name for name in self.sizes if seen.get(name) != self.sizes[name]):
            raise ValueError(
                f"the node {node} sees other files in {path} than the run does: {', '.join(differing)}. The folder has to be"
                " on storage that all nodes share"
            )


def load_ray() -> Any:
    """Ray as a module. Raises ValueError where it is missing or too old, or where its authentication is switched off."""
    try:
        found = version("ray")
    except PackageNotFoundError:
        raise ValueError(f"kind ray needs Ray {OLDEST} or newer: pip install 'selfsteer[ray]'") from None
    if Version(found) < Version(OLDEST):
        raise ValueError(
            f"Ray {found} is too old: before {OLDEST} it ran code for whoever reached its ports;"
            " pip install --upgrade 'selfsteer[ray]'"
        )
    if os.environ.setdefault(_MODE, "token").lower() != "token":
        raise ValueError(
            f"{_MODE} is {os.environ[_MODE]!r}: without token authentication whoever reaches the cluster's ports runs code"
            " there. Set it to token, here and for every node"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = importlib.import_module("ray")
    # It reads its settings when it is imported, perhaps before us; this is how it reads them again itself.
    ray._raylet.Config.initialize("")
    return ray


def plans(recipe: Recipe) -> list[Plan]:
    """What the recipe's sections of kind ray want; they take turns, so each has the cluster to itself."""
    wanted: list[Plan] = []
    engines = {"engine": recipe.engine, "principles.engine": recipe.principles.engine, "judge.engine": recipe.judge.engine}
    for name, engine in engines.items():
        if engine is not None and engine.kind == "ray":
            wanted.append(Plan(field=f"{name}.replicas", copies=engine.replicas, cpus=engine.cpus, gpus=engine.gpus))
    if recipe.launcher.kind == "ray":
        wanted.append(launcher_plan(recipe.launcher))
    return wanted


def launcher_plan(launcher: Launcher) -> Plan:
    """What a training wants."""
    assert launcher.processes is not None
    return Plan(field="launcher.processes", copies=launcher.processes, cpus=launcher.cpus, gpus=launcher.gpus)


@contextmanager
def cluster_of(recipe: Recipe) -> Generator[None]:
    """Joins the cluster that the recipe needs, if any, while the block runs.

    Raises ValueError where the recipe names two clusters, and for a cluster that is refused; `ClusterError` where there is
    none at the address.
    """
    wanted = plans(recipe)
    if not wanted:
        yield
        return
    sections = (recipe.engine, recipe.principles.engine, recipe.judge.engine, recipe.launcher)
    addresses = {section.address for section in sections if section is not None and section.kind == "ray"}
    if len(addresses) > 1:
        raise ValueError(f"a run joins one Ray cluster, and the recipe names {sorted(map(str, addresses))}: set one address")
    with joined(addresses.pop()) as nodes:
        for plan in wanted:
            check_room(plan, nodes)
        yield


@contextmanager
def joined(address: str | None) -> Generator[list[Node]]:
    """Yields the nodes of the cluster; one that this process is in already is kept, and not left at the end."""
    ray = load_ray()
    ours = not ray.is_initialized()
    if ours:
        _join(ray, address)
    try:
        head: str = ray.get_runtime_context().gcs_address
        _check_door(address if address is not None and "://" in address else head)
        yield _nodes(ray)
    finally:
        if ours:
            ray.shutdown()


def _join(ray: Any, address: str | None) -> None:
    settings: dict[str, Any] = {"configure_logging": False, "log_to_driver": True}
    if address is None:
        # Ray's own way writes a token to ~/.ray/auth_token, where everyone may read it.
        if not os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ.setdefault(_TOKEN, secrets.token_hex(32))
        settings |= {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECTS}
        log.info("starting Ray on this machine")
    else:
        settings["address"] = address
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**settings)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise ClusterError(f"the Ray cluster {address or 'on this machine'} can't be joined: {error}") from error
    finally:
        # ray.init puts in one of its own, which ends the process at once; ours drains.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _check_door(address: str) -> None:
    """Raises ValueError unless the cluster turns away who comes without a token."""
    grpc: Any = importlib.import_module("grpc")
    scheme, _, rest = address.rpartition("://")
    with grpc.insecure_channel(rest.split("/")[0], options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_CLIENT_DOOR if scheme else _GCS_DOOR)(b"", timeout=_DOOR_SECONDS)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise ClusterError(f"the Ray cluster {address} does not answer: {error.details()}") from error
    raise ValueError(
        f"the Ray cluster {address} lets in whoever comes without a token, and would run their code. Start every node of"
        f" it with {_MODE}=token and one token (ray get-auth-token --generate; docs/engines.md)"
    )


def _nodes(ray: Any) -> list[Node]:
    resources: Iterable[Mapping[str, float]] = (node["Resources"] for node in ray.nodes() if node["Alive"])
    return [Node(found.get("CPU", 0.0), found.get("GPU", 0.0)) for found in resources]


def check_room(plan: Plan, nodes: Sequence[Node]) -> None:
    """Raises ValueError, with a table, unless all copies fit into the cluster at once, each on one node.

    What others use at the moment is not looked at: they may be done when it is needed.
    """
    fitting = sum(_copies_on(node, plan) for node in nodes)
    if fitting >= plan.copies:
        return
    rows = [
        ("each copy, on one node", plan.cpus, plan.gpus),
        (f"{plan.copies} copies", plan.copies * plan.cpus, plan.copies * plan.gpus),
        ("the cluster", sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)),
        *((f"{count} node{'s' if count > 1 else ''} of", *node) for node, count in Counter(nodes).most_common()),
    ]
    table = "\n".join(f"  {name:<24}{cpus:>8g} CPUs{gpus:>6g} GPUs" for name, cpus, gpus in rows)
    section = plan.field.rpartition(".")[0]
    raise ValueError(
        f"{plan.field}: the Ray cluster has room for {fitting} of {plan.copies} copies\n{table}\n"
        f"Lower {plan.field}, {section}.cpus or {section}.gpus, or start more nodes first; Ray would wait for them for ever."
    )


def _copies_on(node: Node, plan: Plan) -> int:
    rooms = [int(has // wants) for has, wants in zip(node, (plan.cpus, plan.gpus), strict=True) if wants > 0]
    return min(rooms)
