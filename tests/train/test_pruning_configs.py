"""The configs that prune: budgets met by every way, in rounds as at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import compressjax as cj
from compressjax import models
from configs import cifar10_taylor, fashion_channels
from train import config as configs


def build(config, key, images):
    """Two stages of a VGG network, drawn without compiling."""
    net = models.vgg("vgg11", head="cifar", depths=(1, 1), width=8)
    shapes = jax.eval_shape(net.init, key, jnp.zeros(images.shape))
    rng = np.random.default_rng(0)

    def draw(s):
        spread = 0.3 if len(s.shape) > 1 else 0.0
        return jnp.asarray(1 + spread * (rng.normal(size=s.shape) - 3), jnp.float32)

    return cj.from_linen(net, jax.tree.map(draw, shapes), jnp.zeros(images.shape))


def transformed(config, names):
    """({stage: Model} of these transforms, one after the other; the first Model)."""
    spec = jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32)
    model = build(config, jax.random.key(0), spec)
    images = jax.random.normal(jax.random.key(1), (16, 8, 8, 1))
    ctx = configs.Context(
        config=config,
        batches=[(images,)],
        teacher=model,
        key=jax.random.key(2),
        steps=40,
        steps_per_epoch=20,
        labelled=[(images[:8], jnp.arange(8)), (images[8:], jnp.arange(8))],
    )
    found = {}
    for stage in (s for s in config.stages if s.name in names):
        model = stage.transform(model, ctx)
        found[stage.name] = model
    return found, ctx.teacher


def widths(model):
    return [g.size for g in cj.prune.groups(model) if g.prunable]


def test_every_way_ends_with_the_same_macs(monkeypatch):
    monkeypatch.setattr(fashion_channels, "build", build)
    config = fashion_channels.get_config()
    rounds = ("taylor-1", "taylor-2", "taylor-3")
    made, model = transformed(config, ("cut", *rounds, "taylor-once", "uniform"))
    found = {name: cj.costs.count(m).macs for name, m in made.items()}
    full = cj.costs.count(model).macs
    assert found["cut"] == found["uniform"] == budget(5, 10)
    assert full == budget(8, 16)
    # The same factor in each round; a budget is met by less than a channel of the rest.
    for i, name in enumerate(rounds, 1):
        wanted = full * (found["cut"] / full) ** (i / 3)
        assert 0.85 * wanted < found[name] <= wanted
    assert 0.85 * found["cut"] < found["taylor-once"] <= found["cut"]


def budget(a, b):
    """MACs of the two convolutions on 8 and 4 pixels a side, and of the head."""
    return 64 * 9 * a + 16 * 9 * a * b + 10 * b


def test_rounds_leave_the_same_share_each():
    config = dataclasses.replace(cifar10_taylor.get_config(), ratio=0.5)
    made, model = transformed(config, [f"round-{i}" for i in range(1, 6)])
    assert widths(model) == [8, 16]
    # 0.5 ** 0.2 = 0.87 of 24, 21, 19, ...; a round removes whole channels, no more.
    assert [sum(widths(m)) for m in made.values()] == [21, 19, 17, 15, 14]
