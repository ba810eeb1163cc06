"""What the client's own answer is worth where a code sends the class, beside the cloud's.

    python docs/examples/client.py runs/code

Prints accuracies on the test images, of the class that the encoder sees and of what the classifier reads from the
protected image; how often the two agree; the classifier's cross-entropy; and how many protected images there are.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from raypp.bundle.load import load_private, load_public
from raypp.config.presets import load_config
from raypp.data.splits import load_split
from raypp.protections.learned import Bottleneck, Learned

PART = 500  # images at a time

if __name__ == "__main__":
    run = sys.argv[1]
    test = load_split(load_config(f"{run}/config.yaml"), "test")
    protection, classifier = load_public(f"{run}/bundle").protection.eval(), load_private(f"{run}/bundle").classifier
    assert isinstance(protection, Learned)
    code = protection.unet.middle
    if not isinstance(code, Bottleneck) or code.classify is None or protection.unet.encoder is None:
        raise SystemExit(f"{run} has no protection.code.classes with an encoder of its own")
    images, labels = torch.as_tensor(test.images).permute(0, 3, 1, 2), torch.as_tensor(test.labels)
    clients, clouds, different = [], [], set()
    with torch.inference_mode():
        for part in images.split(PART):
            clients.append(code.classify(protection.unet.encoder(part.float() / 255).mean(dim=(2, 3))).argmax(1))
            protected = protection.protect(part)
            different |= {image.numpy().tobytes() for image in protected}
            clouds.append(classifier.eval()(protected.float() / 255))
    client, cloud = torch.cat(clients), torch.cat(clouds)
    said = cloud.argmax(1)
    shares = [f"{(a == b).float().mean():.2%}" for a, b in ((client, labels), (said, labels), (client, said))]
    print("client {}, cloud {}, they agree on {};".format(*shares))
    print(f"cross-entropy {F.cross_entropy(cloud, labels):.3f}; {len(different)} different images of {len(labels):,}")
