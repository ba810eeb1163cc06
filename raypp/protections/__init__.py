"""Protections: each maps plain images to protected images."""

from raypp.utils.registry import Registry

PROTECTIONS = Registry(
    "protection",
    {
        "plain": "raypp.protections.plain:Plain",
        "learned": "raypp.protections.learned:Learned",
        "tanaka": "raypp.protections.tanaka:Tanaka",
        "ele": "raypp.protections.ele:ELE",
        "pixel": "raypp.protections.pixel:Pixel",
        "etc": "raypp.protections.etc:EtC",
        "gan": "raypp.protections.gan:GAN",
    },
)
