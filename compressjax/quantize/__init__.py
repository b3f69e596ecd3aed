"""Quantizers, post-training quantization and quantization-aware training."""

from compressjax.quantize import observers as observers
from compressjax.quantize._calibrate import calibrate as calibrate
from compressjax.quantize._insert import insert as insert
from compressjax.quantize._insert import replay as replay
from compressjax.quantize._ptq import ptq as ptq
from compressjax.quantize._quantizer import Quantizer as Quantizer
from compressjax.quantize._uniform import uniform as uniform
