"""The keyed protections: exact round trips, the structure that their sources publish, and where their keys go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from raypp.models.resnet import ResNet20, ResNetOptions
from raypp.protections import PROTECTIONS
from raypp.protections.base import Protection
from raypp.protections.cipher import Cipher
from raypp.protections.gan import GAN
from raypp.protections.learned import AdversariesAndGuides, Bottleneck, Learned
from raypp.protections.pixel import Pixel
from raypp.utils.errors import ConfigError
from raypp.utils.keys import Key

REVERSIBLE: list[tuple[str, dict[str, Any]]] = [
    ("tanaka", {}),
    ("tanaka", {"parity": 7}),
    ("ele", {}),
    ("etc", {}),
    ("etc", {"block": 7}),
    ("pixel", {}),
    ("pixel", {"shuffle_color_channels": True}),
    ("pixel", {"parity": 0}),
]
KEY = Key(bytes(range(32)))


def build(name: str, options: dict[str, Any] | None = None, key: Key = KEY, channels: int = 3) -> Any:
    validated = PROTECTIONS.options(name).model_validate({"name": name, **(options or {})})
    return PROTECTIONS.build(validated, channels=channels, key=key)


def pictures(seed: int, num: int, height: int, width: int, channels: int = 3) -> Tensor:
    drawn = np.random.default_rng(seed).integers(0, 256, (num, channels, height, width), dtype=np.uint8)
    return torch.from_numpy(drawn)


@given(
    case=st.sampled_from(REVERSIBLE),
    size=st.tuples(st.integers(1, 37), st.integers(1, 37)),
    num=st.integers(1, 5),
    channels=st.sampled_from([1, 3]),
    secret=st.binary(min_size=32, max_size=32),
)
def test_unprotect_gives_back_every_value(
    case: tuple[str, dict[str, Any]], size: tuple[int, int], num: int, channels: int, secret: bytes
) -> None:
    name, options = case
    if options.get("shuffle_color_channels"):
        channels = 3
    protection = build(name, options, Key(secret), channels)
    images = pictures(num, num, *size, channels)
    protected = protection.protect(images)
    block = protection.block
    assert protected.dtype == torch.uint8
    assert protected.shape == (num, channels, *(-(-side // block) * block for side in size))
    assert torch.equal(protection.unprotect(protected, size), images)


@pytest.mark.parametrize(("name", "options"), REVERSIBLE)
def test_float_images_are_protected_as_the_bytes_that_they_are(name: str, options: dict[str, Any]) -> None:
    protection = build(name, options)
    images = pictures(0, 4, 32, 32)
    as_float = protection(images.float() / 255)
    assert torch.equal((as_float * 255).round().to(torch.uint8), protection.protect(images))


@pytest.mark.parametrize("name", ["tanaka", "ele", "etc", "pixel"])
def test_another_key_protects_otherwise_and_does_not_undo(name: str) -> None:
    images = pictures(1, 2, 32, 32)
    one, other = build(name), build(name, key=Key.generate())
    protected = one.protect(images)
    assert not torch.equal(protected, other.protect(images))
    assert (other.unprotect(protected) == images).float().mean() < 0.6
    assert torch.equal(build(name).protect(images), protected)  # stable under its key


@pytest.mark.parametrize("name", ["tanaka", "ele", "etc", "pixel"])
def test_a_keyed_protection_without_its_key_is_refused(name: str) -> None:
    options = PROTECTIONS.options(name)(name=name)
    assert PROTECTIONS.get(name).needs_key(options)
    with pytest.raises(ValueError, match="needs its key"):
        PROTECTIONS.build(options, channels=3)


def published_le(image: np.ndarray, order: np.ndarray) -> np.ndarray:
    """LE of one image (H, W, 3) as its public code is described, with loops over blocks."""
    marked = order > 48
    protected = np.empty_like(image)
    for y in range(0, image.shape[0], 4):
        for x in range(0, image.shape[1], 4):
            flat = image[y : y + 4, x : x + 4].reshape(-1)
            halves = np.concatenate((flat & 15, flat >> 4))
            halves[marked] = 15 - halves[marked]
            moved = halves[order]
            moved[marked] = 15 - moved[marked]
            protected[y : y + 4, x : x + 4] = ((moved[48:] << 4) + moved[:48]).reshape(4, 4, 3)
    return protected


def test_tanaka_with_parity_is_the_published_cipher() -> None:
    image = pictures(2, 1, 32, 32)
    order = np.random.RandomState(11).permutation(96)
    assert (order > 48).sum() == 47
    expected = published_le(image[0].permute(1, 2, 0).numpy().copy(), order)
    protected = build("tanaka", {"parity": 11}).protect(image)[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(protected, expected)
    # Its inverse is the same routine with the inverted permutation and the same marks.
    blocks = protected.reshape(8, 4, 8, 4, 3).transpose(0, 2, 1, 3, 4).reshape(64, 48)
    halves = np.concatenate((blocks & 15, blocks >> 4), axis=1)
    marked = order > 48
    halves[:, marked] = 15 - halves[:, marked]
    halves = halves[:, np.argsort(order)]
    halves[:, marked] = 15 - halves[:, marked]
    plain = ((halves[:, 48:] << 4) + halves[:, :48]).reshape(8, 8, 4, 4, 3).transpose(0, 2, 1, 3, 4).reshape(32, 32, 3)
    np.testing.assert_array_equal(plain, image[0].permute(1, 2, 0).numpy())


def test_tanaka_treats_every_block_of_every_image_alike() -> None:
    protection = build("tanaka")
    block = pictures(3, 1, 4, 4)
    protected = protection.protect(block.repeat(1, 1, 8, 8))
    assert torch.equal(protected, protection.protect(block).repeat(1, 1, 8, 8))


def test_ele_has_a_key_per_block_and_moves_blocks() -> None:
    protection = build("ele")
    same = protection.protect(pictures(3, 1, 4, 4).repeat(1, 1, 8, 8))
    blocks = same.view(3, 8, 4, 8, 4).permute(1, 3, 0, 2, 4).reshape(64, -1)
    assert len(torch.unique(blocks, dim=0)) == 64
    images = pictures(4, 1, 32, 32)
    changed = images.clone()
    changed[:, :, :4, :4] ^= 255
    touched = (protection.protect(images) != protection.protect(changed))[0].any(0)
    rows, columns = torch.nonzero(touched, as_tuple=True)
    assert {(int(r) // 4, int(c) // 4) for r, c in zip(rows, columns, strict=True)} != {(0, 0)}
    assert rows.max() - rows.min() < 4
    assert columns.max() - columns.min() < 4


def test_etc_moves_whole_blocks_and_keeps_their_values() -> None:
    protection = build("etc")
    images = pictures(5, 1, 32, 32)
    protected = protection.protect(images)

    def contents(batch: Tensor) -> set[bytes]:
        """Each block's values without order, and without telling a block from its negative."""
        blocks = batch.view(3, 8, 4, 8, 4).permute(1, 3, 0, 2, 4).reshape(64, -1)
        both = torch.stack((blocks.sort(1).values, (255 - blocks).sort(1).values))
        return {min(a.numpy().tobytes(), b.numpy().tobytes()) for a, b in zip(both[0], both[1], strict=True)}

    assert contents(protected) == contents(images)
    # No channel is duplicated: each block still has its three channels' values, each in one channel.
    values = protected.view(3, 8, 4, 8, 4).permute(1, 3, 0, 2, 4).reshape(64, 3, 16).sort(2).values
    assert all(len(torch.unique(block, dim=0)) == 3 for block in values)


@pytest.mark.parametrize("move", [lambda x: torch.roll(x, 5, dims=-1), lambda x: x.flip(-1)], ids=["shift", "flip"])
def test_pixel_commutes_with_shift_and_flip(move: Callable[[Tensor], Tensor]) -> None:
    """Moving a protected image is protecting the moved image under the moved key."""

    class Moved(Pixel):
        def expand(self, height: int, width: int) -> tuple[np.ndarray | None, np.ndarray]:
            index, mask = super().expand(height, width)
            assert index is not None
            pixels = move(torch.arange(height * width).view(height, width)).flatten().numpy()
            colours = (index.reshape(-1, 3) % 3)[pixels]
            return (np.arange(height * width)[:, None] * 3 + colours).ravel(), mask.reshape(-1, 3)[pixels].ravel()

    options = Pixel.Options(shuffle_color_channels=True)
    images = pictures(6, 2, 32, 32)
    moved_after = move(Pixel(options, key=KEY).protect(images))
    assert torch.equal(Moved(options, key=KEY).protect(move(images)), moved_after)
    assert not torch.equal(Pixel(options, key=KEY).protect(move(images)), moved_after)


def test_pixel_with_parity_is_the_published_cipher() -> None:
    image = pictures(7, 1, 32, 32)
    plain = image[0].permute(1, 2, 0).numpy()
    inverted = np.random.RandomState(0).randint(0, 2, size=plain.shape)
    expected = np.where(inverted == 1, 255 - plain, plain)
    protected = build("pixel", {"parity": 0}).protect(image)[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(protected, expected)


@pytest.mark.parametrize("shuffle_color_channels", [False, True])
def test_pixel_without_key_management_draws_a_key_for_every_image(shuffle_color_channels: bool) -> None:
    options = {"keys": "per_image", "shuffle_color_channels": shuffle_color_channels}
    protection = build("pixel", options)
    image = pictures(8, 1, 16, 16)
    protected = protection.protect(image.repeat(8, 1, 1, 1))
    assert len(torch.unique(protected.flatten(1), dim=0)) == 8
    assert not torch.equal(protected, protection.protect(image.repeat(8, 1, 1, 1)))

    def unsigned(batch: Tensor) -> Tensor:
        both = torch.minimum(batch, 255 - batch)
        return both.sort(1).values if shuffle_color_channels else both

    assert torch.equal(unsigned(protected), unsigned(image.repeat(8, 1, 1, 1)))  # nothing but signs and colours changed
    with pytest.raises(ValueError, match="the keys are not stored"):
        protection.unprotect(protected)
    torch.manual_seed(3)
    one = protection(image.repeat(4, 1, 1, 1).float() / 255)
    torch.manual_seed(3)
    assert torch.equal(one, protection(image.repeat(4, 1, 1, 1).float() / 255))  # training repeats under its seed


@pytest.mark.parametrize(
    "options",
    [
        {"parity": 1, "shuffle_color_channels": True},
        {"parity": 1, "keys": "per_image"},
        {"keys": "per_image", "key_file": "k"},
    ],
)
def test_options_of_pixel_that_do_not_go_together_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"parity|key_file"):
        build("pixel", options)


@pytest.mark.parametrize("name", list(PROTECTIONS))
def test_every_protection_maps_bytes_to_bytes(name: str) -> None:
    small = {"learned": {"width": 2, "depth": 2}, "gan": {"width": 2, "num_blocks": 1}}
    protection: Protection = build(name, small.get(name)).eval()
    images = pictures(9, 3, 18, 22)
    protected = protection.protect(images)
    assert protected.dtype == torch.uint8
    assert protected.shape == protection.aligned(images).shape
    assert isinstance(protection, Cipher) == (name in {"tanaka", "ele", "etc", "pixel"})


def test_the_adversary_of_gan_reaches_each_network_with_its_own_loss_only() -> None:
    def gradients(adversarial: float) -> tuple[dict[str, Tensor], GAN]:
        """Of the discriminator, and the generator with its own."""
        torch.manual_seed(0)
        options = GAN.Options(width=4, num_blocks=1, adversarial=adversarial, pixel=0.0, perceptual=0.0)
        generator = GAN(options)
        adversary = generator.build_auxiliary_networks(10, (16, 16))
        plain = torch.rand(2, 3, 16, 16)
        adversary(plain, generator(plain), None, torch.zeros(2, dtype=torch.int64)).backward()
        return {n: p.grad for n, p in adversary.named_parameters() if p.grad is not None}, generator

    alone, untouched = gradients(0.0)
    both, generator = gradients(0.5)
    assert alone
    for name, gradient in alone.items():
        torch.testing.assert_close(gradient, both[name])
    assert not any(p.grad is not None and p.grad.abs().sum() for p in untouched.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() for n, p in generator.named_parameters() if "weight" in n)


def with_code(**options: object) -> Learned:
    torch.manual_seed(0)
    tree = {"width": 8, "depth": 2, "skips": 0, "code": {"size": 3, "guide": 0.0, **options}}
    return Learned(Learned.Options.model_validate(tree))


ENCODERS = pytest.mark.parametrize("encoder", [None, {"width": 4}], ids=["unet", "resnet20"])


def encoding(protection: Learned) -> dict[str, nn.Parameter]:
    """Return the weights that compute a code."""
    parts = ("down", "encoder", "narrow")
    return {n: p for n, p in protection.named_parameters() if n.endswith("weight") and any(part in n for part in parts)}


@pytest.mark.slow
@ENCODERS
@pytest.mark.parametrize(("levels", "most"), [(2, 8), (3, 27)])
def test_a_code_bounds_how_many_images_there_are(levels: int, most: int, encoder: dict[str, int] | None) -> None:
    """There are at least two protected images, and at most one per code."""
    protection = with_code(levels=levels, encoder=encoder)
    images = torch.randint(0, 256, (400, 3, 18, 14), dtype=torch.uint8)
    images[:200] //= torch.arange(1, 201).view(-1, 1, 1, 1)
    with torch.no_grad():
        for _ in range(40):
            protection(images[::4].float() / 255)  # gives batch normalisation its statistics
    different = {image.numpy().tobytes() for image in protection.eval().protect(images)}
    assert 2 <= len(different) <= most


def test_only_a_code_has_a_bound_on_its_bits() -> None:
    assert Learned.bits(with_code(levels=4).options) == 6
    assert Learned.bits(with_code(guide=1.0, classes=8).options) == 6
    assert Learned.bits(with_code(guide=1.0, classes=8, size=0).options) == 3
    assert Learned.bits(Learned.Options()) is None
    assert Pixel.bits(Pixel.Options()) is None


@ENCODERS
def test_a_code_is_whole_numbers_and_passes_gradients_on(encoder: dict[str, int] | None) -> None:
    protection = with_code(levels=5, guide=1.0, encoder=encoder)
    protection(torch.rand(32, 3, 16, 16)).sum().backward()
    code = protection.unet.middle
    assert isinstance(code, Bottleneck)
    assert code.last is not None
    steps = 2 * code.last[1] + 2  # in [-1, 1], by halves
    assert torch.equal(steps, steps.round())
    assert steps.min() >= 0
    assert steps.max() <= 4
    assert len(encoding(protection)) > 10
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoding(protection).values())


@ENCODERS
def test_the_guide_of_a_code_classifies_what_enters_and_what_leaves_it(encoder: dict[str, int] | None) -> None:
    """It adds the cross-entropy of two linear classifiers, and nothing else."""
    protection = with_code(guide=0.5, encoder=encoder)
    auxiliary_networks = protection.build_auxiliary_networks(10, (16, 16))
    assert isinstance(auxiliary_networks, AdversariesAndGuides)
    plain, labels = torch.rand(16, 3, 16, 16), torch.arange(16) % 10
    protected = protection(plain)
    code = protection.unet.middle
    assert isinstance(code, Bottleneck)
    last = code.last
    assert last is not None
    loss = auxiliary_networks(plain, protected, None, labels)
    assert code.last is None
    assert auxiliary_networks.guides is not None
    expected = torch.zeros(())
    for guide, guide_input in zip(auxiliary_networks.guides, last, strict=True):
        weights = guide.state_dict()
        logits = guide_input @ weights["weight"].t() + weights["bias"]
        expected = expected - 0.5 * logits.log_softmax(1)[torch.arange(16), labels].mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert len(encoding(protection)) > 10
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoding(protection).values())
    assert not any("guide" in name for name in protection.state_dict())
    assert with_code().build_auxiliary_networks(10, (16, 16)) is None


def test_an_attacker_gets_the_whole_gradient_and_training_a_share_of_it() -> None:
    protection = with_code(guide=1.0)
    narrow = nn.Sequential()
    sizes = []
    for training in (True, False):
        protection.train(training)
        code = protection.unet.middle
        assert isinstance(code, Bottleneck)
        code.narrow = narrow  # the identity: without batch normalisation both modes compute the same
        features = torch.rand(
            8, code.options.size, 2, 2, generator=torch.Generator().manual_seed(0), requires_grad=True
        )
        code(features, (4, 4)).square().sum().backward()
        assert features.grad is not None
        sizes.append(features.grad)
    torch.testing.assert_close(sizes[0], Bottleneck.SHARE * sizes[1])


def predicted_classes(protection: Learned, images: Tensor) -> Tensor:
    """The class that a protection's encoder predicts for each image, (N,)."""
    code = protection.unet.middle
    assert isinstance(code, Bottleneck)
    assert code.classify is not None
    assert protection.unet.encoder is not None
    predictions: Tensor = code.classify(protection.unet.encoder(images).mean(dim=(2, 3))).argmax(dim=1)
    return predictions


def test_a_code_of_classes_has_an_image_for_each_class() -> None:
    protection = with_code(guide=1.0, classes=5, size=0, encoder={"width": 4}).eval()
    code = protection.unet.middle
    assert isinstance(code, Bottleneck)
    assert code.classify is not None
    images = torch.rand(300, 3, 16, 16) * torch.linspace(0, 1, 300).view(-1, 1, 1, 1)
    images = (images * 255).floor() / 255
    assert protection.unet.encoder is not None
    with torch.no_grad():  # so that classes differ and their images do after rounding, untrained
        code.widen.weight *= 1000
        code.classify.bias -= code.classify(protection.unet.encoder(images).mean(dim=(2, 3))).mean(dim=0)
    predictions = predicted_classes(protection, images)
    protected = {
        (int(predictions[i]), p.numpy().tobytes())
        for i, p in enumerate(protection.protect((images * 255).round().byte()))
    }
    assert len(predictions.unique()) >= 2
    assert len(protected) == len(predictions.unique()) == len({image for _, image in protected})


def test_a_class_is_led_by_its_guide_alone_and_numbers_lead_no_encoder() -> None:
    protection = with_code(guide=1.0, classes=10, encoder={"width": 4})
    auxiliary_networks = protection.build_auxiliary_networks(10, (16, 16))
    assert isinstance(auxiliary_networks, AdversariesAndGuides)
    plain, labels = torch.rand(16, 3, 16, 16), torch.arange(16) % 10
    protected = protection(plain)
    code = protection.unet.middle
    assert isinstance(code, Bottleneck)
    assert code.classify is not None
    assert code.last is not None
    logits = code.last[0]
    protected.sum().backward(retain_graph=True)  # as the cloud's classifier would
    assert all(p.grad is None or not p.grad.any() for n, p in encoding(protection).items() if "narrow" not in n)
    assert code.classify.weight.grad is None
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, labels), code.classify.weight, retain_graph=True)
    auxiliary_networks(plain, protected, None, labels).backward()
    assert all(p.grad is not None and p.grad.any() for p in encoding(protection).values())
    torch.testing.assert_close(code.classify.weight.grad, expected)


def test_an_attacker_gets_a_gradient_through_the_class() -> None:
    protection = with_code(guide=1.0, classes=10, size=0, encoder={"width": 4}).eval()
    images = torch.rand(4, 3, 16, 16, requires_grad=True)
    protection(images).square().sum().backward()
    assert images.grad is not None
    assert images.grad.any()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": 0}, "size is 0, allowed without classes is at least 1"),
        ({"classes": 10, "guide": 0.0}, "guide is 0, allowed with classes is more"),
    ],
)
def test_a_code_that_could_not_work_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        with_code(**options)


def test_an_adversary_with_classes_is_refused() -> None:
    options = {"width": 8, "depth": 2, "skips": 0, "adversary": {}, "code": {"classes": 10, "size": 2}}
    with pytest.raises(ValueError, match=r"code\.classes is 10, allowed with an adversary is null"):
        Learned.Options.model_validate(options)


def test_a_trunk_takes_the_place_of_the_way_down() -> None:
    plain, trunk = with_code(), with_code(encoder={"width": 4})
    assert not any("down" in name for name in trunk.state_dict())
    assert not any("encoder" in name for name in plain.state_dict())
    whole = ResNet20(ResNetOptions(width=4), num_classes=10).state_dict()
    trained = {n.removeprefix("unet.encoder."): v for n, v in trunk.state_dict().items() if "encoder" in n}
    assert {n: v.shape for n, v in trained.items()} == {n: v.shape for n, v in whole.items() if "linear" not in n}
    assert trunk(torch.rand(2, 3, 33, 18)).shape == (2, 3, 33, 18)


def test_no_skip_connection_passes_a_code_by() -> None:
    with pytest.raises(ValueError, match="skips is None, allowed with a code is 0"):
        Learned.Options.model_validate({"code": {"size": 3}})


def test_a_key_shows_itself_by_its_identifier_only() -> None:
    secret = KEY.text().strip()
    assert secret == bytes(range(32)).hex()
    assert secret not in repr(KEY)
    assert KEY.identifier in repr(KEY)
    assert KEY.identifier not in secret
    assert Key.generate().identifier != Key.generate().identifier


def test_streams_of_a_key_are_fair_and_independent() -> None:
    assert not np.array_equal(KEY.stream("a", 64), KEY.stream("b", 64))
    assert np.array_equal(KEY.stream("a", 64)[:16], KEY.stream("a", 16))
    assert abs(KEY.bits("c", 100_000).mean() - 0.5) < 0.01
    counts = np.bincount(KEY.integers("d", 60_000, 6), minlength=6)
    assert len(counts) == 6
    assert np.abs(counts - 10_000).max() < 500
    orders = KEY.permutations("e", 1000, 5)
    assert (np.sort(orders, axis=1) == np.arange(5)).all()
    assert np.abs(np.bincount(orders[:, 0], minlength=5) - 200).max() < 80


def test_a_key_file_is_for_its_owner_and_refused_when_damaged(tmp_path: Any) -> None:
    path = tmp_path / "k"
    KEY.write(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Key.read(path).text() == KEY.text()
    path.write_text(KEY.text()[:-5])
    with pytest.raises(ConfigError, match="holds no key") as caught:
        Key.read(path)
    assert KEY.text()[:-5] not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        Key.read(tmp_path / "none")
