"""trl_ema: fine-tune a language model on a new domain with LoRA or QLoRA, and keep what it already knew."""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version


try:
    __version__ = version("trl_ema")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

# The trainer reaches into TRL's `compute_loss` and fused head: these are the minor versions the suite was run against.
TRL_RANGE = ("1.15", "1.17")
if not Version(TRL_RANGE[0]) <= Version(version("trl")) < Version(TRL_RANGE[1]):
    raise ImportError(
        f"trl_ema {__version__} supports trl>={TRL_RANGE[0]},<{TRL_RANGE[1]}, found trl {version('trl')}. Install a "
        f"supported one with `pip install 'trl>={TRL_RANGE[0]},<{TRL_RANGE[1]}'`."
    )

from .noise import hide_lines  # noqa: E402


# bitsandbytes says so at its import. The kernel has no backward: nothing here multiplies 4-bit weights by it.
hide_lines("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")

from .config import MeanTeacherConfig  # noqa: E402
from .losses import fused_linear_cross_entropy_kl  # noqa: E402
from .regularizers.teacher import MeanTeacher  # noqa: E402
from .trainer import EMARegularizedSFTTrainer  # noqa: E402


__all__ = ["EMARegularizedSFTTrainer", "MeanTeacher", "MeanTeacherConfig", "fused_linear_cross_entropy_kl"]
