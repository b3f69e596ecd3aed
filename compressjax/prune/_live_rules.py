"""The table of live rules: how each primitive treats dead entries.

A rule is ``rule(eqn, ins) -> outs`` over `_live.Live`; it raises NeedFull where it does
not apply. A primitive that is not in the table runs at full size.
"""

from compressjax.core import trace
from compressjax.prune import _live_calls as calls
from compressjax.prune import _live_lookups as lookups
from compressjax.prune import _live_movement as movement
from compressjax.prune import _live_products as products
from compressjax.prune._live_elementwise import elementwise
from compressjax.prune._live_run import Rule

RULES: dict[str, Rule] = {
    **dict.fromkeys(trace.ELEMENTWISE, elementwise),
    **dict.fromkeys("jit pjit closed_call core_call".split(), calls.inline),
    **dict.fromkeys("checkpoint remat remat2".split(), calls.remat),
    **dict.fromkeys("custom_vjp_call custom_vjp_call_jaxpr".split(), calls.custom_vjp),
    **dict.fromkeys(
        "cumsum cumprod cummax cummin cumlogsumexp".split(),
        products.passing(lambda e: [e.params["axis"]]),
    ),
    **dict.fromkeys(
        "reduce_window_sum reduce_window_max reduce_window_min".split(),
        products.passing(products.window_axes),
    ),
    "broadcast_in_dim": movement.broadcast_in_dim,
    "concatenate": movement.concatenate,
    "conv_general_dilated": products.conv,
    "custom_jvp_call": calls.custom_jvp,
    "dot_general": products.dot_general,
    "dynamic_slice": lookups.dynamic_slice,
    "gather": lookups.gather,
    "optimization_barrier": movement.identity,
    "pad": movement.pad,
    "reduce_and": products.reduction("and"),
    "reduce_max": products.reduction("max"),
    "reduce_min": products.reduction("min"),
    "reduce_or": products.reduction("or"),
    "reduce_sum": products.reduction("sum"),
    "reshape": movement.reshape,
    "rev": movement.rev,
    "scan": calls.scan,
    "slice": movement.slice_,
    "split": movement.split,
    "squeeze": movement.squeeze,
    "unstack": movement.unstack,
    "transpose": movement.transpose,
}
TRACKED = (
    elementwise,
    movement.broadcast_in_dim,
    movement.reshape,
    movement.squeeze,
    movement.slice_,
    movement.unstack,
    movement.transpose,
    movement.concatenate,
)
SPREADING = (movement.broadcast_in_dim,)
