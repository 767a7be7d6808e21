"""Optional packages, named with the extra that brings them where they are missing."""

from importlib import import_module


def require(extra: str, *modules: str) -> None:
    """Raises `ImportError`, naming the extra to install, unless every one of `modules` can be imported."""
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise ImportError(f"This needs `{module}`. Install it with `pip install 'trl_ema[{extra}]'`.") from error
