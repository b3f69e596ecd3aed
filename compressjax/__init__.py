"""compressjax makes any JAX network smaller and faster, as pure functions."""

from compressjax import binary as binary
from compressjax import costs as costs
from compressjax import deploy as deploy
from compressjax import layers as layers
from compressjax import losses as losses
from compressjax import merge as merge
from compressjax import models as models
from compressjax import optim as optim
from compressjax import prune as prune
from compressjax import quantize as quantize
from compressjax._explain import explain as explain
from compressjax._receptive_field import receptive_field as receptive_field
from compressjax.core.doors import from_equinox as from_equinox
from compressjax.core.doors import from_function as from_function
from compressjax.core.doors import from_linen as from_linen
from compressjax.core.doors import from_nnx as from_nnx
from compressjax.core.model import Model as Model
from compressjax.core.model import compose as compose
from compressjax.core.rewrite import capture as capture
from compressjax.core.rewrite import rewrite as rewrite
from compressjax.core.sites import Site as Site
from compressjax.core.sites import sites as sites
