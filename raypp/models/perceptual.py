"""Feature networks phi_k of Eq. 6: frozen, and applied to plain and protected images alike.

The paper names neither network nor layer. The authors' later released code uses torchvision's ImageNet VGG-16 up to
relu2_2; that is our default. Without those weights training stops. With ``features.fallback allow`` the
early block of a classifier trained on the same plain images stands in, and every run, bundle and model card says so.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from raypp.models.normalize import Normalize
from raypp.models.vgg import SLICES, VGG16_LAYERS, vgg_features
from raypp.utils.errors import ConfigError, first_line
from raypp.utils.paths import resolve_path
from raypp.utils.registry import MethodConfig

StateDict = dict[str, Tensor]


class VGG16FeatureOptions(MethodConfig):
    name: Literal["vgg16"] = "vgg16"
    weights: Annotated[str, AfterValidator(lambda w: w if w == "torchvision" else resolve_path(w))] = "torchvision"
    """``torchvision`` (ImageNet weights, downloaded once), or the path of a .safetensors or .pt state dict."""
    layer: Literal["relu1_2", "relu2_2", "relu3_3"] = "relu2_2"
    """Whose output is compared; the authors' released code takes relu2_2."""
    fallback: Literal["refuse", "allow"] = "refuse"
    """What happens without torchvision's weights: ``refuse`` stops before training, ``allow`` trains with
    the early block of a plain classifier in their place, which is not the paper's method."""


class VGG16Features(nn.Module):
    """VGG-16 up to the layer that ``state`` ends with: images N x C x H x W in [0, 1] to, for relu2_2, N x 128 x H/2 x
    W/2; grey images are repeated to RGB."""

    Options: ClassVar[type[MethodConfig]] = VGG16FeatureOptions

    def __init__(self, state: StateDict) -> None:
        super().__init__()
        self.normalise = Normalize(3)
        convolutions = len(state) // 2  # each with weight and bias
        end = next(n for n in SLICES.values() if sum(width > 0 for width in VGG16_LAYERS[:n]) == convolutions)
        self.layers = vgg_features(VGG16_LAYERS[:end], 3, batch_norm=False)
        self.layers.load_state_dict(state)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        x: Tensor = self.layers(self.normalise(images))
        return x


class PlainClassifierFeatureOptions(MethodConfig):
    name: Literal["plain_classifier"] = "plain_classifier"


class PlainClassifierFeatures(nn.Module):
    """The early block of a classifier trained on plain images; a departure from the paper's feature network."""

    Options: ClassVar[type[MethodConfig]] = PlainClassifierFeatureOptions

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> PlainClassifierFeatures:
        """Stay in evaluation mode: phi is fixed, its batch statistics too."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.classifier.early_features(images)  # type: ignore[operator]
        return x


class UnavailableWeightsError(ConfigError):
    """Torchvision's weights are neither in torch's cache nor can they be downloaded; the message is the reason."""


def load_vgg_slice(weights: str, layer: str = "relu2_2") -> StateDict:
    """Return the state dict of VGG-16 up to ``layer``.

    Raises:
        UnavailableWeightsError: torchvision's weights cannot be had.
        ConfigError: ``weights`` names a file that is missing, unreadable or of other shapes.
    """
    state = _torchvision_state() if weights == "torchvision" else _read_state(Path(weights))
    state = {key.removeprefix("features."): value for key, value in state.items()}
    wanted = vgg_features(VGG16_LAYERS[: SLICES[layer]], 3, batch_norm=False).state_dict()
    for key, value in wanted.items():
        if key not in state or state[key].shape != value.shape:
            found = tuple(state[key].shape) if key in state else "nothing"
            raise ConfigError(
                f"features.weights {weights!r} is no VGG-16 up to {layer}: {key} must have shape "
                f"{tuple(value.shape)}, found {found}"
            )
    return {key: state[key].float().clone() for key in wanted}


def _read_state(path: Path) -> StateDict:
    if not path.is_file():
        raise ConfigError(
            f"features.weights {str(path)!r} does not exist; allowed: torchvision, or a state dict's path"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader raises types of its own
        reason = first_line(error)
        raise ConfigError(f"features.weights {str(path)!r} cannot be read as a state dict: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ConfigError(f"features.weights {str(path)!r} holds no state dict, that is tensors by name")
    return state


def _torchvision_state() -> StateDict:
    """ImageNet weights from torch's cache or the network."""
    from http.client import HTTPException
    from pickle import UnpicklingError

    from torchvision.models import VGG16_Weights

    watched = sys.stderr.isatty()
    try:
        # Torch says on standard output that it downloads.
        with contextlib.redirect_stdout(sys.stderr if watched else io.StringIO()):
            state: StateDict = VGG16_Weights.IMAGENET1K_V1.get_state_dict(
                progress=watched, check_hash=True, weights_only=True
            )
    except (OSError, HTTPException) as error:  # no network, no place for them, or a download that broke off
        reason = str(getattr(error, "reason", "") or error) or type(error).__name__
        raise UnavailableWeightsError(" ".join(reason.split())) from error
    except (RuntimeError, UnpicklingError, EOFError) as error:
        folder = Path(torch.hub.get_dir())
        if not (folder / "checkpoints" / Path(VGG16_Weights.IMAGENET1K_V1.url).name).exists():
            raise UnavailableWeightsError("what was downloaded in their place is another file") from error
        raise ConfigError(f"torchvision's VGG-16 weights below {folder} are damaged; delete them there") from error
    return state
