"""How the suite compiles: quickly. It compiles more than it runs.

A tiny operation costs as much to compile as a whole network, nearly all of it fixed:
the older emitter of jaxlib 0.10 halves that. With XLA_FLAGS set, what is set counts:

    XLA_FLAGS=--xla_backend_optimization_level=3 make test       as users compile
"""

import importlib.metadata
import os

LEVEL = "--xla_backend_optimization_level=1"
QUICK = f"{LEVEL} --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones have one
    QUICK += " --xla_cpu_use_fusion_emitters=false"


def xla_flags(devices: int) -> str:
    """XLA_FLAGS for so many CPU devices."""
    given = os.environ.get("XLA_FLAGS", "")
    parts = [p for p in given.split() if "device_count" not in p]
    quick = [] if "xla_backend_optimization_level" in given else QUICK.split()
    count = f"--xla_force_host_platform_device_count={devices}"
    return " ".join([*parts, *quick, count])
