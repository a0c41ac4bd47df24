"""A file in the place of the weights of FID's network, which are a download."""

from pathlib import Path
from typing import Any

import pytest
import torch


def random_inception() -> Any:
    """Torch-fidelity's own network with random weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = theirs.FeatureExtractorInceptionV3("random", ["2048", "logits_unbiased"])
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):  # or the signal would fade on its way through so many layers
            torch.nn.init.kaiming_normal_(layer.weight)
    return network.half().float()


def write_inception(path: Path) -> str:
    """Write random weights, in half precision to save room, and return the hash of the file."""
    from vqf.hashing import sha256_of_file

    torch.save({key: value.half() for key, value in random_inception().state_dict().items()}, path)
    return sha256_of_file(path)
