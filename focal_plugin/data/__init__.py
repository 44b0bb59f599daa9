"""Data sets described in a config, and checks of data before it is used."""

import detectron2.data
from detectron2.data import build

from .classes import check_num_classes, check_registered, class_names, is_dense_detector
from .files import check_files, check_files_of
from .local import leave_out_broken_images, register_local_dataset, register_local_datasets
from .mapper import FocalDatasetMapper, build_augmentations
from .proposals import load_proposals_into_dataset
from .records import DataError, has_boxes

# Whatever loads data sets calls this one by its module: Detectron2's loaders and samplers, and LazyConfigs.
detectron2.data.load_proposals_into_dataset = build.load_proposals_into_dataset = load_proposals_into_dataset

__all__ = [
    "DataError",
    "FocalDatasetMapper",
    "build_augmentations",
    "check_files",
    "check_files_of",
    "check_num_classes",
    "check_registered",
    "class_names",
    "has_boxes",
    "is_dense_detector",
    "leave_out_broken_images",
    "load_proposals_into_dataset",
    "register_local_dataset",
    "register_local_datasets",
]
