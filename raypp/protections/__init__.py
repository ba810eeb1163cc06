"""Protections: each maps plain images to protected images."""

from collections.abc import Callable

from raypp.utils.registry import Method, Registry

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
    group="raypp.protections",
)


def register_protection(name: str) -> Callable[[Method], Method]:
    """Decorate a subclass of :class:`raypp.Protection` that becomes the protection ``name`` in this process.

    A class without a model ``Options`` has no options. An entry point of the group ``raypp.protections`` adds a
    protection of an installed package to all processes and to the command line.

    Raises:
        ConfigError: raypp itself has a protection of this name, or ``Options`` has another ``name``.
    """
    return PROTECTIONS.register(name)
