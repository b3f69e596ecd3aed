"""Seconds to analyse a network: trace, channel groups, and a 50 % shrink.

    python benchmarks/analysis.py [--repeat 3]

Variables are ShapeDtypeStructs, so no weights are made. Each network is analysed the
first time in a process of its own (cold); `warm` is the best of the repeats after that.
`cpu` is the processor time of the cold run, which a busy machine does not stretch.
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
        cpu, t0 = time.process_time(), time.perf_counter()
        found = prune.groups(model)  # traces
        t1 = time.perf_counter()
        keep = {g: np.arange(g.size) < -(-g.size // 2) for g in found if g.prunable}
        small = prune.shrink(keep)(model)
        t2 = time.perf_counter()
        cpu = time.process_time() - cpu
        sizes = [
            sum(int(np.prod(v.shape)) for v in jax.tree.leaves(m.variables["params"]))
            for m in (model, small)
        ]
        return {
            "groups": t1 - t0,
            "shrink": t2 - t1,
            "total": t2 - t0,
            "cpu": cpu,
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
        f"{'network':<12} {'cold':>7} {'= groups':>9} {'+ shrink':>9} {'cpu':>7}"
        f" {'warm':>7} {'groups':>7} {'parameters':>26}"
    )
    for name in NETWORKS:
        command = [sys.executable, __file__, "--network", name]
        command += ["--repeat", str(args.repeat)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result = json.loads(done.stdout.strip().splitlines()[-1])
        cold, warm = result["cold"], result["warm"]
        before, after = cold["parameters"]
        print(
            f"{name:<12} {cold['total']:>6.2f}s {cold['groups']:>8.2f}s"
            f" {cold['shrink']:>8.3f}s {cold['cpu']:>6.2f}s {warm['total']:>6.2f}s"
            f" {cold['prunable']:>7} {before:>12,} -> {after:>10,}"
        )


if __name__ == "__main__":
    main()
