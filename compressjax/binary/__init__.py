"""Binary networks: signs in any network, links around them, features to distil."""

from compressjax.binary._binarize import binarize as binarize
from compressjax.binary._elastic_link import elastic_link as elastic_link
from compressjax.binary._features import features as features
from compressjax.binary._identity import identity as identity
from compressjax.binary._link import Link as Link
from compressjax.binary._squeeze_interact import squeeze_interact as squeeze_interact
