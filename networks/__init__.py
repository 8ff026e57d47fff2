"""The network of the paper, one file per idea, and networks to compare with."""

from networks import baselines
from networks.dmwla import DMWLA
from networks.dsgim import DSGIM
from networks.layers import VARIANTS, NetworkError
from networks.maxvit import SCALES
from networks.memory_bank import PrototypeMemoryBank
from networks.registry import DEFAULT_NETWORK, NETWORKS, build, default_weights, register
from networks.release import load_release_state_dict, release_arguments
from networks.sim_mpnet import CHOICES, SimMPNet
