"""The versions of other packages that this one works with, and the check of them."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet


# The same specifiers as in `pyproject.toml`. What is reached into may change with any minor version, so each range ends after
# the last minor version that the suite passed with; patch releases, and torch, are trusted. The lower ends are versions that
# earlier runs of the suite had: nothing runs them today. `tests/test_fences.py` lists what is reached into, CONTRIBUTING.md says
# how to try a new release.
TESTED = {
    "trl": ">=1.15,<1.17",
    "transformers": ">=5.19,<5.25",
    "peft": ">=0.21,<0.22",
    "accelerate": ">=1.12,<1.16",
    "bitsandbytes": ">=0.48,<0.51",
    "datasets": ">=4.7,<5.3",
    "deepspeed": ">=0.18.6,!=0.19.2,<0.20",  # 0.19.2 fails at the first step with adapters of two precisions (its issue 8072)
    "lm-eval": ">=0.4.13,<0.5",
    "torch": ">=2.8,<3",  # little is reached into, and a machine's driver decides which one it needs
}
# Those that the trainer extends or patches. The others are looked at where they are first used, torch by the installer alone.
CHECKED_AT_IMPORT = ("trl", "transformers", "peft", "accelerate")


def check_versions(ours: str, names: Sequence[str] = CHECKED_AT_IMPORT) -> None:
    """
    Look the versions up in the packages' metadata, without importing them.

    A pre-release counts as the version that it will be: 5.25.0rc1 is not below 5.25. One of a tested version is accepted.

    Args:
        ours (`str`): The version of `trl_ema`, for the message.
        names (sequence of `str`): What to look at, of [`TESTED`].

    Raises:
        ImportError: One of them is missing, or of a version outside its range.
    """
    wrong = {name: found for name in names if not is_tested(name, found := _installed(name))}
    if wrong:
        wanted = " and ".join(f"{name}{TESTED[name]}" for name in wrong)
        found = " and ".join(f"{name} {found}" if found else f"no {name}" for name, found in wrong.items())
        remedy = " ".join(f"'{name}{TESTED[name]}'" for name in wrong)
        one = "a supported one" if len(wrong) == 1 else "supported ones"
        raise ImportError(
            f"trl_ema {ours} supports {wanted}, found {found}. Install {one} with `pip install {remedy}`."
        )


def is_tested(name: str, found: str | None) -> bool:
    """Whether this version of the package lies in its range."""
    # With `prereleases`, 5.24.1.dev0 counts, as 5.24.1 does; those of the upper end PEP 440 leaves out of `<` by itself.
    return found is not None and SpecifierSet(TESTED[name]).contains(found, prereleases=True)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
