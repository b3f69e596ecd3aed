"""Channel groups, shrinking to smaller shapes, masks, and scores of channels."""

from compressjax.prune import schedules as schedules
from compressjax.prune import scores as scores
from compressjax.prune._channels import channels as channels
from compressjax.prune._clusters import cluster as cluster
from compressjax.prune._clusters import clusters as clusters
from compressjax.prune._compactors import compactors as compactors
from compressjax.prune._convert import convert as convert
from compressjax.prune._groups import ChannelGroup as ChannelGroup
from compressjax.prune._groups import groups as groups
from compressjax.prune._mask import mask as mask
from compressjax.prune._select import select as select
from compressjax.prune._selectors import selectors as selectors
from compressjax.prune._shrink import shrink as shrink
from compressjax.prune._trim import trim as trim
from compressjax.prune._weights import weights as weights
from compressjax.prune._widths import polynomial as polynomial
