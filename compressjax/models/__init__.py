"""Plain networks. They know no method: they train with every method deleted."""

from compressjax.models.cifar_resnet import cifar_resnet as cifar_resnet
