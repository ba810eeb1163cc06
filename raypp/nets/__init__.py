"""Networks. Each takes float images N x C x H x W in [0, 1]; a normalisation it needs lives inside it."""

from raypp.registry import Registry

CLASSIFIERS = Registry(
    "classifier",
    {
        "resnet20": "raypp.nets.resnet:ResNet20",
        "vgg16_bn": "raypp.nets.vgg:VGG16BN",
    },
)

FEATURES = Registry(
    "feature network",
    {
        "vgg16": "raypp.nets.features:VGG16Features",
        "plain_classifier": "raypp.nets.features:PlainClassifierFeatures",
    },
)

ADAPTATIONS = Registry(
    "adaptation network",
    {
        "block": "raypp.nets.adaptation:BlockAdaptation",
        "shuffled_block": "raypp.nets.adaptation:ShuffledBlockAdaptation",
        "pixel": "raypp.nets.adaptation:PixelAdaptation",
    },
)
BLOCK = 4
"""Side in pixels of the blocks that adaptation networks of block-wise schemes read."""
