"""Attack suites: the attacks to run, their options, and the number of images."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError

from raypp.attacks import ATTACKS
from raypp.config.schema import Cluster, ConfigModel, Metrics, Seed
from raypp.config.validation import format_validation_error
from raypp.utils.errors import ConfigError
from raypp.utils.registry import MethodConfig

HALF_EPOCHS, QUARTER, SIXTEENTH = "half the epochs", "a quarter of the images", "a sixteenth of the images"
CURVE = ((HALF_EPOCHS, 0.5, 1.0), (SIXTEENTH, 1.0, 1 / 16), (QUARTER, 1.0, 0.25))
"""Additional trainings of each trained attack: name, fraction of the epochs, fraction of the images."""
HALF_EFFORT = "half the steps"


def _validate_attacks(value: Any) -> Any:
    """Validate each attack's options against those of its class."""
    if not isinstance(value, dict):
        return value
    attacks = []
    for name, raw_options in value.items():
        options = {} if raw_options is None else raw_options
        if not isinstance(options, dict):
            raise ValueError(f"attacks.{name} is {options!r}; allowed is a mapping of its options")
        try:
            attacks.append(ATTACKS.options(name).model_validate({"name": name, **options}))
        except ConfigError as error:
            raise ValueError(str(error)) from error
        except ValidationError as error:
            sentence = format_validation_error(error, options, ATTACKS.options(name))
            is_unknown = sentence.startswith("unknown key '")
            raise ValueError(sentence.replace("'", f"'{name}.", 1) if is_unknown else f"{name}.{sentence}") from error
    return tuple(attacks)


class Suite(ConfigModel):
    """The attacks to run, their options, and the number of images."""

    seed: Seed = 0
    num_queries: int = Field(2000, ge=10)
    """Most test images to attack; the whole test split is the gallery."""
    num_images: int | None = Field(None, ge=20)
    """Number of the attacker's images; null for the whole training split."""
    curve: bool = True
    """Train again with half the epochs, and with a quarter and a sixteenth of the images, to test convergence."""
    reference_epochs: int | None = Field(None, ge=0)
    """Epochs of plain classifiers where the bundle has none that serves: of the one that reads the reconstructions, and
    of the one that the client could run alone, for the cloud gain. null: as many as the training of the bundle, or of
    the preset of a function. Fewer make the gain an upper bound. 0: no classifier."""
    attacks: Annotated[tuple[SerializeAsAny[MethodConfig], ...], BeforeValidator(_validate_attacks)]
    metrics: Metrics = Metrics()
    cluster: Cluster = Field(default_factory=Cluster)

    def options(self, name: str) -> MethodConfig:
        return next(options for options in self.attacks if options.name == name)


def suite_presets() -> dict[str, Path]:
    """Shipped suites by name."""
    folder = Path(str(resources.files("raypp") / "presets" / "attacks"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
