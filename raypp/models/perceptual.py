"""Feature networks phi_k of Eq. 6: frozen, and applied to both plain and protected images.

The paper names neither network nor layer. Our default is torchvision's ImageNet VGG-16 up to relu2_2, as in the code
that the authors released later. Training stops without these weights. With ``features.fallback allow``, the early
block of a classifier of the same plain images replaces it, and every run, bundle and model card states this.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from raypp.models.layers import Normalize
from raypp.models.vgg import SLICES, VGG16_LAYERS, vgg_features
from raypp.utils.errors import ConfigError, first_line
from raypp.utils.paths import resolve_path
from raypp.utils.registry import MethodConfig

StateDict = dict[str, Tensor]


def random_vgg_slice(layer: str) -> StateDict:
    """Random weights of VGG-16 up to a layer, to time a training step."""
    return vgg_features(VGG16_LAYERS[: SLICES[layer]], 3, batch_norm=False).state_dict()


class VGG16Features(nn.Module):
    """VGG-16 up to the last layer of ``state``; for relu2_2, N x C x H x W in [0, 1] to N x 128 x H/2 x W/2.

    Gray images are repeated to RGB.
    """

    class Options(MethodConfig):
        name: Literal["vgg16"] = "vgg16"
        weights: Annotated[str, AfterValidator(lambda w: w if w == "torchvision" else resolve_path(w))] = "torchvision"
        """``torchvision`` (ImageNet weights, downloaded once), or the path of a .safetensors or .pt state dict."""
        layer: Literal["relu1_2", "relu2_2", "relu3_3"] = "relu2_2"
        """The layer whose output is compared; the authors' released code uses relu2_2."""
        fallback: Literal["refuse", "allow"] = "refuse"
        """Without torchvision's weights, ``refuse`` stops before training; ``allow`` trains with the early block of a
        plain classifier instead, which is not the paper's method."""

    def __init__(self, state: StateDict) -> None:
        super().__init__()
        self.normalize = Normalize(3)
        num_convolutions = len(state) // 2  # each has weight and bias
        end = next(n for n in SLICES.values() if sum(width > 0 for width in VGG16_LAYERS[:n]) == num_convolutions)
        self.layers = vgg_features(VGG16_LAYERS[:end], 3, batch_norm=False)
        self.layers.load_state_dict(state)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        x: Tensor = self.layers(self.normalize(images))
        return x


class PlainClassifierFeatures(nn.Module):
    """The early block of a classifier of plain images; it departs from the paper's feature network."""

    class Options(MethodConfig):
        name: Literal["plain_classifier"] = "plain_classifier"

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> PlainClassifierFeatures:
        """Stay in evaluation mode: phi is frozen, including its batch statistics."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.classifier.early_features(images)  # type: ignore[operator]
        return x


class UnavailableWeightsError(ConfigError):
    """Torchvision's weights are not in torch's cache and cannot be downloaded; the message is the reason."""


def load_vgg_slice(weights: str, layer: str = "relu2_2") -> StateDict:
    """Return the state dict of VGG-16 up to ``layer``.

    Raises:
        UnavailableWeightsError: torchvision's weights are not available.
        ConfigError: the file ``weights`` is missing or unreadable, or its tensors have other shapes.
    """
    state = _torchvision_state() if weights == "torchvision" else _read_state(Path(weights))
    state = {key.removeprefix("features."): value for key, value in state.items()}
    expected = vgg_features(VGG16_LAYERS[: SLICES[layer]], 3, batch_norm=False).state_dict()
    for key, value in expected.items():
        if key not in state or state[key].shape != value.shape:
            actual = f"has {tuple(state[key].shape)}" if key in state else "is missing"
            raise ConfigError(
                f"features.weights {weights!r} is no VGG-16 up to {layer}: {key} must have shape "
                f"{tuple(value.shape)} but {actual}"
            )
    return {key: state[key].float().clone() for key in expected}


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
    except Exception as error:  # each reader raises different types
        reason = first_line(error)
        raise ConfigError(f"features.weights {str(path)!r} cannot be read as a state dict: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ConfigError(f"features.weights {str(path)!r} holds no state dict, that is, tensors by name")
    return state


def _torchvision_state() -> StateDict:
    """Load the ImageNet weights from torch's cache or the network."""
    from http.client import HTTPException
    from pickle import UnpicklingError

    from torchvision.models import VGG16_Weights

    is_interactive = sys.stderr.isatty()
    try:
        # torch announces the download on standard output.
        with contextlib.redirect_stdout(sys.stderr if is_interactive else io.StringIO()):
            state: StateDict = VGG16_Weights.IMAGENET1K_V1.get_state_dict(
                progress=is_interactive, check_hash=True, weights_only=True
            )
    except (OSError, HTTPException) as error:  # no network, no space, or an interrupted download
        reason = str(getattr(error, "reason", "") or error) or type(error).__name__
        raise UnavailableWeightsError(" ".join(reason.split())) from error
    except (RuntimeError, UnpicklingError, EOFError) as error:
        folder = Path(torch.hub.get_dir())
        if not (folder / "checkpoints" / Path(VGG16_Weights.IMAGENET1K_V1.url).name).exists():
            raise UnavailableWeightsError("the downloaded file does not have the expected checksum") from error
        raise ConfigError(f"torchvision's VGG-16 weights below {folder} are damaged; delete them there") from error
    return state
