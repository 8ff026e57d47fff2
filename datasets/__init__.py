"""The data: what it is, how it is prepared, checked and read. Knows nothing of networks or training."""

from datasets import acdc, phantom, synapse
from datasets.errors import DataError
from datasets.info import DatasetInfo
from datasets.preprocessing import Preprocessing
from datasets.scan import read_scan
from datasets.slices import SliceDataset
from datasets.volume import Volume, read_slice, read_volume, write_slice, write_volume
from datasets.volumes import VolumeDataset

DATASETS = {info.name: info for info in (acdc.INFO, synapse.INFO, phantom.INFO)}
"""What every data set is, by its name in commands and checkpoints."""

__all__ = [
    "DATASETS",
    "DataError",
    "DatasetInfo",
    "Preprocessing",
    "SliceDataset",
    "Volume",
    "VolumeDataset",
    "read_scan",
    "read_slice",
    "read_volume",
    "write_slice",
    "write_volume",
]
