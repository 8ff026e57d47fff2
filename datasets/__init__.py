"""The data: what it is, how it is prepared, checked and read. Knows nothing of networks or training."""

from datasets.errors import DataError
from datasets.slices import SliceDataset
from datasets.volume import Volume, read_slice, read_volume, write_slice, write_volume
from datasets.volumes import VolumeDataset

__all__ = [
    "DataError",
    "SliceDataset",
    "Volume",
    "VolumeDataset",
    "read_slice",
    "read_volume",
    "write_slice",
    "write_volume",
]
