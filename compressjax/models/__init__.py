"""Plain networks. They know no method: they train with every method deleted."""

from compressjax.models.cifar_resnet import cifar_resnet as cifar_resnet
from compressjax.models.densenet import densenet as densenet
from compressjax.models.edsr import edsr as edsr
from compressjax.models.mobilenet import mobilenet as mobilenet
from compressjax.models.replknet import replknet as replknet
from compressjax.models.replknet import replknet_groups as replknet_groups
from compressjax.models.repvgg import repvgg as repvgg
from compressjax.models.resnet import resnet as resnet
from compressjax.models.vgg import vgg as vgg
from compressjax.models.vit import vit as vit
