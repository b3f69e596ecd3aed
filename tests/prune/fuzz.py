"""python -m tests.prune.fuzz --cases 2000 [--seed 0]: the law on random networks.

Prints a progress line, every failure with the seed that draws it again, and a summary.
"""

import argparse
import sys
import time

import jax
import numpy as np

from compressjax import prune
from compressjax.core import errors
from tests.prune import law, random_nets

TOLERANCE = 1e-10  # of the largest output, under x64


def run_case(pick, rng) -> dict:
    """One random network and one random keep: what happened."""
    apply, params, x, text = random_nets.draw(pick, rng)
    model = law.model_of(apply, params, x)
    options = {
        "attention": pick(["heads", "heads", "dims"]),
        "grouped": pick(["lanes", "lanes", "groups"]),
    }
    found = [g for g in prune.groups(model, **options) if g.prunable]
    out = {"text": f"{text} {options}", "groups": len(found)}
    if not found:
        return out | {"outcome": "nothing prunable"}
    some = [g for g in found if pick([True, True, False])] or found[:1]
    keep = law.random_keep(some, rng, ratio=pick([0.3, 0.5, 0.8]))
    try:
        small = prune.shrink(keep)(model)

        def both(masked, live, x):
            return model.apply_fn(masked, x), small.apply_fn(live, x)

        args = (law.masked_variables(model, keep), small.variables, x)
        quick = {"xla_backend_optimization_level": 0}
        want, got = jax.jit(both).lower(*args).compile(quick)(*args)
    except (errors.RefusedError, errors.UnsupportedError) as e:
        return out | {"outcome": "refused", "reason": str(e)}
    error = law.relative(got, want)
    good = error < TOLERANCE and np.isfinite(np.asarray(want)).all()
    return out | {"outcome": "right" if good else "WRONG", "error": error}


def run_seed(seed: int, first=None) -> dict:
    """The case that a seed draws; `first` is the kind of its first step, if given."""
    rng = np.random.default_rng(seed)
    given = [] if first is None else [first]

    def pick(options):
        drawn = options[rng.integers(len(options))]
        return given.pop() if given and options is random_nets.KINDS else drawn

    return run_case(pick, rng)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    counts: dict[str, int] = {}
    start, bad = time.time(), []
    for i in range(args.cases):
        seed = args.seed + i
        try:
            result = run_seed(seed)
        except Exception as e:  # report the seed and go on
            result = {"outcome": "CRASHED", "text": f"{type(e).__name__}: {e}"}
        outcome = result["outcome"]
        counts[outcome] = counts.get(outcome, 0) + 1
        if outcome in ("WRONG", "CRASHED", "refused"):
            bad.append(seed)
            print(f"\nseed {seed}: {outcome} {result}", flush=True)
        if i % 100 == 99:
            jax.clear_caches()
        each = (time.time() - start) / (i + 1)
        line = f"\r{i + 1}/{args.cases} {counts} {each:.2f} s each"
        print(line, end="" if sys.stdout.isatty() or i % 50 != 49 else "\n", flush=True)
    print(f"\n{args.cases} cases from seed {args.seed}: {counts}")
    return int(any(counts.get(k) for k in ("WRONG", "CRASHED")))


if __name__ == "__main__":
    sys.exit(main())
