"""The walk of the running network: reads what was packed."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from compressjax.core import errors
from compressjax.deploy import _choices, _forms, _lowerings, _xnor
from compressjax.deploy._values import CONSTANTS, WEIGHTS, Lazy, Leaves
from compressjax.deploy._walk import Walk


class Run(Walk):
    """The walk of the running network: reads what was packed."""

    def __init__(
        self, program, trace, leaves: Mapping[str, Any], found, table, store=True
    ):
        super().__init__(program, trace, found)
        self.leaves, self.table = leaves, table
        self.store = store and table is not None
        self.knowns = Leaves(lambda i: leaves[self.paths[i]])

    def constant(self, path, compute):
        return self.leaves[self.found.get("shared", {}).get(path, path)]

    def traced(self, known):
        value = self.knowns.of(known)
        return jnp.broadcast_to(jnp.asarray(value, known.dtype), known.shape)

    def spread(self, known):
        value = jnp.asarray(self.knowns.of(known), known.dtype)
        return Lazy(lambda: jnp.broadcast_to(value, known.shape))

    def concrete(self, known):
        return None

    def stored(self, compute):
        if not self.store:
            return compute()
        made = (CONSTANTS, WEIGHTS)
        witness = next(x for p, x in self.leaves.items() if p.startswith(made))

        def alone():
            # What is made inside a branch must not be remembered outside of it.
            memo, taken = dict(self.memo), dict(self.taken)
            known = dict(self.knowns.done)
            out = compute()
            self.memo, self.taken, self.knowns.done = memo, taken, known
            return out

        return _forms.stored(alone, witness)

    def lowering(self, product):
        if self.table is None:
            return "conv:int8"
        default = _lowerings.default_codes(product.primitive, product.params, product.w)
        if product.signs is not None and self.store and _xnor.runs_here():
            default = _xnor.DEFAULT
        name = _choices.nearest(self.table, product.site, product.q.shape, default)
        return name if _xnor.runs_here() or not _xnor.is_name(name) else default

    def decide(self, name, compute):
        return self.found["facts"][name]

    def marker(self, name, eqn, ins):
        return self.found["markers"][name]

    def alias(self, i, eqn, name):
        other = self.found["alias"].get(name)
        return None if other is None else self.memo["codes", other]

    def weight(self, site, w):
        return {}

    def too_large(self, site):
        raise errors.RefusedError(
            "with these inputs its sums do not fit 31 bits.",
            path=site.name,
            operation="deploy.integer",
            remedy="Pack the Model with inputs as large as these.",
        )

    def stays_float(self, site, reason):
        raise errors.StructureChangedError(
            f"was packed as an integer product, but now {reason}.",
            path=site.name,
            operation="deploy.integer",
            remedy="Call the Model as it was packed, or pack it again.",
        )
