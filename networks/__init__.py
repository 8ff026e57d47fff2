"""The network of the paper, one file per idea."""

from networks.dmwla import DMWLA, PrototypeMemoryBank
from networks.dsgim import DSGIM
from networks.errors import NetworkError
from networks.layers import VARIANTS
from networks.maxvit import SCALES, pretrained_file
from networks.release import load_release_state_dict
from networks.sim_mpnet import SimMPNet

__all__ = [
    "DMWLA",
    "DSGIM",
    "SCALES",
    "VARIANTS",
    "NetworkError",
    "PrototypeMemoryBank",
    "SimMPNet",
    "load_release_state_dict",
    "pretrained_file",
]
