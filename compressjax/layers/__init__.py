"""Blocks of networks, as Flax Linen modules. They know no transform."""

from compressjax.layers._acb import ACB as ACB
from compressjax.layers._conv_ffn import ConvFFN as ConvFFN
from compressjax.layers._dbb import DBB as DBB
from compressjax.layers._depthwise import depthwise as depthwise
from compressjax.layers._drop_path import DropPath as DropPath
from compressjax.layers._replk import RepLK as RepLK
from compressjax.layers._replk_block import RepLKBlock as RepLKBlock
from compressjax.layers._repvgg import RepVGG as RepVGG
from compressjax.layers._se import SE as SE
from compressjax.layers._sev2 import SEv2 as SEv2
