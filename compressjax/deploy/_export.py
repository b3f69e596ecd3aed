"""A network as StableHLO: bytes that run where compressjax is not installed.

    blob = cj.deploy.export(model)
    jax.export.deserialize(bytearray(blob)).call(x)         # in any process with JAX

The bytes hold the program and, unless they are left out, the variables as they are in
the Model: packed codes stay packed, and the program unpacks them when it runs.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from compressjax.core import errors, lowered
from compressjax.core.model import Model
from compressjax.deploy import _integer


def export(
    model: Model,
    batch_size: int | str | None = None,
    *,
    platforms: Sequence[str] | None = None,
    with_variables: bool = True,
) -> bytes:
    """The network in evaluation mode as serialized StableHLO.

    Args:
      model: float, fake-quantized or integer.
      batch_size: the first axis of each input. None: that of the Model's inputs. A
        name, such as "b": any size; the program is compiled for each one it is called
        with.
      platforms: what to lower for, such as ("cpu", "cuda", "tpu"); no such device is
        needed. Default: the platform of this process, with the lowerings that were
        tuned on it. For any other an integer network is written as patches and dots,
        nothing timed.
      with_variables: False leaves the arrays out; the function then takes
        (variables, *inputs), where variables has the structure of the Model's.

    Returns:
      Bytes for `jax.export.deserialize`, whose `call` takes the inputs of the Model.
      The integers are those of the Model, bit for bit. Float arithmetic on constants
      may differ in the last bits; without the variables it does not.

    Raises:
      UnsupportedError: if the network cannot be traced with any batch size, has
        variables without values, or the package flatbuffers is not there.

    >>> m = cj.from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))},
    ...                      jnp.ones((4, 3)))
    >>> blob = cj.deploy.export(m, "b")
    >>> jax.export.deserialize(bytearray(blob)).call(jnp.ones((1, 3))).tolist()
    [[3.0, 3.0]]
    """
    apply_fn = model.apply_fn
    here = jax.export.default_export_platform()
    if platforms is not None and set(platforms) != {here}:
        apply_fn = (
            apply_fn.portable
            if isinstance(apply_fn, _integer.Integer)
            else lowered.plain(apply_fn)
        )
    inputs = _specs(model, batch_size)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), model.variables
    )
    leaves = jax.tree.leaves(model.variables)
    if with_variables and any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        raise _refused(
            "its variables are shapes without values.",
            "Give the Model its arrays, or leave them out: with_variables=False.",
        )

    def alone(*inputs: Any) -> Any:
        # Constants, but not for the first passes of the compiler: they would unpack
        # what was packed, and fold sums in another order.
        return apply_fn(jax.lax.optimization_barrier(model.variables), *inputs)

    def given(variables: Any, *inputs: Any) -> Any:
        return apply_fn(variables, *inputs)

    call, specs = (alone, inputs) if with_variables else (given, (shapes, *inputs))
    try:
        exported = jax.export.export(jax.jit(call), platforms=platforms)(*specs)
    except Exception as error:
        if not isinstance(batch_size, str):
            raise
        raise _refused(
            f"it cannot be traced with any batch size: {error}",
            "Give batch_size as a number.",
        ) from error
    try:
        return bytes(exported.serialize())
    except ImportError as error:
        raise _refused(
            f"the program cannot be written: {error}.",
            "Install it: pip install compressjax[export].",
        ) from error


def _refused(reason: str, remedy: str) -> errors.UnsupportedError:
    return errors.UnsupportedError(reason, operation="deploy.export", remedy=remedy)


def _specs(model: Model, batch_size: int | str | None) -> tuple[Any, ...]:
    if batch_size is None:
        return model.inputs
    size: Any = batch_size
    if isinstance(batch_size, str):
        (size,) = jax.export.symbolic_shape(batch_size)

    def spec(s: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *s.shape[1:])[: len(s.shape)], s.dtype)

    return jax.tree.map(spec, model.inputs)
