"""Retrieval datasets: folders and zips in BEIR's or mteb's layout."""

import hashlib
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from formats.corpus import Corpus, identifier
from support.files import InputError, JsonLines, Part, open_seekable, part_name, safe_members


@dataclass
class RetrievalDataset:
    """Queries with judgements, and a corpus that stays on disk."""

    name: str
    split: str
    path: Path
    queries: dict[str, str]  # only those with judgements
    qrels: dict[str, dict[str, int]]
    groups: dict[str, set[str]] = field(default_factory=dict)  # of queries, from their metadata
    fingerprint: str = ""  # of documents, queries and judgements
    benchmark: str = ""  # what this is a part of: cqadupstack, CUREv1
    task: str = ""  # mteb's name of it
    subset: str = "default"  # of mteb's task
    revision: str = ""  # of the copy that was read
    documents: Corpus = field(kw_only=True)

    @property
    def num_documents(self) -> int:
        return len(self.documents)

    def corpus(self, start: int = 0, end: int | None = None) -> Iterator[tuple[str, str]]:
        """(document id, text) in the file's order, streamed from disk; text as BEIR joins title and text."""
        for index in range(start, self.num_documents if end is None else end):
            doc_id, document = self.documents[index]
            yield doc_id, document.full_text


def load_dataset(
    path: str | Path, split: str = "test", subset: str = "", queries_config: str = "queries"
) -> RetrievalDataset:
    """Read a folder or zip in BEIR's or mteb's layout. Raises InputError.

    BEIR: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv. mteb: the same with qrels/SPLIT.jsonl, or parquet, or
    whatever files the card's `configs` name. split "all": all splits there are, repeated documents once.
    subset: the prefix of mteb's configs (a language). Judgements of documents that are not in the corpus are
    kept, as BEIR keeps them: such a document cannot be found.
    """
    path = Path(path)
    configs = _configs(path)
    front = f"{subset}-" if subset else ""

    def files(part: str, *names: str) -> list[Part]:
        splits = next((configs[front + name] for name in names if configs.get(front + name)), None)
        if splits is None:
            there = ", ".join(sorted(configs)) or "nothing"
            raise InputError(f"{path}: no {part}; expected BEIR's or mteb's layout, found {there}")
        if split == "all":
            splits = {split: [file for found in splits.values() for file in found]}
        if split not in splits and (part == "qrels" or len(splits) > 1):
            known = sorted(splits)
            told = f"{', '.join(known)} (train: --dev-split {known[0]}, eval.py: --split {known[0]})"
            raise InputError(f"{path}: no {part} for split {split!r}; splits there: {told}")
        found = splits.get(split) or next(iter(splits.values()))
        if not found:
            raise InputError(f"{path}: the card names files for {part} that are not there; fetch them again")
        return found

    several = split == "all"
    qrels = _read_qrels(files("qrels", "default", "qrels"))
    lines = JsonLines(*files("queries", queries_config))
    queries: dict[str, str] = {}
    groups: dict[str, set[str]] = {}
    for index in range(len(lines)):
        value = lines[index]
        query_id = identifier(lines, index, value)
        if query_id not in qrels or several and query_id in queries:
            continue
        if query_id in queries:
            raise InputError(f"{lines.where(index)}: _id {query_id!r} occurs twice")
        queries[query_id] = lines.text(index, value, "text", strip=False)
        metadata = value.get("metadata")
        if isinstance(metadata, dict) and isinstance(metadata.get("entity"), str):
            groups.setdefault(metadata["entity"], set()).add(query_id)
    missing = next((query_id for query_id in qrels if query_id not in queries), None)
    if missing is not None:
        raise InputError(f"{lines.name}: query {missing!r} has judgements in {split} but no text here")
    corpus = Corpus(*files("corpus", "corpus"), repeats=several)
    judged = [[query_id, queries[query_id], sorted(qrels[query_id].items())] for query_id in sorted(qrels)]
    fingerprint = hashlib.blake2b(
        (corpus.fingerprint + json.dumps(judged)).encode(), digest_size=16
    ).hexdigest()
    name = path.resolve().name.removesuffix(".zip")
    return RetrievalDataset(
        name, split, path, queries, qrels, groups, fingerprint, task=name, documents=corpus
    )


def _configs(path: Path) -> dict[str, dict[str, list[Part]]]:
    """The tables of a dataset, {config: {split: files}}, by its card, else by the names of its files."""
    if path.is_dir():
        if card := card_configs(path):
            try:
                return {
                    config: {
                        split: [(file, None) for pattern in patterns for file in sorted(path.glob(pattern))]
                        for split, patterns in splits.items()
                    }
                    for config, splits in card.items()
                }
            except (OSError, ValueError, LookupError, NotImplementedError) as error:
                raise InputError(
                    f"{path / 'README.md'}: data_files cannot be looked for ({error})"
                ) from error
        files = [*sorted(path.glob("*")), *sorted(path.glob("*/*"))]
        names: dict[str, Part] = {str(file.relative_to(path)): (file, None) for file in files}
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = [member.filename for member in safe_members(path, archive)]
        top = {name.partition("/")[0] for name in members}
        front = f"{top.pop()}/" if len(top) == 1 and all("/" in name for name in members) else ""
        names = {name.removeprefix(front): (path, name) for name in sorted(members)}
    else:
        raise InputError(f"{path}: neither a folder nor a zip; give a dataset in BEIR's or mteb's layout")
    configs: dict[str, dict[str, list[Part]]] = {}
    for name, part in names.items():
        match = TABLE_FILE.fullmatch(name)
        if match and not (match["kind"].startswith("jsonl") and re.sub(r"\.jsonl.*", ".tsv", name) in names):
            config, split = match["config"], match["split"] or match["config"]
            configs.setdefault(config, {}).setdefault(split, []).append(part)
    return configs


# corpus.jsonl, qrels/test.tsv, corpus/test-00000-of-00002.parquet
TABLE_FILE = re.compile(
    r"(?P<config>[\w-]+?)(/(?P<split>[\w-]+?)(-\d+-of-\d+)?)?\.(?P<kind>jsonl(\.gz|\.xz)?|tsv|parquet)"
)


def card_configs(folder: Path) -> dict[str, dict[str, list[str]]]:
    """What a dataset's card (README.md) says of its files: {config: {split: patterns}}; {} without one."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return {}
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    import yaml  # huggingface_hub brings it

    try:
        header = yaml.safe_load(text[4:].split("\n---")[0])
        configs: dict[str, dict[str, list[str]]] = {}
        for entry in (header or {}).get("configs") or []:
            files = entry["data_files"]
            files = [{"split": "train", "path": files}] if isinstance(files, str) else files
            for file in files:
                paths = [file["path"]] if isinstance(file["path"], str) else file["path"]
                if any(path.startswith("/") or ".." in path.split("/") for path in paths):
                    raise InputError(f"{folder / 'README.md'}: refused, data_files outside of the folder")
                configs.setdefault(str(entry["config_name"]), {})[str(file["split"])] = paths
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, yaml.YAMLError) and (folder / "corpus.jsonl").exists():  # no card is needed
            return {}
        raise InputError(
            f"{folder / 'README.md'}: its header's configs cannot be read ({error!r})"
        ) from error
    return configs


def _read_qrels(parts: list[Part]) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for part in parts:
        judgements = _tsv_judgements if part_name(part).endswith(".tsv") else _json_judgements
        for query_id, doc_id, grade in judgements(part):
            qrels.setdefault(query_id, {})[doc_id] = grade
    if not qrels:
        raise InputError(f"{', '.join(map(part_name, parts))}: no judgements")
    return qrels


def _json_judgements(part: Part) -> Iterator[tuple[str, str, int]]:
    lines = JsonLines(part)
    for index in range(len(lines)):
        value = lines[index]
        score = value.get("score")
        if (
            isinstance(score, bool)
            or not isinstance(score, int | float)
            or not -1e9 < score < 1e9
            or score % 1
        ):
            raise InputError(f"{lines.where(index)}: 'score' is {score!r}, expected a whole number")
        query_id = identifier(lines, index, value, "query-id")
        yield query_id, identifier(lines, index, value, "corpus-id"), int(score)


def _tsv_judgements(part: Part) -> Iterator[tuple[str, str, int]]:
    name = part_name(part)
    with open_seekable(*part) as file:
        for number, line in enumerate(file, 1):
            try:
                fields = line.decode("utf-8-sig").rstrip("\r\n").split("\t")
            except UnicodeDecodeError as error:
                raise InputError(f"{name}, line {number}: not UTF-8") from error
            if fields == [""]:
                continue
            try:
                query_id, doc_id, score = fields
                if not -(10**9) < (grade := int(score)) < 10**9:
                    raise ValueError(score)
                yield query_id, doc_id, grade
            except ValueError as error:
                if number == 1 and not any(map(str.isdigit, fields[-1])):
                    continue  # the header
                raise InputError(
                    f"{name}, line {number}: expected query-id, corpus-id and a whole score with tabs between"
                ) from error
