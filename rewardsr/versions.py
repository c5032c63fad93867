"""Versions of what is installed."""

import platform
from importlib.metadata import PackageNotFoundError, version

from rewardsr import __version__

PACKAGES = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "kornia",
)


def version_of(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def installed() -> dict[str, str]:
    """Versions that a result may depend on, by name: those of the package, Python and what it stands on."""
    found = {name: version_of(name) for name in (*PACKAGES, "pyiqa")}
    machine = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    return {"rewardsr": __version__, "Python": machine} | {name: text for name, text in found.items() if text}
