"""The data sets: their facts, preparation, reading and augmentation. It imports neither networks nor utils."""

from datasets import acdc, custom, isic, phantom, segpc, synapse
from datasets.errors import DataError
from datasets.images import ImageDataset, ImageFolder, Picture, read_picture
from datasets.info import DatasetInfo
from datasets.preprocessing import ColourPreprocessing, Preprocessing, preprocessing_from_dict
from datasets.scan import read_scan
from datasets.volumes import SliceDataset, Volume, VolumeDataset, read_volume, write_slice, write_volume

# The facts of every data set, by its name in commands and checkpoints.
DATASETS = {info.name: info for info in (synapse.INFO, acdc.INFO, segpc.INFO, isic.INFO, phantom.INFO)}
