"""Networks. Each takes float images N x C x H x W in [0, 1] and normalizes them itself."""

from raypp.utils.registry import Registry

CLASSIFIERS = Registry(
    "classifier",
    {
        "resnet20": "raypp.models.resnet:ResNet20",
        "vgg16_bn": "raypp.models.vgg:VGG16BN",
        "convnet": "raypp.models.convnet:ConvNet",
    },
)

FEATURES = Registry(
    "feature network",
    {
        "vgg16": "raypp.models.perceptual:VGG16Features",
        "plain_classifier": "raypp.models.perceptual:PlainClassifierFeatures",
    },
)

ADAPTATIONS = Registry(
    "adaptation network",
    {
        "block": "raypp.models.adaptation:BlockAdaptation",
        "shuffled_block": "raypp.models.adaptation:ShuffledBlockAdaptation",
        "pixel": "raypp.models.adaptation:PixelAdaptation",
    },
)

BLOCK = 4
"""Side in pixels of the blocks that adaptation networks of block-wise schemes read."""
