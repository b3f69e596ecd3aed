"""Every row of `tests/contracts.py` keeps the contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import compressjax as cj
from tests import contracts
from tests.contracts import X

near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


class Case:
    """A row applied to the network, with its jitted function and output."""

    def __init__(self, row: contracts.Contract):
        self.row = row
        self.model = row.transform(contracts.network())
        self.variables = self.model.variables
        self.run = jax.jit(self.apply)
        self.wanted = np.asarray(self.run(self.variables, X))

    def apply(self, variables, x):
        return self.row.out(self.model.apply_fn(variables, x))


@functools.cache
def case_of(name: str) -> Case:
    return Case(contracts.MODELS[name])


@pytest.fixture(params=contracts.MODELS)
def case(request):
    return case_of(request.param)


def test_jit_equals_eager(case):
    near(case.apply(case.variables, X), case.wanted)


def test_two_calls_compile_once(case):
    case.run(case.variables, X + 1)
    assert case.run._cache_size() == 1


def test_shapes_and_dtypes_are_those_of_the_float_network(case):
    base = contracts.network()
    dtypes = (jnp.float32, jnp.bfloat16) if case.row.bfloat16 else (jnp.float32,)
    for dtype in dtypes:
        x = jax.ShapeDtypeStruct((7, 6, 6, 3), dtype)  # a batch size never seen
        got = jax.eval_shape(case.apply, case.variables, x)
        expected = jax.eval_shape(base.apply_fn, base.variables, x)
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)


def test_vmap(case):
    each = jax.jit(jax.vmap(lambda x: case.apply(case.variables, x[None])[0]))
    near(each(X), case.wanted)


def test_two_devices_by_shardings(case):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))
    near(jax.jit(case.apply)(case.variables, x), case.wanted)


def test_two_devices_by_shard_map(case):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    run = jax.shard_map(
        case.apply, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec
    )
    near(jax.jit(run)(case.variables, X), case.wanted)


def test_two_devices_by_pmap(case):
    run = jax.pmap(case.apply, in_axes=(None, 0))
    near(run(case.variables, X.reshape(2, 2, 6, 6, 3)).reshape(4, 3), case.wanted)


def test_gradients_are_finite_even_at_zero(case):
    if not case.row.grad:
        with pytest.raises(TypeError):
            jax.grad(lambda v: case.apply(v, X).sum())(case.variables)
        return
    trained = case.model.select_trainable()
    assert trained, "nothing is trainable"

    @jax.jit
    def grads(trained):
        return jax.grad(lambda t: (case.apply({**case.variables, **t}, X) ** 2).sum())(
            trained
        )

    zero = jax.tree.map(jnp.zeros_like, trained)
    for g in jax.tree.leaves((grads(trained), grads(zero))):
        assert np.isfinite(g).all()
    for name, tree in grads(trained).items():
        assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(tree)), name


def test_training_mode(case):
    if not case.row.trains:
        pytest.skip("a network for evaluation only")
    mutable = [k for k in case.variables if k not in case.model.trainable]
    out, updates = jax.jit(
        functools.partial(case.model.apply_fn, train=True, mutable=mutable)
    )(case.variables, X)
    assert np.isfinite(case.row.out(out)).all() and set(updates) <= set(mutable)
    before, after = (
        jax.tree.structure(v.get("batch_stats")) for v in (case.variables, updates)
    )
    assert before == after


def test_the_model_can_be_traced_again(case):
    names = [s.name for s in cj.sites(case.model)]
    same = cj.rewrite(lambda site, op, x, w: op(x, w))(case.model)
    near(
        jax.jit(lambda v, x: case.row.out(same.apply_fn(v, x)))(case.variables, X),
        case.wanted,
    )
    assert names and case.model.history[-1].settings is not None


def test_checkpoint_trip(case, tmp_path):
    names = {step.name for step in case.model.history}
    if names & {"rewrite", "capture"}:
        pytest.skip("a rule is code: it is applied again, not loaded")
    cj.deploy.save(tmp_path / "model", case.model)
    loaded = cj.deploy.load(tmp_path / "model", model=contracts.network())
    assert (loaded.bits, loaded.history) == (case.model.bits, case.model.history)
    out = jax.jit(lambda v, x: case.row.out(loaded.apply_fn(v, x)))(loaded.variables, X)
    np.testing.assert_array_equal(out, case.wanted)
