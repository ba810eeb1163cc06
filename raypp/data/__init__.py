"""Data sources: plain images and their labels."""

from raypp.utils.registry import Registry

SOURCES = Registry(
    "data source",
    {
        "shapes": "raypp.data.shapes:Shapes",
        "cifar10": "raypp.data.cifar:Cifar10",
        "cifar100": "raypp.data.cifar:Cifar100",
        "parquet": "raypp.data.parquet:Parquet",
        "folder": "raypp.data.folder:Folder",
    },
)
