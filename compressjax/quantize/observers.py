"""Observers: what range [lo, hi] of an array should the integer grid cover?

An observer is four functions with one interface:

    init(shape)            -> state      nothing seen yet; shape () or, per channel, the
                                         shape of x with 1 on every shared axis
    update(state, x)       -> state      one more batch
    range(state, grid)     -> (lo, hi)   of everything seen
    direct(x, axes, grid)  -> (lo, hi)   of one array alone, exact; axes keep their own

    minmax       running minimum and maximum, or with momentum m <- m*old + (1-m)*batch
    ema          minmax with a momentum of 0.9, for training
    percentile   the p-th percentile: of |x| on a symmetric grid, of both tails else
    mse          the clip of 100, from 0.01 to 1.00 times minmax, with the least error
    kl           the clip after which the codes tell most about the values (TensorRT)
    aciq         the best clip of a Laplace or Gauss density with the same moments

Percentile, MSE and KL keep a histogram of 4096 bins over [-R, R]. R is max|x| of the
first batch; a batch that does not fit doubles R until it does, and pairs of bins merge.
Zeros count like any other value (a ReLU map that is 90 % zeros has its 99.9th
percentile at the 99th of what is left).

All are jit-able; the state has the same shapes whatever it has seen.
"""

from collections.abc import Callable

from compressjax.quantize._aciq import aciq as aciq
from compressjax.quantize._aciq import best_clip as best_clip
from compressjax.quantize._histograms import BINS as BINS
from compressjax.quantize._histograms import kl as kl
from compressjax.quantize._histograms import mse as mse
from compressjax.quantize._histograms import percentile as percentile
from compressjax.quantize._observer import Grid as Grid
from compressjax.quantize._observer import Observer as Observer
from compressjax.quantize._observer import ema as ema
from compressjax.quantize._observer import minmax as minmax
from compressjax.quantize._observer import step_size as step_size


def from_settings(settings: dict) -> Observer:
    """The observer with these `settings`.

    >>> from_settings({"name": "percentile", "p": 99.0}).settings["p"]
    99.0
    """
    makers = (minmax, percentile, mse, kl, aciq)
    kinds: dict[str, Callable[..., Observer]] = {f.__name__: f for f in makers}
    rest = {k: v for k, v in settings.items() if k != "name"}
    if settings.get("name") not in kinds:
        raise ValueError(
            f"no observer named {settings.get('name')!r}; there are {sorted(kinds)}."
        )
    return kinds[settings["name"]](**rest)
