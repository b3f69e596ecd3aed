"""Integer networks, tuned lowerings, and saving to disk."""

from compressjax.deploy._export import export as export
from compressjax.deploy._integer import integer as integer
from compressjax.deploy._load import load as load
from compressjax.deploy._onnx import to_onnx as to_onnx
from compressjax.deploy._save import save as save
from compressjax.deploy._tune import tune as tune
