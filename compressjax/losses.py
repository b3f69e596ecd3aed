"""Losses of a small network that learns from a large one, and of weights at rest.

    distillation                 tau^2 KL(softmax(t / tau) || softmax(s / tau))
    cross_entropy_distillation   (1 - a) CE(s, label) + a distillation(s, t)
    feature_error                mean over layers of ||S_l - T_l||^2 / ||T_l||^2
    normalized_feature_error     the same of features with mean 0, std 1 per channel
    attention_transfer           mean over layers of || Q_S/||Q_S|| - Q_T/||Q_T|| ||
    damping                      sum (w_hat - clip(w, lo, hi))^2
    repvgg_l2                    the square of the kernel that a RepVGG block becomes

s and t are the logits of student and teacher, S_l and T_l their features. No gradient
reaches a teacher. Plain functions of arrays, one number an example where there are
examples; the factor in front and its schedule are the caller's.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from compressjax.core import errors, trees
from compressjax.core.model import Model, expect

Array = Any


def distillation(student: Array, teacher: Array, *, temperature: float = 1.0) -> Array:
    """How far the softened answers of a student are from those of its teacher.

        L = tau^2 sum_k p_k (log p_k - log q_k),  p = softmax(t/tau), q = softmax(s/tau)

    tau^2 keeps the gradient's size: for large tau dL/ds_k -> (s_k - t_k) / K with both
    logits centred (K classes); at any tau it is tau (q_k - p_k).

    Args:
      student: f32[..., K], logits s.
      teacher: f32[..., K], logits t; gets no gradient.
      temperature: tau > 0.

    Returns:
      f32[...], nats, >= 0.

    Raises:
      ValueError: if tau is not positive or the shapes differ.

    Paper: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015,
    arXiv 1503.02531, section 2.

    >>> s, t = jnp.zeros((1, 2)), jnp.log(jnp.array([[3.0, 1.0]]))
    >>> round(float(distillation(s, t)[0]), 4)  # 3/4 log 3/2 + 1/4 log 1/2
    0.1308
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: give a positive number.")
    _same_shape(student, teacher)
    tau = temperature
    log_q = jax.nn.log_softmax(student / tau)
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / tau)
    return tau**2 * optax.losses.kl_divergence_with_log_targets(log_q, log_p)


def cross_entropy_distillation(
    student: Array,
    label: Array,
    teacher: Array,
    *,
    temperature: float = 4.0,
    weight: float = 0.9,
) -> Array:
    """Cross entropy with the labels, and distillation from the teacher.

        L = (1 - a) CE(s, label) + a tau^2 KL(p || q)

    Args:
      student: f32[..., K], logits.
      label: i32[...], classes.
      teacher: f32[..., K], logits; gets no gradient.
      temperature: tau > 0.
      weight: a in [0, 1].

    Returns:
      f32[...], nats.

    Raises:
      ValueError: if the weight is outside [0, 1].

    Paper: Hinton, Vinyals, Dean, arXiv 1503.02531.

    >>> s, t = jnp.zeros((1, 2)), jnp.log(jnp.array([[3.0, 1.0]]))
    >>> loss = cross_entropy_distillation(s, jnp.array([0]), t, temperature=1.0,
    ...                                   weight=0.5)
    >>> round(float(loss[0]), 4)  # (log 2 + 0.1308) / 2
    0.412
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight={weight}: give a number in [0, 1].")
    hard = optax.softmax_cross_entropy_with_integer_labels(student, label)
    soft = distillation(student, teacher, temperature=temperature)
    return (1 - weight) * hard + weight * soft


def feature_error(student: Any, teacher: Any) -> Array:
    """Squared error of features, relative to the teacher's, averaged over layers.

        L_n = 1/L sum_l ||S_nl - T_nl||^2 / ||T_nl||^2

    Args:
      student: f32[N, ...] or any pytree of them, such as what `cj.capture` returns.
      teacher: the same structure and shapes; gets no gradient.

    Returns:
      f32[N], unitless: 0 if equal, 1 for a student that says nothing. Where a
      teacher's feature is zero everywhere, ||S_nl||^2 itself is counted.

    Raises:
      ValueError: if structures or shapes differ, or there is no feature.

    Paper: Ye, Zhang, Wang, Distillation Guided Residual Learning for Binary
    Convolutional Neural Networks, 2020, arXiv 2007.05223 (block-wise distillation).
    Differs: the norm is taken for each example, so that loud examples weigh no more.

    >>> feature_error(jnp.array([[1.0, 1.0]]), jnp.array([[1.0, 2.0]])).tolist()
    [0.20000000298023224]
    """

    def each(s: Array, t: Array) -> Array:
        size = _square(t)
        return _square(s - t) / jnp.where(size > 0, size, 1.0)

    return _mean_over_layers(each, student, teacher)


def normalized_feature_error(student: Any, teacher: Any) -> Array:
    """Squared error of features whose channels are normalised over the batch.

        L_n = 1/L sum_l mean_{c,p} (S'_lncp - T'_lncp)^2,  A' = (A - mean_c) / std_c

    mean_c and std_c are those of channel c over the examples n and the positions p, of
    the student's feature and of the teacher's. So a shift and a positive factor of a
    channel, which norms of student and teacher are free to have, cost nothing: the mean
    over the batch is 2 (1 - r_c), with r_c the correlation of the two channels.

    Args:
      student: f32[N, ..., C] or any pytree of them.
      teacher: the same structure and shapes; gets no gradient.

    Returns:
      f32[N], unitless, >= 0; its mean over the batch is at most 4. A channel that is
      the same everywhere counts as zeros.

    Raises:
      ValueError: if structures or shapes differ, or there is no feature.

    Source: our own form of a channel-normalised error; the usual ones differ in what
    they normalise over.

    >>> s, t = jnp.array([[1.0], [3.0]]), jnp.array([[0.0], [10.0]])
    >>> normalized_feature_error(s, t).tolist()
    [0.0, 0.0]
    >>> normalized_feature_error(-s, t).tolist()
    [4.0, 4.0]
    """

    def normal(a: Array) -> Array:
        axes = tuple(range(a.ndim - 1))
        a = a.astype(jnp.float32)
        a = a - jnp.mean(a, axes, keepdims=True)
        variance = jnp.mean(jnp.square(a), axes, keepdims=True)
        flat = variance <= 0
        return jnp.where(flat, 0.0, a / jnp.sqrt(jnp.where(flat, 1.0, variance)))

    def each(s: Array, t: Array) -> Array:
        return _square(normal(s) - normal(t)) / (s.size // s.shape[0])

    return _mean_over_layers(each, student, teacher)


def attention_transfer(student: Any, teacher: Any) -> Array:
    """How far a student looks at other places than its teacher.

        L_n = 1/L sum_l || Q_S / ||Q_S|| - Q_T / ||Q_T|| ||,   Q[p] = sum_c A_npc^2

    Q is the attention map of an example: the energy at each position p. Signs, and how
    energy lies on the channels, are free, so student and teacher may differ in width.

    Args:
      student: f32[N, ..., C] or any pytree of them.
      teacher: the same structure; the shapes agree but for C. Gets no gradient.

    Returns:
      f32[N], unitless, in [0, sqrt 2]. A feature that is zero everywhere has Q = 0; the
      gradient of equal maps is zero.

    Raises:
      ValueError: if structures or positions differ, or there is no feature, or one
        without positions.

    Papers: Zagoruyko, Komodakis, Paying More Attention to Attention, ICLR 2017, arXiv
    1612.03928; Martinez, Yang, Bulat, Tzimiropoulos, Training Binary Neural Networks
    with Real-to-Binary Convolutions, ICLR 2020, arXiv 2003.11535.

    >>> s, t = jnp.array([[[1.0], [0.0]]]), jnp.array([[[0.0], [-2.0]]])
    >>> round(float(attention_transfer(s, t)[0]), 4)  # from (1, 0) to (0, 1)
    1.4142
    """

    def look(a: Array) -> Array:
        if a.ndim < 3:
            raise ValueError(
                f"a feature of shape {a.shape} has no positions to look at: choose "
                "maps, or feature_error."
            )
        energy = jnp.sum(jnp.square(a.astype(jnp.float32)), -1)
        q = energy.reshape(a.shape[0], -1)
        size = _square(q)[:, None]
        return jnp.where(size > 0, q / jnp.sqrt(jnp.where(size > 0, size, 1.0)), 0.0)

    def each(s: Array, t: Array) -> Array:
        squared = _square(look(s) - look(t))
        apart = squared > 0  # the root has no derivative at zero
        return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0)

    return _mean_over_layers(each, student, teacher, widths=False)


def _mean_over_layers(
    each: Callable[[Array, Array], Array],
    student: Any,
    teacher: Any,
    *,
    widths: bool = True,
) -> Array:
    """f32[N]: the mean of ``each(s, t)`` over pairs of features; t gets no gradient."""
    if jax.tree.structure(student) != jax.tree.structure(teacher):
        raise ValueError(
            f"student and teacher have other features: {jax.tree.structure(student)} "
            f"and {jax.tree.structure(teacher)}. Capture the same sites of both."
        )
    pairs = list(zip(jax.tree.leaves(student), jax.tree.leaves(teacher), strict=True))
    if not pairs:
        raise ValueError("there is no feature: capture at least one site.")
    for s, t in pairs:
        last = None if widths else -1
        if s.shape[:last] != t.shape[:last]:
            _same_shape(s, t)
    terms = [each(s, jax.lax.stop_gradient(t)) for s, t in pairs]
    return sum(terms[1:], terms[0]) / len(terms)


def damping(w: Array, w_hat: Array, lo: Array, hi: Array) -> Array:
    """How far weights are from the grid points that they are rounded to.

        L = sum (w_hat - clip(w, lo, hi))^2
        dL/dw = 2 (w - w_hat) where lo <= w <= hi, else 0

    Straight-through gradients let a weight next to a rounding border jump over it and
    back; this pulls it to the middle of its bin, away from both borders. Ramp its
    factor up from 0, so that weights move freely first.

    Args:
      w: f32[...], latent weights.
      w_hat: the same shape, quantized; gets no gradient.
      lo: smallest value of the grid, broadcastable to w; gets no gradient.
      hi: largest value of the grid.

    Returns:
      f32[], square of the weight's unit.

    Paper: Nagel, Fournarakis, Bondarenko, Blankevoort, Overcoming Oscillations in
    Quantization-Aware Training, ICML 2022, arXiv 2203.11086, eq. 5.

    >>> w = jnp.array([0.4, 1.4, 9.0])
    >>> float(damping(w, jnp.array([0.0, 1.0, 1.0]), -2.0, 1.0))
    0.1600000113248825
    """
    w_hat, lo, hi = jax.lax.stop_gradient((w_hat, lo, hi))
    return jnp.sum(jnp.square(w_hat - jnp.clip(w, lo, hi)))


def repvgg_l2(model: Model, *, epsilon: float = 1e-5) -> Callable[[Any], Array]:
    """A penalty on the kernels that the RepVGG blocks of a network will become.

        L2 = ||K3||^2 - ||K3[c]||^2 + sum (t3 K3[c] + t1 K1)^2 / (t3^2 + t1^2)

    c is the centre tap, t = gamma / sqrt(var + eps) of the two norms, running, without
    gradient: decay acts on the merged kernel, not on two branches that may cancel. The
    last term is scaled so that it is ordinary decay where one branch is zero.

    Args:
      model: a Model with blocks of `layers.RepVGG` that have both convolutions.
      epsilon: of their norms.

    Returns:
      ``penalty(variables) -> f32[]``: the sum over all blocks. Add 0.5 * decay * it to
      the loss, in place of decay of these kernels (``optim.repvgg_decay_mask(model,
      custom_l2=True)``).

    Raises:
      RefusedError: if the Model has no such block.

    Source: the authors' code for arXiv 2101.03697 ("custom L2", now deprecated).
    Differs: an output channel with t3 = t1 = 0 adds nothing to the last term.

    >>> net, x = cj.layers.RepVGG(1, identity=False), jnp.ones((1, 4, 4, 1))
    >>> v = jax.eval_shape(net.init, jax.random.key(0), x)
    >>> v = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), v)
    >>> round(float(repvgg_l2(cj.from_linen(net, v, x))(v)), 4)  # 8 + (1 + 1)^2 / 2
    10.0
    """
    leaves = trees.flat(expect(model).variables)
    mark = "/conv1x1/kernel"
    blocks = [
        path.removeprefix("params/").removesuffix("conv1x1/kernel")
        for path in leaves
        if path.startswith("params/")
        and path.endswith(mark)
        and path.removesuffix(mark) + "/conv3x3/kernel" in leaves
        and path.removesuffix(mark) + "/bn3x3/scale" in leaves
    ]
    if not blocks:
        raise errors.RefusedError(
            "no RepVGG block is here: no conv3x3, bn3x3 and conv1x1 beside each other.",
            operation="losses.repvgg_l2",
            remedy="Use it before merge.fuse, on a network of layers.RepVGG.",
        )

    def penalty(variables: Any) -> Array:
        found = trees.flat(variables)
        total = jnp.zeros(())
        for block in blocks:
            k3 = found[f"params/{block}conv3x3/kernel"]
            k1 = found[f"params/{block}conv1x1/kernel"]
            t3, t1 = (
                jax.lax.stop_gradient(
                    found[f"params/{block}{bn}/scale"]
                    / jnp.sqrt(found[f"batch_stats/{block}{bn}/var"] + epsilon)
                )[None]
                for bn in ("bn3x3", "bn1x1")
            )
            size = jnp.square(t3) + jnp.square(t1)
            centre = jnp.square(t3 * k3[1, 1] + t1 * k1[0, 0])
            centre = centre / jnp.where(size > 0, size, 1.0)
            total += jnp.sum(jnp.square(k3)) - jnp.sum(jnp.square(k3[1, 1]))
            total += jnp.sum(centre)
        return total

    return penalty


def _square(x: Array) -> Array:
    """f32[N]: the sum of squares of each example."""
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim)))


def _same_shape(student: Array, teacher: Array) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student gives {student.shape}, the teacher {teacher.shape}: "
            "they must agree."
        )
