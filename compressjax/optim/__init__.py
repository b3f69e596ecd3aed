"""Gradient transformations, and masks for those of Optax."""

from compressjax.optim._csgd import csgd as csgd
from compressjax.optim._csgd_budget import csgd_budget as csgd_budget
from compressjax.optim._csgd_decay_mask import csgd_decay_mask as csgd_decay_mask
from compressjax.optim._hold_masks import hold_masks as hold_masks
from compressjax.optim._layer_decay import layer_decay as layer_decay
from compressjax.optim._repvgg_decay_mask import repvgg_decay_mask as repvgg_decay_mask
from compressjax.optim._resrep import resrep as resrep
from compressjax.optim._resrep_budget import ResRepBudget as ResRepBudget
from compressjax.optim._resrep_budget import resrep_budget as resrep_budget
from compressjax.optim._resrep_sgd import resrep_sgd as resrep_sgd
