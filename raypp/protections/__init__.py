"""Protections: each maps plain images to protected images of the same shape."""

from raypp.registry import Registry

PROTECTIONS = Registry(
    "protection",
    {
        "plain": "raypp.protections.plain:Plain",
        "learned": "raypp.protections.learned:Learned",
    },
)
