"""Public datasets by their names: BEIR, RTEB, and their groups."""

import difflib
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from formats.datasets import RetrievalDataset, card_configs, load_dataset
from formats.fetch import fetch_zip, remote_size
from support.files import InputError, cache_folder
from support.hub import fetch_repository

# What is public under a name. BEIR: the task's name in mteb, and the md5 that its authors list for the zip.
BEIR_URL = "https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets"

BEIR = {
    "msmarco": ("MSMARCO", "444067daf65d982533ea17ebd59501e4"),
    "trec-covid": ("TRECCOVID", "ce62140cb23feb9becf6270d0d1fe6d1"),
    "nfcorpus": ("NFCorpus", "a89dba18a62ef92f7d323ec890a0d38d"),
    "nq": ("NQ", "d4d3d2e48787a744b6f6e691ff534307"),
    "hotpotqa": ("HotpotQA", "f412724f78b0d91183a0e86805e16114"),
    "fiqa": ("FiQA2018", "17918ed23cd04fb15047f73e6c3bd9d9"),
    "arguana": ("ArguAna", "8ad3e3c2a5867cdced806d6503f29b99"),
    "webis-touche2020": ("Touche2020", "46f650ba5a527fc69e0a6521c5a23563"),
    "cqadupstack": ("CQADupstack", "4e41456d7df8ee7760a7f866133bda78"),
    "quora": ("QuoraRetrieval", "18fb154900ba42a600f84b839c173167"),
    "dbpedia-entity": ("DBPedia", "c2a39eb420a3164af735795df012ac2c"),
    "scidocs": ("SCIDOCS", "38121350fc3a4d2f48850f6aff52e4a9"),
    "fever": ("FEVER", "5a818580227bfb4b35bb6fa46d9b6c03"),
    "climate-fever": ("ClimateFEVER", "8b66f0a9126c521bae2bde127b4dc99d"),
    "scifact": ("SciFact", "5f7d1de60b170fc8027bb7898e2efca1"),
}

# RTEB's open tasks by mteb's names: repository and the revision that mteb pins.
RTEB = {
    "AILACasedocs": ("mteb/AILA_casedocs", "4106e6bcc72e0698d714ea8b101355e3e238431a"),
    "AILAStatutes": ("mteb/AILA_statutes", "ebfcd844eadd3d667efa3c57fc5c8c87f5c2867e"),
    "LegalSummarization": ("mteb/legal_summarization", "3bb1a05c66872889662af04c5691c14489cebd72"),
    "FinanceBenchRetrieval": ("mteb/FinanceBenchRetrieval", "c5215673492044833ff5e0dfd9b5fa848d5df0f2"),
    "HC3FinanceRetrieval": ("mteb/HC3FinanceRetrieval", "f7674417d3552fd20e071762bff049137f17b075"),
    "FinQARetrieval": ("mteb/FinQARetrieval", "18dbd07c4e9dc8328d10a53b98f3caad6b7e07d9"),
    "AppsRetrieval": ("CoIR-Retrieval/apps", "f22508f96b7a36c2415181ed8bb76f76e04ae2d5"),
    "DS1000Retrieval": ("mteb/DS1000Retrieval", "26779eaf6daa2b7984cb33ec450817fd188aab30"),
    "HumanEvalRetrieval": ("embedding-benchmark/HumanEval", "ed1f48aca747f10bac146795328e2f03326e7625"),
    "MBPPRetrieval": ("embedding-benchmark/MBPP", "586a1fd6a0c63fdeda3b49c0293559a81c79cdec"),
    "WikiSQLRetrieval": ("mteb/WikiSQLRetrieval", "add6c3faf0d972ebb139b30fa6c4f955d99635c5"),
    "FreshStackRetrieval": ("mteb/FreshStackRetrieval", "6faa3e4ff1c7d31824c32ee0a9dd580aba8bad11"),
    "ChatDoctorRetrieval": (
        "embedding-benchmark/ChatDoctor_HealthCareMagic",
        "50c2986fedffa33b38afd5c1752026f8e9e5ed1d",
    ),
    "CUREv1": ("clinia/CUREv1", "3bcf51c91e04d04a8a3329dfbe988b964c5cbe83"),
    "SWEbenchCodeRetrieval": (
        "embedding-benchmark/SWEbenchCodeRetrieval",
        "440b0e732b8d02c16df2c95352ab6770abe997da",
    ),
    "LegalQuAD": ("mteb/LegalQuAD", "37aa6cfb01d48960b0f8e3f17d6e3d99bf1ebc3e"),
    "MIRACLRetrievalHardNegatives": (
        "mteb/MIRACLRetrievalHardNegatives",
        "d7d94fa4b946cec4a27c84653aa0cf6b33f74a3c",
    ),
}

MIRACL = dict(  # subset and language
    pair.split(":")
    for pair in (
        "ar:ara-Arab bn:ben-Beng de:deu-Latn en:eng-Latn es:spa-Latn fa:fas-Arab fi:fin-Latn fr:fra-Latn "
        "hi:hin-Deva id:ind-Latn ja:jpn-Jpan ko:kor-Kore ru:rus-Cyrl sw:swa-Latn te:tel-Telu th:tha-Thai "
        "yo:yor-Latn zh:zho-Hans"
    ).split()
)

CURE = (
    "all dentistry_and_oral_health dermatology gastroenterology genetics neuroscience_and_neurology "
    "orthopedic_surgery otorhinolaryngology plastic_surgery psychiatry_and_psychology pulmonology"
).split()

REVELA = (  # the thirteen that Revela reports
    "arguana climate-fever dbpedia-entity fever fiqa hotpotqa nfcorpus nq quora scidocs scifact trec-covid "
    "webis-touche2020"
).split()

GROUPS = {
    "beir": list(BEIR),
    "beir13": REVELA,
    # Which nine DREAM reports is not known to us: these are the nine with fewer than a million documents.
    "beir9": "arguana cqadupstack fiqa nfcorpus quora scidocs scifact trec-covid webis-touche2020".split(),
    # The fourteen open English tasks, most likely those that DREAM reports.
    "rteb": list(RTEB)[:14],
}


def beir_url() -> str:
    """Where BEIR's zips are: $BEIR_URL, or its authors' server."""
    return os.environ.get("BEIR_URL", BEIR_URL).rstrip("/")


def members(names: Iterable[str]) -> list[str]:
    """Groups replaced by their members, each name once."""
    return list(dict.fromkeys(member for name in names for member in GROUPS.get(name, [name])))


def check_names(names: Iterable[str], flag: str = "--dataset") -> None:
    """Raise InputError, which names `flag`, for one that is neither a public name nor a path."""
    for name in names:
        if name in ("demo", *BEIR, *RTEB) or name and Path(name).exists():
            continue
        known = ["demo", *GROUPS, *BEIR, *RTEB]
        close = [other for other in known if name and other.lower().startswith(name.lower())]
        close = close or difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"names: {', '.join(known)}"
        raise InputError(
            f"{flag} {name or repr(name)}: no such folder or .zip, and not a name of a public dataset; {hint}"
        )


def read_datasets(names: Iterable[str], split: str | None = None) -> list[RetrievalDataset]:
    """The datasets of names and groups, fetched if need be. Raises InputError where two share a name."""
    datasets = [d for name in expand_names(names) for d in resolve_datasets(name, split)]
    called = Counter(dataset.name for dataset in datasets)
    if twice := [name for name, count in called.items() if count > 1]:
        raise InputError(f"--dataset: several are called {twice[0]!r}; give each folder a name of its own")
    return datasets


def expand_names(names: Iterable[str]) -> list[str]:
    """`members`; what is missing of BEIR's is told with its size."""
    expanded = members(names)
    cache = cache_folder()
    missing = [name for name in expanded if name in BEIR and not (cache / name).is_dir()]
    if missing:
        sizes = {name: remote_size(f"{beir_url()}/{name}.zip") or 0 for name in missing}
        told = ", ".join(f"{n} {size / 1e6:,.0f} MB" if size else f"{n} (?)" for n, size in sizes.items())
        cache.mkdir(parents=True, exist_ok=True)
        free, total = shutil.disk_usage(cache).free, sum(sizes.values())
        print(
            f"to fetch into {cache}: {told}; unpacked about {4 * total / 1e9:.1f} GB, free {free / 1e9:.1f}",
            flush=True,
        )
        if total > free:
            raise InputError(f"{cache}: too little space; set DREAM_CACHE to a folder on a larger disk")
    return expanded


def resolve_datasets(name: str, split: str | None = None, flag: str = "--dataset") -> list[RetrievalDataset]:
    """The dataset of a path or a public name, fetched first if need be; several where it has parts.

    name: `demo`, one of BEIR's names, one of RTEB's tasks, else a folder or .zip in BEIR's or mteb's layout.
    split: None: the usual one (msmarco: dev; else test). Raises InputError, which names `flag`.
    """
    check_names([name], flag)
    if name == "demo":
        dataset = load_dataset(Path(__file__).parent.parent / "demo" / "test", split or "test")
        dataset.name = dataset.task = "demo"
        return [dataset]
    if name in BEIR:
        task, md5 = BEIR[name]
        folder = fetch_zip(f"{beir_url()}/{name}.zip", cache_folder() / name, md5)
        datasets = _load_parts(folder, name, split or ("dev" if name == "msmarco" else None))
        for dataset in datasets:
            part = dataset.name.removeprefix(name).strip("-")
            dataset.task = f"{task}{part.capitalize()}Retrieval" if part else task
            dataset.revision = f"md5-{md5}"
        return datasets
    if name in RTEB:
        return [_load_task(name, *part) for part in _task_parts(name, split)]
    return _load_parts(Path(name), Path(name).resolve().name.removesuffix(".zip"), split)


def resolve_dataset(name: str, split: str | None = None, flag: str = "--dataset") -> RetrievalDataset:
    """The dataset of a name that has no parts. Raises InputError."""
    dataset, *others = resolve_datasets(name, split, flag)
    if others:
        raise InputError(f"{flag} {name}: has several parts; give one of them")
    return dataset


def _load_parts(path: Path, name: str, split: str | None) -> list[RetrievalDataset]:
    """The dataset of a folder or zip, or those of its sub-folders (cqadupstack)."""
    parts = sorted(file.parent for file in path.glob("*/corpus.jsonl")) if path.is_dir() else []
    if (path / "corpus.jsonl").exists() or not parts:
        dataset = load_dataset(path, split or "test")
        dataset.name = dataset.task = name
        return [dataset]
    datasets = [load_dataset(part, split or "test") for part in parts]
    for dataset in datasets:
        dataset.benchmark, dataset.name = name, f"{name}-{dataset.name}"
        dataset.task = dataset.name
    return datasets


def _task_parts(name: str, split: str | None) -> list[tuple[str, str, str, str]]:
    """(split, subset in mteb, prefix of its configs, config of its queries) of each part of an RTEB task."""
    if name == "CUREv1":
        return [(part, "en", "", "queries-en") for part in ([split] if split else CURE)]
    if name == "MIRACLRetrievalHardNegatives":
        return [(split or "dev", language, language, "queries") for language in MIRACL]
    return [(split or "test", "default", "", "queries")]


def _load_task(name: str, split: str, subset: str, prefix: str, queries_config: str) -> RetrievalDataset:
    """A part of an RTEB task from the hub: its card first, then only the files that the card names for it."""
    repository, revision = RTEB[name]
    folder = fetch_repository(f"{repository}@{revision}", ["README.md"], "dataset")
    wanted = [
        f"{prefix}-{part}" if prefix else part for part in ("corpus", queries_config, "qrels", "default")
    ]
    patterns = [
        path
        for config, splits in card_configs(folder).items()
        for path in itertools.chain(*splits.values())
        if config in wanted
    ]
    patterns = ["README.md", *(patterns or ["*.jsonl", "*.tsv", "*.parquet"])]
    folder = fetch_repository(f"{repository}@{revision}", patterns, "dataset")
    dataset = load_dataset(folder, split, prefix, queries_config)
    dataset.name, dataset.task, dataset.subset = name, name, subset
    if name in ("CUREv1", "MIRACLRetrievalHardNegatives"):
        dataset.benchmark, dataset.name = name, f"{name}-{prefix or split}"
    dataset.revision = revision
    return dataset
