"""Gradient transformations, and masks for those of Optax."""

from compressjax.optim._layer_decay import layer_decay as layer_decay
from compressjax.optim._repvgg_decay_mask import repvgg_decay_mask as repvgg_decay_mask
