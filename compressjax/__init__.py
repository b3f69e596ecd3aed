"""compressjax makes any JAX network smaller and faster, as pure functions."""

from compressjax.core.model import Model as Model
from compressjax.core.model import compose as compose
