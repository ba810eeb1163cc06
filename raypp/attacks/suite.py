"""Attack suites: which attacks are run, how strong, and on how many images."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError

from raypp.attacks import ATTACKS
from raypp.config.schema import Cluster, ConfigModel, Seed
from raypp.utils.errors import ConfigError
from raypp.utils.registry import MethodConfig

HALF_EPOCHS, QUARTER, SIXTEENTH = "half the epochs", "a quarter of the images", "a sixteenth of the images"
CURVE = ((HALF_EPOCHS, 0.5, 1.0), (SIXTEENTH, 1.0, 1 / 16), (QUARTER, 1.0, 0.25))
"""Of each trained attack's further trainings: name, share of the epochs, share of the images."""
HALF_EFFORT = "half the steps"


def _attacks(value: Any) -> Any:
    """Validate each attack's options against those of its class."""
    if not isinstance(value, dict):
        return value
    found = []
    for name, options in value.items():
        given = {} if options is None else options
        if not isinstance(given, dict):
            raise ValueError(f"attacks.{name} is {given!r}; allowed is a mapping of its options")
        try:
            found.append(ATTACKS.options(name).model_validate({"name": name, **given}))
        except ConfigError as error:
            raise ValueError(str(error)) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join((name, *map(str, first["loc"])))
            raise ValueError(f"{where} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from error
    return tuple(found)


class Suite(ConfigModel):
    """Which attacks are run, how strong, and on how many images."""

    seed: Seed = 0
    num_queries: int = Field(2000, ge=10)
    """Test images that are attacked, at most; all of the test split are the gallery."""
    num_images: int | None = Field(None, ge=20)
    """Images of his own that the attacker has; null gives him the whole training split."""
    curve: bool = True
    """Train again with half the epochs, a quarter and a sixteenth of the images, to see whether leakage still rises."""
    reference_epochs: int = Field(3, ge=0)
    """Epochs of a plain classifier that reads the reconstructions, where the bundle brings none; 0 does without."""
    attacks: Annotated[tuple[SerializeAsAny[MethodConfig], ...], BeforeValidator(_attacks)]
    cluster: Cluster = Field(default_factory=Cluster)

    def options(self, name: str) -> MethodConfig:
        return next(options for options in self.attacks if options.name == name)


def suite_presets() -> dict[str, Path]:
    """Shipped suites by name."""
    folder = Path(str(resources.files("raypp") / "presets" / "attacks"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
