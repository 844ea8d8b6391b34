"""Tell the versions of this package and of those a result depends on."""

import platform
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"

PACKAGES = (
    "moe2dense", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "tokenizers", "cyclopts",
)  # fmt: skip
EXPORT_PACKAGES = ("moe2dense", "torch", "transformers", "safetensors")  # what decides how an export looks


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None where it is not installed."""
    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:
        return __version__ if package == "moe2dense" else None


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Return the versions of Python and of those of `packages` that are installed."""
    return {"python": platform.python_version()} | {p: v for p in packages if (v := installed_version(p))}
