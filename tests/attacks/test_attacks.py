"""Attacks without training: exact where their sources say so, and defeated by keyed hashes."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, few_examples
from hypothesis import given
from hypothesis import strategies as st
from methods import build, victim
from torch import Tensor

from raypp.attacks import ATTACKS
from raypp.attacks.array_target import ArrayTarget, load_array_target
from raypp.attacks.base import AttackerKnowledge, AttackError, ImageMap, Threat
from raypp.attacks.gallery_noise import Candidates, LikelihoodScores, _unclipped
from raypp.attacks.statements import logits_of, stated_noise_std
from raypp.attacks.user_function import user_function
from raypp.metrics.image import psnr, ssim
from raypp.metrics.retrieval import reidentify
from raypp.utils.errors import ConfigError, DataError
from raypp.utils.images import decode
from raypp.utils.keys import Key

SHARED = ROOT.parent / "shared" / "data" / "cifar10" / "test-00000-of-00001.parquet"
CIPHERS: list[tuple[str, dict[str, Any]]] = [
    ("pixel", {}),
    ("pixel", {"shuffle_color_channels": True}),
    ("tanaka", {}),
    ("ele", {}),
    ("etc", {}),
]


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """A thousand of CIFAR-10's test images, or smooth random pictures if they are not available."""
    if SHARED.exists():
        cells = pq.read_table(SHARED, columns=["img"])["img"].slice(0, 1000).to_pylist()
        images = np.stack([decode(cell["bytes"], name="photo") for cell in cells])
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    torch.manual_seed(0)
    coarse = torch.rand(1000, 3, 8, 8)
    smooth = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    return (smooth * 255).round().to(torch.uint8)


def hashed(images: Tensor) -> Tensor:
    """Noise that only the image determines: nothing can be learned from it."""
    rows = [
        np.frombuffer(hashlib.shake_256(image.numpy().tobytes()).digest(image.numel()), dtype=np.uint8)
        for image in images
    ]
    return torch.from_numpy(np.stack(rows)).view(images.shape)


def reidentification_rate(estimates: Tensor, photos: Tensor) -> float:
    num = len(estimates)
    ranks = reidentify(
        estimates.float() / 255, photos.float() / 255, torch.arange(num), torch.zeros(len(photos), dtype=torch.int64)
    )
    return float(ranks.top(1).mean())


def test_every_attack_states_its_threat_level() -> None:
    for name in ATTACKS:
        kind = ATTACKS.get(name)
        assert isinstance(kind.threat, Threat)
        assert kind.threat.meaning
        assert ATTACKS.options(name)(name=name).name == name


def test_an_attack_says_what_it_lacks() -> None:
    for name in ("known_plaintext", "chosen_plaintext", "known_gallery"):
        with pytest.raises(AttackError, match=f"attack {name} needs .*, which this target does not provide"):
            build(name, AttackerKnowledge((3, 32, 32)))


# Chosen plaintext


@pytest.mark.parametrize(("name", "options"), CIPHERS)
def test_chosen_plaintexts_decrypt_every_image_exactly(name: str, options: dict[str, Any], photos: Tensor) -> None:
    protection = victim(name, **options)
    batch_sizes: list[int] = []

    def oracle(images: Tensor) -> Tensor:
        batch_sizes.append(len(images))
        return protection.protect(images)

    attack = build("chosen_plaintext", AttackerKnowledge((3, 32, 32), protect=oracle))
    attack.prepare()
    assert torch.equal(attack.reconstruct(protection.protect(photos)), photos)
    expected = {"pixel": (1, "pixel"), "tanaka": (1, "tanaka"), "ele": (5, "any"), "etc": (5, "any")}[name]
    assert attack.note == f"key recovered from {expected[0]} chosen image{'s' * (expected[0] > 1)} ({expected[1]})"
    assert batch_sizes[-2] == expected[0]  # then the probe that the solution was checked on
    assert batch_sizes[-1] == 4


@given(
    case=st.sampled_from(CIPHERS),
    height=st.integers(8, 24),
    width=st.integers(8, 24),
    secret=st.binary(min_size=32, max_size=32),
)
@few_examples
def test_chosen_plaintexts_of_other_sizes(
    case: tuple[str, dict[str, Any]], height: int, width: int, secret: bytes
) -> None:
    name, options = case
    if name in {"ele", "etc"}:  # the attacker cannot choose the padding
        height, width = height // 4 * 4, width // 4 * 4
    protection = victim(name, Key(secret), **options)
    attack = build("chosen_plaintext", AttackerKnowledge((3, height, width), protect=protection.protect))
    attack.prepare()
    images = torch.randint(0, 256, (5, 3, height, width), dtype=torch.uint8)
    assert torch.equal(attack.reconstruct(protection.protect(images)), images)


@pytest.mark.parametrize("scheme", ["auto", "pixel", "tanaka", "any"])
@pytest.mark.parametrize("oracle", [hashed, victim("pixel", keys="per_image").protect], ids=["hash", "key per image"])
def test_chosen_plaintexts_do_not_explain_what_is_no_cipher(oracle: ImageMap, scheme: str) -> None:
    with pytest.raises(AttackError, match="no permutation with inversions"):
        build("chosen_plaintext", AttackerKnowledge((3, 32, 32), protect=oracle), scheme=scheme).prepare()


# Known plaintext


def test_one_photograph_gives_away_tanakas_key(photos: Tensor) -> None:
    shares, exact = [], []
    for i in range(20):
        protection = victim("tanaka", Key(bytes([i] * 32)))
        pairs = photos[i : i + 1], protection.protect(photos[i : i + 1])
        attack = build("known_plaintext", AttackerKnowledge((3, 32, 32), pairs=pairs))
        attack.prepare()
        true = torch.from_numpy(protection._order)
        shares.append(float((attack.source == true).float().mean()))  # type: ignore[attr-defined]
        others = photos[100:200]
        exact.append(float((attack.reconstruct(protection.protect(others)) == others).float().mean()))
    assert np.mean(shares) >= 0.95
    assert np.mean(exact) >= 0.95


@pytest.mark.parametrize("name", ["ele", "etc"])
def test_known_plaintexts_do_not_explain_shuffled_blocks(name: str, photos: Tensor) -> None:
    protection = victim(name)
    with pytest.raises(AttackError, match="no permutation of half bytes"):
        build(
            "known_plaintext", AttackerKnowledge((3, 32, 32), pairs=(photos[:1], protection.protect(photos[:1])))
        ).prepare()


def test_known_plaintexts_do_not_explain_a_keyed_hash(photos: Tensor) -> None:
    with pytest.raises(AttackError, match="no permutation of half bytes"):
        build("known_plaintext", AttackerKnowledge((3, 32, 32), pairs=(photos[:1], hashed(photos[:1])))).prepare()


# Ciphertext only


@pytest.mark.parametrize("keys", ["common", "per_image"])
def test_feature_reconstruction_does_not_care_for_keys(keys: str, photos: Tensor) -> None:
    attack = build("feature_reconstruction", AttackerKnowledge((3, 32, 32)))
    attack.prepare()
    protected = victim("pixel", keys=keys).protect(photos)
    assert torch.equal(attack.reconstruct(protected), attack.reconstruct(photos))


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the shared CIFAR-10 is not available")
def test_feature_reconstruction_shows_the_edges_of_pixel_based_images(photos: Tensor) -> None:
    """SSIM .31 +- .02 in the lab's form, .33 in Wang's; PSNR below that of the mean image."""
    from raypp.metrics.image import ssim_lab

    plain = photos.float() / 255
    estimate = build("feature_reconstruction", AttackerKnowledge((3, 32, 32))).reconstruct(
        victim("pixel").protect(photos)
    )
    assert float(ssim_lab(plain, estimate.float() / 255).mean()) == pytest.approx(0.314, abs=0.02)
    assert float(ssim(plain, estimate.float() / 255).mean()) == pytest.approx(0.328, abs=0.02)
    assert float(psnr(plain, estimate.float() / 255).mean()) == pytest.approx(12.0, abs=0.3)


def test_minimum_difference_restores_pictures_whose_neighbours_are_alike(photos: Tensor) -> None:
    protection = victim("pixel", shuffle_color_channels=True)
    attack = build("minimum_difference", AttackerKnowledge((3, 32, 32)))
    attack.prepare()
    ramp = torch.stack([torch.arange(32).repeat(32, 1) * s + o for s, o in ((1, 20), (1, 60), (1, 90))]).to(torch.uint8)
    estimate = attack.reconstruct(protection.protect(ramp[None]))[0].long()
    first = estimate[:, 0, 0]
    # Right up to what was done to the first pixel: its colours' order, and each colour's polarity.
    options = [ramp.long(), 255 - ramp.long()]
    for channel in range(3):
        matches = [
            torch.equal(estimate[channel], option[c])
            for option in options
            for c in range(3)
            if option[c, 0, 0] == first[channel]
        ]
        assert any(matches)


def brute_force(protected: np.ndarray) -> np.ndarray:
    """The attack written out, pixel by pixel, for one image (H, W, 3)."""
    from itertools import permutations, product

    decoded = protected.astype(int).copy()
    for y in range(decoded.shape[0]):
        for x in range(decoded.shape[1]):
            if y == x == 0:
                continue
            near = decoded[0, x - 1] if y == 0 else decoded[y - 1, x]
            candidates = [
                (decoded[y, x] ^ np.array(sign))[list(order)]
                for sign in product((0, 255), repeat=3)
                for order in permutations(range(3))
            ]
            decoded[y, x] = min(candidates, key=lambda c, near=near: int(np.abs(c - near).sum()))
    return decoded


def test_minimum_difference_is_its_description(photos: Tensor) -> None:
    protected = victim("pixel", shuffle_color_channels=True).protect(photos[:2, :, :10, :12])
    estimates = build("minimum_difference", AttackerKnowledge((3, 10, 12))).reconstruct(protected)
    for image, estimate in zip(protected, estimates, strict=True):
        expected = brute_force(image.permute(1, 2, 0).numpy())
        np.testing.assert_array_equal(estimate.permute(1, 2, 0).numpy(), expected)


# Known gallery


class Negative:
    """A protection with a stated noise."""

    noise_std = 5.0

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return 255 - images


@pytest.mark.parametrize("name", ["tanaka", pytest.param("learned", marks=pytest.mark.slow)])
def test_a_gallery_betrays_every_deterministic_protection(name: str, photos: Tensor) -> None:
    protection = victim(name, **({"width": 8, "depth": 2} if name == "learned" else {}))
    if name == "learned":  # a few steps away from its initial grey
        optimizer = torch.optim.Adam(protection.parameters(), lr=1e-2)
        for _ in range(15):
            optimizer.zero_grad()
            (-protection(photos[:64].float() / 255).var(0).mean()).backward()
            optimizer.step()
        protection.eval()
    access = AttackerKnowledge((3, 32, 32), protect=protection.protect, gallery=photos[:300])
    attack = build("known_gallery", access)
    attack.prepare()
    assert torch.equal(attack.reconstruct(protection.protect(photos[:100])), photos[:100])


def small(photos: Tensor, num: int) -> Tensor:
    """Images of 16 x 16."""
    return torch.nn.functional.avg_pool2d(photos[:num].float(), 2).to(torch.uint8)


def noisy(std: float, contrast: float, seed: int = 0) -> ImageMap:
    """A random protection: Gaussian noise of ``std`` gray levels on a share of the contrast."""
    generator = torch.Generator().manual_seed(seed)

    def protect(images: Tensor) -> Tensor:
        noise = std * torch.randn(images.shape, generator=generator)
        return (128 + contrast * (images.float() - 128) + noise).round().clamp(0, 255).to(torch.uint8)

    return protect


def identified(access: AttackerKnowledge, num: int = 100, **options: Any) -> tuple[float, str]:
    """Share of the gallery's first images that a known gallery identifies, and the attack's note."""
    assert access.gallery is not None
    assert access.protect is not None
    attack = build("known_gallery", access, **options)
    attack.prepare()
    originals = access.gallery[:num]
    same = attack.reconstruct(access.protect(originals)) == originals
    return float(same.flatten(1).all(1).float().mean()), attack.note


def test_a_gallery_averages_the_noise_of_a_random_protection(photos: Tensor) -> None:
    access = AttackerKnowledge((3, 16, 16), protect=noisy(60, 0.25), gallery=small(photos, 300))
    share, note = identified(access)
    assert note == "300 candidates protected 16 times"
    assert share > 0.4
    assert identified(access, num_draws=1)[0] < 0.15


@pytest.mark.parametrize("shuffle", [False, True])
def test_folded_values_remove_a_key_per_image(shuffle: bool, photos: Tensor) -> None:
    protection = victim("pixel", keys="per_image", shuffle_color_channels=shuffle)
    access = AttackerKnowledge((3, 32, 32), protect=protection.protect, gallery=photos[:200])
    comparison = "folded values with sorted colors" if shuffle else "folded values"
    assert identified(access) == (1.0, f"200 candidates protected, compared by {comparison}")


def test_folded_values_are_chosen_for_a_noisy_key_per_image(photos: Tensor) -> None:
    protection, noise = victim("pixel", keys="per_image"), noisy(8, 1.0)
    access = AttackerKnowledge(
        (3, 16, 16), protect=lambda images: noise(protection.protect(images)), gallery=small(photos, 200)
    )
    share, note = identified(access)
    assert note == "200 candidates protected 16 times, compared by folded values"
    assert share > 0.9


def seeded(images: Tensor) -> Tensor:
    """Random noise that is the same in each call."""
    return noisy(60, 0.25)(images)


def test_random_numbers_that_repeat_in_each_call_are_random(photos: Tensor) -> None:
    """Images that were protected twice at one position were equal, so nothing was averaged, and nothing identified."""
    gallery = small(photos, 300)
    attack = build("known_gallery", AttackerKnowledge((3, 16, 16), protect=seeded, gallery=gallery))
    attack.prepare()
    originals = gallery[200:300]
    same = attack.reconstruct(seeded(originals)) == originals
    assert attack.note == "300 candidates protected 16 times"
    assert same.flatten(1).all(1).float().mean() > 0.3


def test_a_key_per_position_is_removed_by_folding(photos: Tensor) -> None:
    def key_per_position(images: Tensor) -> Tensor:
        masks = torch.randint(0, 2, images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)) * 255
        return images ^ masks

    gallery = photos[:200]
    attack = build("known_gallery", AttackerKnowledge((3, 32, 32), protect=key_per_position, gallery=gallery))
    attack.prepare()
    assert torch.equal(attack.reconstruct(key_per_position(gallery[100:150])), gallery[100:150])
    assert attack.note == "200 candidates protected, compared by folded values"


@pytest.mark.parametrize("gallery", [torch.zeros(1, 3, 12, 12), torch.zeros(20, 3, 12, 12)], ids=["one", "equal"])
def test_a_gallery_of_one_image_is_attacked(gallery: Tensor) -> None:
    images = gallery.to(torch.uint8)
    attack = build("known_gallery", AttackerKnowledge((3, 12, 12), protect=lambda x: x, gallery=images))
    attack.prepare()
    assert torch.equal(attack.reconstruct(images), images)


def test_random_masks_of_zero_and_255_are_not_folded_to_nothing(photos: Tensor) -> None:
    random = torch.Generator().manual_seed(0)

    def dither(images: Tensor) -> Tensor:
        return ((images > 255 * torch.rand(images.shape, generator=random)) * 255).to(torch.uint8)

    share, note = identified(AttackerKnowledge((3, 16, 16), protect=dither, gallery=small(photos, 100)))
    assert note == "100 candidates protected 16 times"
    assert share > 0.9


def test_a_rounding_difference_between_batch_sizes_is_not_random(photos: Tensor) -> None:
    def protect(images: Tensor) -> Tensor:
        protected = 255 - images
        protected[:, 0, 0, 0] = len(images) % 2
        return protected

    share, note = identified(AttackerKnowledge((3, 32, 32), protect=protect, gallery=photos[:100]))
    assert (share, note) == (1.0, "100 candidates protected")


@pytest.mark.parametrize("side", [48, 64])
def test_a_burst_is_told_apart_by_a_deterministic_protection(side: int) -> None:
    """50 images that differ by one gray level. Finalists by float32 distances did not contain the original."""
    random = torch.Generator().manual_seed(0)
    burst = torch.randint(255, (1, 3, side, side), dtype=torch.uint8, generator=random).repeat(50, 1, 1, 1)
    for i in range(50):
        burst[i].view(-1)[i] += 1
    others = torch.randint(256, (50, 3, side, side), dtype=torch.uint8, generator=random)
    attack = build(
        "known_gallery", AttackerKnowledge((3, side, side), protect=lambda x: x, gallery=torch.cat((burst, others)))
    )
    attack.prepare()
    assert torch.equal(attack.reconstruct(burst), burst)


def test_stated_noise_gives_a_likelihood(photos: Tensor) -> None:
    """Dark images, half of whose noisy values are clipped to 0: the likelihood identifies more than the distance."""
    noise = noisy(60, 1.0)
    access = AttackerKnowledge(
        (3, 16, 16), protect=lambda images: noise((0.3 * images).to(torch.uint8)), gallery=small(photos, 300)
    )
    by_distance, _ = identified(access, num=300)
    by_likelihood, note = identified(dataclasses.replace(access, noise_std=60.0), num=300)
    assert note == "300 candidates protected 16 times, compared by likelihood"
    assert by_likelihood > max(by_distance, 0.7)


def test_the_likelihood_is_that_of_clipped_and_rounded_noise() -> None:
    """Differences between candidates are those of the exact probabilities of each byte."""
    means = torch.tensor([[5.0, 120.0, 250.0], [30.0, 128.0, 200.0], [0.0, 60.0, 255.0]])
    std, draws = 40.0, torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0))
    clipped = torch.stack([(mean + 40 * draws).round().clamp(0, 255).mean(0) for mean in means])
    assert (_unclipped(clipped, std) - means).abs().max() < 0.5
    protected = torch.tensor([[0, 100, 255], [12, 255, 0]], dtype=torch.uint8)
    scores = LikelihoodScores(Candidates(clipped, torch.full((3,), std), 10**6), std).rank(protected)
    values = protected[:, None].double()
    high = torch.where(values == 255, 1.0, torch.special.ndtr((values + 0.5 - means) / std))
    low = torch.where(values == 0, 0.0, torch.special.ndtr((values - 0.5 - means) / std))
    exact = (high - low).log().sum(2)
    assert torch.allclose(scores - scores[:, :1], exact - exact[:, :1], atol=0.05)


class Constant(torch.nn.Module):
    """A protection whose output is another one than images in [0, 1]."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: Tensor) -> Any:
        return self.output(images)


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        (lambda x: x * float("nan"), "gave values that are not finite"),
        (lambda x: x * 255, "gave values from 0 to 255"),
        (lambda x: -x, "gave values from -1 to "),
        (lambda x: x[1:], r"gave \(7, 3, 16, 16\) for 8 images"),
        (lambda x: torch.cat([x, x], 1), r"gave \(8, 6, 16, 16\) for 8 images"),
        (lambda x: x.to(torch.uint8), r"gave Tensor \(8, 3, 16, 16\)"),
        (lambda x: None, "gave NoneType"),
        (lambda x: x.no_such_method(), "failed: AttributeError: 'Tensor' object has no attribute 'no_such_method'"),
    ],
)
def test_a_module_that_does_not_protect_images_is_refused(output: Any, problem: str) -> None:
    images = np.full((40, 16, 16, 3), 255, np.uint8)
    images[::2, 0] = 0
    with pytest.raises(ConfigError, match=f"module Constant {problem}"):
        load_array_target(ArrayTarget(Constant(output), images=images), num_queries=10, num_images=None, seed=0)


def test_a_module_may_leave_the_range_by_rounding() -> None:
    arrays = ArrayTarget(Constant(lambda x: x * 1.0005), images=np.full((40, 16, 16, 3), 255, np.uint8))
    assert load_array_target(arrays, num_queries=10, num_images=None, seed=0).protected.min() == 255


def test_fewer_images_of_the_attacker_are_a_random_choice() -> None:
    images = np.arange(200, dtype=np.uint8)[:, None, None, None].repeat(16, 1).repeat(16, 2).repeat(3, 3)
    arrays = ArrayTarget(Negative(), images=images, attacker_images=images)
    own = load_array_target(arrays, num_queries=10, num_images=40, seed=0).access.images
    assert own is not None
    assert len(own) == 40
    assert own.max() >= 150


def test_a_label_that_is_not_a_number_is_refused() -> None:
    labels = np.append(np.zeros(39), np.nan)
    arrays = ArrayTarget(Negative(), images=np.zeros((40, 16, 16, 3), np.uint8), labels=labels)
    with pytest.raises(DataError, match="labels has a value that is not a number; allowed is a class for each image"):
        load_array_target(arrays, num_queries=10, num_images=None, seed=0)


def test_the_protected_image_is_an_estimate_itself(photos: Tensor) -> None:
    attack = build("protected_image", AttackerKnowledge((3, 30, 30)))
    attack.prepare()
    assert attack.matcher == "edges"
    assert torch.equal(attack.reconstruct(255 - photos[:5]), 255 - photos[:5, :, :30, :30])
    gray = photos[:5, :1]
    assert torch.equal(
        build("protected_image", AttackerKnowledge((3, 32, 32))).reconstruct(gray), gray.repeat(1, 3, 1, 1)
    )


def test_a_function_states_its_noise(tmp_path: Path) -> None:
    file = tmp_path / "noisy_function.py"
    file.write_text("def protect(images):\n    return images\n\n\nprotect.noise_std = 60\n")
    protect = user_function(f"{file}:protect", torch.device("cpu"))
    assert stated_noise_std(protect, "protect") == 60
    assert stated_noise_std(lambda images: images, "protect") is None
    arrays = ArrayTarget(noise := Negative(), images=np.zeros((40, 16, 16, 3), np.uint8))
    assert load_array_target(arrays, num_queries=10, num_images=None, seed=0).access.noise_std == 5.0
    noise.noise_std = -1.0
    with pytest.raises(ConfigError, match=r"Negative\.noise_std is -1\.0; allowed is a positive number of gray levels"):
        load_array_target(arrays, num_queries=10, num_images=None, seed=0)


@pytest.mark.slow
def test_a_gallery_does_not_betray_what_is_random_per_image(photos: Tensor) -> None:
    """Noise that has nothing to do with the image is confirmed by chance only."""
    generator = torch.Generator().manual_seed(1)

    def noise(images: Tensor) -> Tensor:
        return torch.randint(0, 256, images.shape, dtype=torch.uint8, generator=generator)

    attack = build("known_gallery", AttackerKnowledge((3, 32, 32), protect=noise, gallery=photos))
    attack.prepare()
    assert reidentification_rate(attack.reconstruct(noise(photos[:500])), photos) < 0.02


def brightness(images: Tensor) -> Tensor:
    """One of four greys, by the mean of the image."""
    level = (images.float().mean(dim=(1, 2, 3)) / 64).floor() * 64
    return level.to(torch.uint8).view(-1, 1, 1, 1).expand(images.shape).contiguous()


def test_a_codebook_holds_the_mean_of_those_who_share_an_image(photos: Tensor) -> None:
    attack = build(
        "codebook", AttackerKnowledge((3, 32, 32), protect=brightness, images=photos), steps=0, batch_size=300
    )
    attack.prepare()
    protected = brightness(photos)
    estimates = attack.reconstruct(protected)
    groups = protected[:, 0, 0, 0]
    tabulated = attack.validation_images()[0][100:]  # type: ignore[index]
    assert 2 <= len(groups.unique()) <= 4
    for level in groups.unique():
        mean = (tabulated[brightness(tabulated)[:, 0, 0, 0] == level].double().mean(0)).round()
        assert (estimates[groups == level].double() - mean).abs().max() <= 1  # summed in float32
    assert f"{len(groups.unique())} different protected images of 900" in attack.note
    near = protected[:5].clone()
    near[:, :, 0, 0] += 1  # an image that is not in the table is the nearest one's
    assert torch.equal(attack.reconstruct(near), estimates[:5])


@pytest.mark.slow
def test_a_codebook_draws_what_ssim_likes_better_than_the_mean(photos: Tensor) -> None:
    """On the images that it is fitted to; other images need thousands of them per protected image."""
    similar = []
    for steps in (0, 50):
        attack = build(
            "codebook", AttackerKnowledge((3, 32, 32), protect=brightness, images=photos), steps=steps, batch_size=200
        )
        attack.prepare()
        estimates = attack.reconstruct(brightness(photos))
        similar.append(float(ssim(estimates.float() / 255, photos.float() / 255).mean()))
    assert similar[1] > similar[0] + 0.002


def test_an_oracle_selects_the_matcher(photos: Tensor) -> None:
    access = AttackerKnowledge(
        (3, 32, 32), protect=lambda x: 255 - x, images=photos, pairs=(photos, 255 - photos),
        ciphertexts=lambda: (photos, torch.zeros(1000), photos, torch.zeros(1000)),
    )  # fmt: skip
    for name in ("codebook", "chosen_plaintext"):
        attack = build(name, access)
        validation = attack.validation_images()
        assert validation is not None, name
        gallery, protected = validation
        assert len(gallery) == 1000
        assert torch.equal(protected, 255 - gallery[:100])
    for name in ("known_plaintext", "unpaired_gan"):  # their attacker cannot protect images under the target's key
        assert build(name, access).validation_images() is None


def test_a_codebook_is_for_few_images(photos: Tensor) -> None:
    attack = build("codebook", AttackerKnowledge((3, 32, 32), protect=hashed, images=photos), most=400, batch_size=100)
    with pytest.raises(AttackError, match=r"this one gave 500 of 500, more than most = 400$"):
        attack.prepare()


# Controls


def test_identity_is_broken_and_a_keyed_hash_is_not(photos: Tensor) -> None:
    """The positive and the negative control; those of pixel-based encryption alone have their own above."""
    gallery = photos[:500]
    for name in ("chosen_plaintext", "known_gallery"):
        attack = build(name, AttackerKnowledge((3, 32, 32), protect=lambda x: x, gallery=gallery))
        attack.prepare()
        assert reidentification_rate(attack.reconstruct(gallery[:200]), gallery) > 0.95, name
    for name in ("feature_reconstruction", "minimum_difference"):
        attack = build(name, AttackerKnowledge((3, 32, 32)))
        assert reidentification_rate(attack.reconstruct(hashed(gallery[:200])), gallery) < 0.02, name


@pytest.mark.parametrize(("name", "options"), [("learned", {"width": 2, "depth": 1}), ("gan", {"width": 2})])
def test_the_sigmoid_of_the_logits_is_the_protected_image(name: str, options: dict[str, Any]) -> None:
    protection, images = victim(name, **options).eval(), torch.rand(2, 3, 16, 16)
    logits = logits_of(protection)
    assert logits is not None
    with torch.no_grad():
        assert torch.allclose(torch.sigmoid(logits(images)), protection(images), atol=1e-6)
    assert logits_of(victim("plain")) is None
