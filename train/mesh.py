"""Devices: one mesh, batches split over it, state copied or split (FSDP)."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train import config as configs

Array = Any
Tree = Any

AXIS = "data"


def start(hosts: configs.Hosts) -> None:
    """Join the other hosts; call before anything asks JAX for a device."""
    if not hosts.coordinator:
        return
    if hosts.coordinator == "auto":
        jax.distributed.initialize()
        return
    jax.distributed.initialize(
        coordinator_address=hosts.coordinator,
        num_processes=hosts.count,
        process_id=hosts.index,
    )


def make() -> Mesh:
    """All devices of all hosts in one line."""
    return Mesh(np.asarray(jax.devices()), (AXIS,))


def check_batch(size: int, mesh: Mesh, what: str) -> None:
    if size % mesh.size:
        raise ValueError(
            f"config.{what} is {size}, and there are {mesh.size} devices: choose a "
            f"multiple of {mesh.size}."
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(state: Tree, mesh: Mesh, *, fsdp: bool) -> Tree:
    """A sharding for each leaf: copied, or split on its largest axis that divides."""

    def place(leaf: Any) -> NamedSharding:
        shape = np.shape(leaf)
        divisible = [i for i, n in enumerate(shape) if n and n % mesh.size == 0]
        if not fsdp or mesh.size == 1 or not divisible:
            return replicated(mesh)
        axis = max(divisible, key=lambda i: shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))

    return jax.tree.map(place, state)


def is_key(leaf: Any) -> bool:
    """True for the random keys of a stream (NNX): arrays that NumPy cannot hold."""
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def as_key(data: Array, like: Array) -> Array:
    """The key of this data, of the generator of another key."""
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))


def put(tree: Tree, shardings: Tree) -> Tree:
    """A tree of arrays, the same on every host, as arrays on the mesh.

    Always copies: a step may donate the new arrays while the old ones are in use.
    """

    def place(leaf: Any, sharding: NamedSharding) -> Array:
        if is_key(leaf):
            return as_key(place(jax.random.key_data(leaf), sharding), leaf)
        host = np.array(leaf)
        if jax.process_count() == 1:
            return jax.device_put(host, sharding, may_alias=False)
        return jax.make_array_from_callback(host.shape, sharding, lambda i: host[i])

    return jax.tree.map(place, tree, shardings)


def get(tree: Tree) -> Tree:
    """A tree of arrays on the mesh, as whole arrays on one device of every host."""

    def fetch(leaf: Any) -> Array:
        if is_key(leaf):
            return as_key(fetch(jax.random.key_data(leaf)), leaf)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            if leaf.is_fully_replicated:
                leaf = leaf.addressable_shards[0].data
            else:
                leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_put(np.array(leaf), jax.local_devices()[0])

    return jax.tree.map(fetch, tree)


def share(rows: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """This host's rows, as its part of a batch that is split over the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return {
        k: jax.make_array_from_process_local_data(sharding, x) for k, x in rows.items()
    }


def local(order: np.ndarray) -> np.ndarray:
    """This host's columns of an order i64[steps, batch]."""
    size = order.shape[1] // jax.process_count()
    first = jax.process_index() * size
    return order[:, first : first + size]


def first_says(text: str) -> str:
    """The text of the first host, on every host."""
    if jax.process_count() == 1:
        return text
    size = multihost_utils.broadcast_one_to_all(np.int32(len(text.encode())))
    padded = np.zeros(int(size), np.uint8)
    if is_first():
        padded[:] = np.frombuffer(text.encode(), np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(padded)).decode()


def wait(name: str) -> None:
    """Every host waits here for the others."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def is_first() -> bool:
    return jax.process_index() == 0


def threads() -> int:
    return len(os.sched_getaffinity(0))


def stop_everywhere(check: int) -> bool:
    """True on every host at the same check, once any host was asked to stop."""
    return multihost_utils.reached_preemption_sync_point(check)
