"""The law: the shrunk network equals the masked one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from compressjax import models, prune
from compressjax.core import errors, trees
from compressjax.core.model import Model, input_specs

# A small member of each family; full sizes are the same code.
FAMILIES = {
    "cifar_resnet": (models.cifar_resnet("resnet8", width=6), 8),
    "cifar_resnet_preact": (models.cifar_resnet("resnet8", width=6, preact=True), 8),
    "resnet_bottleneck": (models.resnet("resnet50", blocks=(1, 2), width=8), 16),
    "resnext": (
        models.resnet("resnext50_32x4d", blocks=(1, 1), width=8, groups=2),
        16,
    ),
    "vgg": (
        models.vgg("vgg11", head="cifar", depths=(1, 1), width=6, batch_norm=True),
        8,
    ),
    "densenet": (
        models.densenet("densenet121", depths=(2, 2), growth=6, width=8, stem="cifar"),
        8,
    ),
    "mobilenet_v1": (
        models.mobilenet("mobilenet_v1", stages=((1, 8, 1, 1), (1, 12, 2, 2))),
        16,
    ),
    "mobilenet_v2": (
        models.mobilenet("mobilenet_v2", stages=((1, 8, 1, 1), (2, 8, 2, 2)), last=12),
        16,
    ),
    "vit": (models.vit("deit_ti16", patch=4, depth=2, width=12, heads=3), 8),
    "edsr": (models.edsr("edsr_baseline_x2", depth=2, width=6), 5),
    "srresnet": (models.edsr("srresnet_x4", depth=1, width=6), 4),
}


def model_of(apply, params, x) -> Model:
    variables = params if "params" in params else {"params": params}
    return Model(apply, variables, input_specs((x,)))


def visible(variables, rng, dtype=jnp.float64):
    """Random weights, statistics, scales and biases: no part is hidden by a zero."""

    def draw(path, x):
        name = path.rsplit("/", 1)[-1]
        if name in ("scale", "var"):
            a = rng.uniform(0.5, 1.5, x.shape)
        else:
            fan = max(1, int(np.prod(x.shape[:-1]))) if len(x.shape) > 1 else 4
            a = rng.normal(size=x.shape) * 1.4 / np.sqrt(fan)
        return jnp.asarray(a, dtype)

    return trees.map_with_path(draw, variables)


@functools.cache
def family(name, dtype=jnp.float64) -> tuple[Model, jax.Array]:
    """A Linen network with visible weights, and an input of two images."""
    net, side = FAMILIES[name]
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(2, side, side, 3)), dtype)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)

    def apply(v, x, **kwargs):
        return net.apply(v, x, **kwargs)

    return model_of(apply, visible(variables, rng, dtype), x), x


def prunable(model, **options):
    return [g for g in prune.groups(model, **options) if g.prunable]


def random_keep(groups, rng, ratio=0.45):
    """bool[size] for each group; at least one of each lives."""
    keep = {}
    for g in groups:
        k = rng.random(g.size) >= ratio
        if not k.any():
            k[rng.integers(g.size)] = True
        keep[g] = k
    return keep


def masked_variables(model: Model, keep):
    """Every slice of every dead channel zero: written without the library's mask."""
    leaves = {p: np.array(x) for p, x in trees.flat(model.variables).items()}
    for group, k in keep.items():
        for (path, axis), index in group.members.items():
            for i, channel in enumerate(index):
                if channel >= 0 and not k[channel]:
                    leaves[path][(slice(None),) * axis + (i,)] = 0
    return trees.map_with_path(lambda p, x: jnp.asarray(leaves[p]), model.variables)


def relative(a, b) -> float:
    """Largest difference, over the largest value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


def run(fn, *args):
    """Compile without optimizing (the tests compile more than they run), and call."""
    quick = {"xla_backend_optimization_level": 0}
    return jax.jit(fn).lower(*args).compile(quick)(*args)


def error_of(model: Model, keep, x) -> tuple[float, float]:
    """(error of shrunk against masked, how much the mask changes), both relative."""
    small = prune.shrink(keep)(model)

    def both(masked, live, x):
        return model.apply_fn(masked, x), small.apply_fn(live, x)

    quick = {"xla_backend_optimization_level": 0}
    args = (masked_variables(model, keep), small.variables, x)
    compiled = jax.jit(both).lower(*args).compile(quick)
    want, got = compiled(*args)
    before, _ = compiled(model.variables, small.variables, x)
    return relative(got, want), relative(want, before)


def slices(tree, keep):
    """The live slices of a tree of full size, leaf by leaf, with NumPy."""
    leaves = {p: np.asarray(x) for p, x in trees.flat(tree).items()}
    for group, k in keep.items():
        for (path, axis), index in group.members.items():
            if path in leaves:
                dead = (index >= 0) & ~k[np.maximum(index, 0)]
                marked = leaves.get(path + "|", {})
                marked = {
                    **marked,
                    axis: marked.get(axis, np.zeros(len(index), bool)) | dead,
                }
                leaves[path + "|"] = marked
    out = {}
    for path, leaf in leaves.items():
        if path.endswith("|"):
            continue
        for axis, dead in leaves.get(path + "|", {}).items():
            leaf = np.compress(~dead, leaf, axis)
        out[path] = leaf
    return out


def is_refused(fn) -> bool:
    try:
        fn()
    except (errors.RefusedError, errors.UnsupportedError):
        return True
    return False
