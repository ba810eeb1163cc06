"""Attacks, which estimate plain images from protected ones with the knowledge of their threat level."""

from raypp.utils.registry import Registry

ATTACKS = Registry(
    "attack",
    {
        "protected_image": "raypp.attacks.ciphertext_only:ProtectedImage",
        "feature_reconstruction": "raypp.attacks.ciphertext_only:FeatureReconstruction",
        "minimum_difference": "raypp.attacks.ciphertext_only:MinimumDifference",
        "unpaired_gan": "raypp.attacks.unpaired_gan:UnpairedGAN",
        "inverse_own_keys": "raypp.attacks.inverse:InverseOwnKeys",
        "known_plaintext": "raypp.attacks.known_plaintext:KnownPlaintext",
        "chosen_plaintext": "raypp.attacks.chosen_plaintext:ChosenPlaintext",
        "itn": "raypp.attacks.inverse:ITN",
        "inverse": "raypp.attacks.inverse:Inverse",
        "inverse_conditional": "raypp.attacks.inverse:InverseConditional",
        "flow_matching": "raypp.attacks.flow_matching:FlowMatching",
        "white_box": "raypp.attacks.white_box:WhiteBox",
        "codebook": "raypp.attacks.codebook:Codebook",
        "attribute_inference": "raypp.attacks.attribute_inference:AttributeInference",
        "learned_matcher": "raypp.attacks.learned_matcher:LearnedMatcher",
        "known_gallery": "raypp.attacks.known_gallery:KnownGallery",
    },
)
