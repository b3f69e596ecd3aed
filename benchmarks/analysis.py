"""Seconds to analyse a network: trace, channel groups, and a 50 % shrink.

    python benchmarks/analysis.py [--repeat 3]

Variables are ShapeDtypeStructs, so no weights are made. Each network is traced for the
first time in a process of its own (cold); `warm` is the best of the repeats after that.
"""

import argparse
import json
import subprocess
import sys
import time

NETWORKS = {
    "resnet18": ("resnet", "resnet18", 224),
    "resnet50": ("resnet", "resnet50", 224),
    "densenet121": ("densenet", "densenet121", 224),
    "vit_b16": ("vit", "vit_b16", 224),
}


def analyse(name: str, repeat: int) -> dict:
    """Times of one network, in this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from compressjax import models, prune
    from compressjax.core import trace
    from compressjax.core.model import Model

    family, variant, side = NETWORKS[name]
    module = getattr(models, family)(variant)
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    jax.clear_caches()

    def once() -> dict:
        # A new function each time: nothing is answered from JAX's trace cache.
        def apply_fn(v, x):
            return module.apply(v, x)

        model = Model(apply_fn, variables, (x,))
        t0 = time.perf_counter()
        trace.trace_model(model)
        t1 = time.perf_counter()
        found = prune.groups(model)
        t2 = time.perf_counter()
        keep = {g: np.arange(g.size) < -(-g.size // 2) for g in found if g.prunable}
        small = prune.shrink(keep)(model)
        t3 = time.perf_counter()
        sizes = [
            sum(int(np.prod(v.shape)) for v in jax.tree.leaves(m.variables["params"]))
            for m in (model, small)
        ]
        return {
            "trace": t1 - t0,
            "groups": t2 - t1,  # traces again
            "shrink": t3 - t2,
            "total": t3 - t1,
            "prunable": len(keep),
            "parameters": sizes,
        }

    cold = once()
    runs = [once() for _ in range(repeat)]
    return {"cold": cold, "warm": min(runs, key=lambda r: r["total"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--network", choices=sorted(NETWORKS))
    args = parser.parse_args()
    if args.network:
        print(json.dumps(analyse(args.network, args.repeat)))
        return
    print(
        f"{'network':<12} {'cold total':>10} {'(trace':>8} {'labels':>7} {'shrink)':>8}"
        f" {'warm':>6} {'groups':>7} {'parameters':>24}"
    )
    for name in NETWORKS:
        command = [sys.executable, __file__, "--network", name]
        command += ["--repeat", str(args.repeat)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result = json.loads(done.stdout.strip().splitlines()[-1])
        cold, warm = result["cold"], result["warm"]
        # groups() traces once itself; the first, cold trace is what it would have paid.
        labels = warm["groups"] - warm["trace"]
        total = cold["trace"] + labels + cold["shrink"]
        before, after = cold["parameters"]
        print(
            f"{name:<12} {total:>9.2f}s {cold['trace']:>7.2f}s {labels:>6.2f}s"
            f" {cold['shrink']:>7.3f}s {warm['total']:>5.2f}s {cold['prunable']:>7}"
            f" {before:>12,} -> {after:>10,}"
        )


if __name__ == "__main__":
    main()
