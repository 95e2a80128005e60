"""Names to folders: a checkpoint's folder, or a repository of the Hugging Face hub."""

import difflib
import re
from pathlib import Path

from support.files import InputError

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # owner/name, owner/name@revision


def fetch_repository(name: str, patterns: list[str], kind: str = "model") -> Path:
    """The local copy of a Hugging Face repository, `owner/name` or `owner/name@revision`.

    Fetches the files that match `patterns` and are not there yet, with progress, into the hub's own cache:
    HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE count. kind: model, dataset. The folder's name is the
    commit. Raises InputError.
    """
    # Here, so that only who names a repository waits for it.
    from huggingface_hub import constants, errors, snapshot_download

    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(
            repository, repo_type=kind, revision=revision or None, allow_patterns=patterns
        )
        return Path(folder)
    except errors.GatedRepoError:
        reason = "is gated: accept its terms on its page, then set HF_TOKEN or run `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "is not there, or private: check the name, or set HF_TOKEN"
    except errors.RevisionNotFoundError:
        reason = f"has no revision {revision!r}"
    except errors.LocalEntryNotFoundError:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no connection"
        reason = f"is not, or not wholly, in {constants.HF_HUB_CACHE} ({offline}); fetch it once while online"
    except Exception as error:  # the network library's own; what is fetched so far is kept
        reason = f"could not be fetched ({' '.join(str(error).split())[:200]}); run again"
    where = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repository}"
    raise InputError(f"{name}: no such folder here, and {where} {reason}")


DESCRIPTION_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "adapter_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "[0-9]_*/config.json",
    "[0-9]_*/sentence_bert_config.json",
)


WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "adapter_model.safetensors",
)


def find_folder(name: str | Path, weights: bool = True) -> Path:
    """The folder of a checkpoint, fetched first if `name` is that of a hub repository. Raises InputError.

    weights: False fetches only what describes the checkpoint, and its tokenizer.
    """
    if Path(name).is_dir():
        return Path(name)
    beside = Path(name).parent
    known = [folder.name for folder in beside.iterdir() if folder.is_dir()] if beside.is_dir() else []
    close = difflib.get_close_matches(Path(name).name, known, 1)
    hint = f"; did you mean the folder {beside / close[0]}?" if close else ""
    if not HUB_NAME.fullmatch(str(name)) or Path(name).parts[0] == "runs":  # where our runs lie
        raise InputError(
            f"{name}: no such folder; give the folder of a checkpoint (config.json, *.safetensors), or a "
            f"Hugging Face name, owner/name or owner/name@revision{hint}"
        )
    try:
        folder = fetch_repository(str(name), [*DESCRIPTION_FILES, *(WEIGHT_FILES if weights else ())])
    except InputError as error:
        raise InputError(f"{error}{hint}") from error
    if weights and not any((folder / file).exists() for file in WEIGHT_FILES):
        raise InputError(
            f"{name}: no safetensors in {folder}: either the repository has none (pickled weights are "
            "not read), or it was not fetched whole; run again while online"
        )
    return folder
