"""Quantizers, post-training quantization and quantization-aware training."""

from compressjax.quantize import observers as observers
from compressjax.quantize._quantizer import Quantizer as Quantizer
from compressjax.quantize._uniform import uniform as uniform
