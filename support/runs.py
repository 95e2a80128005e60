"""The folder of a training run."""

from pathlib import Path

from support.files import InputError, inside, read_json


def resolve_run(folder: str | Path) -> Path:
    """A run's folder stands for its best checkpoint, other folders for themselves."""
    folder = Path(folder)
    listing = folder / "checkpoints.json"
    if listing.exists():
        names = read_json(listing)
        return inside(folder, names.get("best") or names.get("last"), listing)
    if (folder / "settings.json").exists() and not (folder / "config.json").exists():
        raise InputError(f"{folder}: this run has no checkpoint yet")
    return folder
