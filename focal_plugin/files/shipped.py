"""The configs that come with the package: inside it where it is installed, beside it in a checkout."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
CONFIGS = next(filter(Path.is_dir, (_PACKAGE / "configs", _PACKAGE.parent / "configs")), _PACKAGE / "configs")


def shipped(name: str) -> Path:
    """Return where the shipped config or folder ``name`` is: ``paper/table1b_gamma_2.yaml`` or ``configs/paper/...``.

    The path need not exist. A name that leads out of the shipped configs is returned as it is.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        return path
    return CONFIGS / (path.relative_to("configs") if path.is_relative_to("configs") else path)
