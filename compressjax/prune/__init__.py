"""Channel groups, shrinking to smaller shapes, masks, and scores of channels."""

from compressjax.prune._groups import ChannelGroup as ChannelGroup
from compressjax.prune._groups import groups as groups
