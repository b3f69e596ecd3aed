"""Quantizers, post-training quantization and quantization-aware training."""

from compressjax.quantize import observers as observers
from compressjax.quantize._allocate import allocate as allocate
from compressjax.quantize._binary import binary as binary
from compressjax.quantize._calibrate import calibrate as calibrate
from compressjax.quantize._correct_bias import (
    clipped_normal_mean as clipped_normal_mean,
)
from compressjax.quantize._correct_bias import correct_bias as correct_bias
from compressjax.quantize._damp import damp as damp
from compressjax.quantize._decay_mask import decay_mask as decay_mask
from compressjax.quantize._dorefa import dorefa as dorefa
from compressjax.quantize._equalize import equalize as equalize
from compressjax.quantize._fractional import fractional as fractional
from compressjax.quantize._gaussian import gaussian as gaussian
from compressjax.quantize._guard import Spread as Spread
from compressjax.quantize._guard import guard as guard
from compressjax.quantize._guard import spread as spread
from compressjax.quantize._insert import insert as insert
from compressjax.quantize._insert import replay as replay
from compressjax.quantize._least_squares import least_squares as least_squares
from compressjax.quantize._lsq import lsq as lsq
from compressjax.quantize._pact import pact as pact
from compressjax.quantize._power_of_two import power_of_two as power_of_two
from compressjax.quantize._progress import set_progress as set_progress
from compressjax.quantize._ptq import ptq as ptq
from compressjax.quantize._quantizer import Quantizer as Quantizer
from compressjax.quantize._reestimate import reestimate_norms as reestimate_norms
from compressjax.quantize._remove import remove as remove
from compressjax.quantize._rescale_weights import rescale_weights as rescale_weights
from compressjax.quantize._round import learn_rounding as learn_rounding
from compressjax.quantize._schedule import schedule as schedule
from compressjax.quantize._sensitivity import sensitivity as sensitivity
from compressjax.quantize._ternary import ternary as ternary
from compressjax.quantize._twin import twin_uniform as twin_uniform
from compressjax.quantize._twin_sites import twin_overrides as twin_overrides
from compressjax.quantize._twin_sites import twin_sites as twin_sites
from compressjax.quantize._uniform import uniform as uniform
