"""Merging layers: fewer operations that compute the same function."""

from compressjax.merge._expand import expand as expand
from compressjax.merge._fuse import fuse as fuse
