"""Integer networks, tuned lowerings, and saving to disk."""

from compressjax.deploy._integer import integer as integer
from compressjax.deploy._tune import tune as tune
