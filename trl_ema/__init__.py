"""trl_ema: fine-tune a language model on a new domain with LoRA or QLoRA, and let it drift less from what it was."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .noise import hide_lines
from .versions import check_versions


if TYPE_CHECKING:
    from .config import MeanTeacherConfig as MeanTeacherConfig
    from .losses import fused_linear_cross_entropy_kl as fused_linear_cross_entropy_kl
    from .regularizers.teacher import MeanTeacher as MeanTeacher
    from .trainer import EMARegularizedSFTTrainer as EMARegularizedSFTTrainer

try:
    __version__ = version("trl_ema")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

check_versions(__version__)

# bitsandbytes says so at its import, which is later. The kernel has no backward: nothing here multiplies 4-bit weights by it.
hide_lines("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")

# Imported when they are asked for (PEP 562): `trl-ema --help` and a report need neither torch nor TRL.
_MODULE_OF = {
    "EMARegularizedSFTTrainer": "trainer",
    "MeanTeacher": "regularizers.teacher",
    "MeanTeacherConfig": "config",
    "fused_linear_cross_entropy_kl": "losses",
}

__all__ = ["EMARegularizedSFTTrainer", "MeanTeacher", "MeanTeacherConfig", "fused_linear_cross_entropy_kl"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = found  # asked once
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
