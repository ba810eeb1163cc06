"""Networks have the published sizes, keep any image's shape, and take torchvision's weights as they are."""

from __future__ import annotations

from http.client import IncompleteRead
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, few_examples
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from raypp.models import CLASSIFIERS
from raypp.models.layers import IMAGENET_MEAN, IMAGENET_STD, Normalize
from raypp.models.perceptual import PlainClassifierFeatures, UnavailableWeightsError, VGG16Features, load_vgg_slice
from raypp.models.resnet import ResNet20, ResNetOptions
from raypp.models.unet import UNet
from raypp.models.vgg import RELU2_2, VGG16_LAYERS, VGG16BN, vgg_features
from raypp.protections import PROTECTIONS
from raypp.protections.learned import Learned
from raypp.utils.errors import ConfigError

SHARED_VGG = ROOT.parent / "shared" / "data" / "vgg19-relu2_2-normalised.safetensors"


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def random_slice(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return vgg_features(VGG16_LAYERS[:RELU2_2], 3, batch_norm=False).state_dict()


# Sizes


@pytest.mark.slow
def test_parameter_counts_are_the_published_ones() -> None:
    assert count(UNet(3, 64, 4)) == 34_527_171
    assert count(ResNet20(ResNetOptions(), num_classes=10)) == 269_722
    assert count(ResNet20(ResNetOptions(), num_classes=100)) == 275_572
    assert count(vgg_features(VGG16_LAYERS[:RELU2_2], 3, batch_norm=False)) == 260_160
    # Convolutions with biases, two numbers per batch-normalised channel, and the head 512-512.
    assert count(VGG16BN(VGG16BN.Options(), num_classes=10)) == 14_714_688 + 2 * 4224 + 2 * 512 * 513 + 5130


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_unet_parameters_follow_from_width_depth_and_skips(depth: int) -> None:
    def block(channels_in: int, channels_out: int) -> int:
        return 9 * channels_in * channels_out + channels_out + 2 * channels_out

    widths = [5 * 2**level for level in range(depth + 1)]
    for skips in range(depth + 1):
        expected = 5 * 2 + 2  # 1 x 1 head
        for level, width in enumerate(widths):
            expected += block(2 if level == 0 else widths[level - 1], width) + block(width, width)
        for level in range(depth):
            doubled = 2 if level >= depth - skips else 1
            expected += block(widths[level + 1], widths[level])
            expected += block(doubled * widths[level], widths[level]) + block(widths[level], widths[level])
        assert count(UNet(2, 5, depth, skips)) == expected


@pytest.mark.parametrize("skips", [0, 1, 2, 3])
def test_skips_are_kept_from_the_deepest_level(skips: int) -> None:
    depth = 3
    torch.manual_seed(0)
    unet = UNet(3, 4, depth, skips).eval()
    images = torch.rand(2, 3, 16, 16)
    for cut in range(depth):  # nothing passes the upsampling at this level, so only skips at it or above it speak
        module = unet.up[str(cut)][0]
        original = module.weight.data.clone()
        module.weight.data.zero_()
        with torch.no_grad():
            outputs = unet(images)
        module.weight.data.copy_(original)
        assert torch.equal(outputs[0], outputs[1]) == (skips < depth - cut)


def test_skips_deeper_than_the_net_are_refused() -> None:
    with pytest.raises(ValueError, match="skips is 3, allowed is at most depth = 2"):
        Learned.Options(depth=2, skips=3)


# Shapes


@given(
    height=st.integers(1, 21),
    width=st.integers(1, 21),
    channels=st.sampled_from([1, 2, 3]),
    depth=st.integers(1, 3),
    data=st.data(),
)
@few_examples
def test_unet_keeps_any_shape(height: int, width: int, channels: int, depth: int, data: st.DataObject) -> None:
    unet = UNet(channels, 2, depth, data.draw(st.integers(0, depth))).eval()
    images = torch.rand(2, channels, height, width)
    with torch.inference_mode():
        assert unet(images).shape == images.shape


def test_padding_repeats_the_border_and_leaves_multiples_alone() -> None:
    torch.manual_seed(0)
    unet = UNet(3, 4, 2).eval()
    images = torch.rand(2, 3, 7, 10)
    by_hand = torch.from_numpy(np.pad(images.numpy(), ((0, 0), (0, 0), (0, 1), (0, 2)), mode="edge"))
    with torch.inference_mode():
        assert torch.equal(unet(images), unet(by_hand)[..., :7, :10])
        whole = unet(by_hand)  # 8 x 12 is left as it is: more of the same border changes what is near it alone
        assert not torch.equal(whole, unet(F.pad(by_hand, (0, 4, 0, 4), mode="replicate"))[..., :8, :12])


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (1, 1, 9, 33), (3, 3, 32, 20)])
def test_protections_map_to_images_of_the_same_shape(shape: tuple[int, ...]) -> None:
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    for name, options in (("plain", {}), ("learned", {"width": 4, "depth": 2})):
        protection = PROTECTIONS.build(PROTECTIONS.options(name)(**options), channels=shape[1]).eval()
        protected = protection.protect(images)
        assert protected.shape == images.shape
        assert protected.dtype == torch.uint8
        assert torch.equal(protected, images) == (name == "plain")
        exact = protection(images.float() / 255)
        assert exact.min() >= 0
        assert exact.max() <= 1
        assert torch.equal(protected, (exact * 255).round().to(torch.uint8))


def test_learned_output_is_float32_under_bfloat16() -> None:
    learned = Learned(Learned.Options(width=4, depth=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert learned(torch.rand(2, 3, 8, 8)).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), [("resnet20", 16), ("resnet20", 13), ("vgg16_bn", 32)])
@pytest.mark.parametrize("channels", [1, 3])
def test_classifiers_read_any_size_and_channels(name: str, side: int, channels: int) -> None:
    net = CLASSIFIERS.build(CLASSIFIERS.options(name)(), num_classes=7, channels=channels).eval()
    images = torch.rand(2, channels, side, side + 3)
    with torch.inference_mode():
        logits, early = net(images), net.early_features(images)
    assert logits.shape == (2, 7)
    assert early.shape == ((2, 16, side, side + 3) if name == "resnet20" else (2, 128, side // 2, (side + 3) // 2))


def test_resnet_shortcut_has_no_parameters_and_pads_channels_evenly() -> None:
    net = ResNet20(ResNetOptions(), num_classes=3).eval()
    block = net.layer2[0]
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 16, 6, 6)
    with torch.inference_mode():
        y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


# Normalisation


def test_normalisation_is_inside_the_nets() -> None:
    images = torch.rand(2, 3, 8, 8)
    by_hand = (images.numpy() - np.reshape(IMAGENET_MEAN, (1, 3, 1, 1))) / np.reshape(IMAGENET_STD, (1, 3, 1, 1))
    assert np.allclose(Normalize(3)(images), by_hand, atol=1e-6)
    assert np.allclose(Normalize(1)(images[:, :1]), (images[:, :1].numpy() - 0.45) / 0.225, atol=1e-6)
    classifier = ResNet20(ResNetOptions(), num_classes=3).eval()
    for net, first in (
        (classifier, classifier.conv1),
        (VGG16BN(VGG16BN.Options(), num_classes=3).eval(), None),
        (VGG16Features(random_slice()), None),
    ):
        received: list[torch.Tensor] = []
        module = first or next(m for m in net.modules() if isinstance(m, nn.Conv2d))
        module.register_forward_pre_hook(lambda _, inputs, received=received: received.append(inputs[0]))
        with torch.inference_mode():
            net(torch.full((1, 3, 32, 32), 0.456))
        assert received[0][0, :, 0, 0].tolist() == pytest.approx([(0.456 - 0.485) / 0.229, 0, (0.456 - 0.406) / 0.225])
        assert not any("normalize" in key for key in net.state_dict()), "weights files hold weights alone"


# The feature network


LAYERS = [("relu1_2", 4, (64, 16, 20)), ("relu2_2", 9, (128, 8, 10)), ("relu3_3", 16, (256, 4, 5))]


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "end", "shape"), LAYERS, ids=[name for name, _, _ in LAYERS])
def test_a_slice_is_torchvisions_up_to_its_layer(tmp_path: Path, layer: str, end: int, shape: tuple[int, ...]) -> None:
    from torchvision.models.vgg import cfgs, make_layers

    theirs = make_layers(cfgs["D"])[:16]  # as vgg16() does it, without the 120 million weights behind
    torch.manual_seed(0)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.05)
    save_file(theirs.state_dict(), tmp_path / "vgg.safetensors")
    state = load_vgg_slice(str(tmp_path / "vgg.safetensors"), layer)
    assert state is not None
    images = torch.rand(2, 3, 16, 20)
    with torch.inference_mode():
        expected = theirs[:end](Normalize(3)(images))
        assert torch.equal(VGG16Features(state)(images), expected)
    assert expected.shape == (2, *shape)


def test_grey_images_are_repeated_to_rgb() -> None:
    phi = VGG16Features(random_slice())
    grey = torch.rand(2, 1, 8, 8)
    assert torch.equal(phi(grey), phi(grey.repeat(1, 3, 1, 1)))


def test_plain_classifier_features_stay_fixed_in_train_mode() -> None:
    phi = PlainClassifierFeatures(ResNet20(ResNetOptions(), num_classes=3))
    holder = nn.ModuleDict({"phi": phi}).train()
    before = {k: v.clone() for k, v in phi.state_dict().items()}
    images = torch.rand(4, 3, 8, 8, requires_grad=True)
    first = phi(images)
    first.sum().backward()
    assert torch.equal(first, phi.classifier.early_features(images))
    assert not any(m.training for m in phi.modules())
    assert holder.training
    assert all(torch.equal(v, before[k]) for k, v in phi.state_dict().items())
    assert all(p.grad is None for p in phi.parameters())
    assert images.grad is not None
    assert images.grad.any()


def test_weights_from_local_files(tmp_path: Path) -> None:
    state = random_slice()
    save_file(state, tmp_path / "slice.safetensors")
    # As torchvision stores the whole network: a prefix, deeper layers and a classifier, here in half precision too.
    full = {f"features.{k}": v.half() for k, v in state.items()}
    full |= {"features.10.weight": torch.rand(256, 128, 3, 3), "classifier.0.bias": torch.rand(4)}
    torch.save(full, tmp_path / "vgg16-397923af.pth")
    for name, tolerance in (("slice.safetensors", 0.0), ("vgg16-397923af.pth", 1e-3)):
        loaded = load_vgg_slice(str(tmp_path / name))
        assert loaded is not None
        assert loaded.keys() == state.keys()
        assert all(v.dtype == torch.float32 for v in loaded.values())
        assert all(torch.allclose(loaded[k], state[k], atol=tolerance, rtol=tolerance) for k in state)


def test_shared_feature_weights_load() -> None:
    if not SHARED_VGG.exists():
        pytest.skip(f"{SHARED_VGG} is not on this machine")
    state = load_vgg_slice(str(SHARED_VGG))
    assert state is not None
    with torch.inference_mode():
        features = VGG16Features(state)(torch.rand(2, 3, 32, 32))
    assert features.shape == (2, 128, 16, 16)
    assert 0.1 < features.mean() < 10  # normalised: a mean activation of about 1 on real images


def test_a_layer_that_a_file_lacks_is_named(tmp_path: Path) -> None:
    save_file(random_slice(), tmp_path / "slice.safetensors")
    with pytest.raises(ConfigError, match=r"is no VGG-16 up to relu3_3: 10\.weight must have shape .* is missing"):
        load_vgg_slice(str(tmp_path / "slice.safetensors"), "relu3_3")


def test_wrong_weights_are_refused_in_one_sentence(tmp_path: Path) -> None:
    state = random_slice()
    save_file({k: v[:1] for k, v in state.items()}, tmp_path / "shapes.safetensors")
    save_file({"0.weight": state["0.weight"]}, tmp_path / "part.safetensors")
    (tmp_path / "garbage.safetensors").write_bytes(b"\xff" * 64)
    (tmp_path / "garbage.pt").write_bytes(b"not a zip file")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"0.weight": 3}, tmp_path / "number.pt")
    torch.save(nn.Conv2d(1, 1, 1), tmp_path / "module.pt")  # a pickle that would run code
    for name, reason in {
        "shapes.safetensors": r"0\.weight must have shape \(64, 3, 3, 3\) but has \(1, 3, 3, 3\)",
        "part.safetensors": r"0\.bias must have shape \(64,\) but is missing",
        "garbage.safetensors": "cannot be read as a state dict",
        "garbage.pt": "cannot be read as a state dict",
        "list.pt": "holds no state dict",
        "number.pt": "holds no state dict",
        "module.pt": "cannot be read as a state dict",
        "absent.pt": "does not exist; allowed: torchvision",
    }.items():
        with pytest.raises(ConfigError, match=reason) as raised:
            load_vgg_slice(str(tmp_path / name))
        assert name in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (URLError("no network"), "no network"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (IncompleteRead(b""), "IncompleteRead(0 bytes read)"),
        (TimeoutError(), "TimeoutError"),
        (RuntimeError("invalid hash value"), "the downloaded file does not have the expected checksum"),
    ],
)
def test_torchvisions_weights_that_cannot_be_had_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(UnavailableWeightsError) as raised:
        load_vgg_slice("torchvision")
    assert str(raised.value) == reason
