"""Photographs, degradations and data sets; every sample is a pure function of a seed and an index."""

from rfsr_ext.data.datasets import DistortedCrops, ImageFolder, PhotographCrops, Sample, evaluation_crops
from rfsr_ext.data.degradation import Degradation
from rfsr_ext.data.folders import Root
from rfsr_ext.data.photographs import PACKAGED, PHOTOGRAPHS, load_photograph, photographs

__all__ = [
    "PACKAGED",
    "PHOTOGRAPHS",
    "Degradation",
    "DistortedCrops",
    "ImageFolder",
    "PhotographCrops",
    "Root",
    "Sample",
    "evaluation_crops",
    "load_photograph",
    "photographs",
]
