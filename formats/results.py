"""Results as other tools read them: TREC runs, mteb's files, means over datasets."""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from formats.catalogue import MIRACL
from formats.datasets import RetrievalDataset
from support.files import InputError, check_writable, write_atomic

Run = dict[str, dict[str, float]]  # query id -> document id -> score, best first
MTEB_LAYOUT = "2.26.24"  # the mteb whose result files --mteb writes
MTEB_DROPS = {"MSMARCO", "FiQA2018", "ArguAna", "QuoraRetrieval", "FEVER"}  # identical ids, elsewhere kept
CODE = {  # what RTEB's tasks hold beside English
    **dict.fromkeys(("AppsRetrieval", "DS1000Retrieval", "HumanEvalRetrieval"), ["python-Code"]),
    **dict.fromkeys(("MBPPRetrieval", "SWEbenchCodeRetrieval"), ["python-Code"]),
    "FreshStackRetrieval": ["python-Code", "javascript-Code", "go-Code"],
    "WikiSQLRetrieval": ["sql-Code"],
    "CUREv1": ["eng-Latn"],  # of queries and of documents
}


@dataclass
class Outputs:
    """Where an evaluation writes, by its flags; "" stands for "not asked for"."""

    json: str
    trec: str
    mteb: str
    embeddings: str

    def check_names(self, datasets: Collection[str], models: Collection[str]) -> None:
        """Raise InputError where several datasets or models would be written to one file."""
        for kind, names in (("dataset", datasets), ("model", models)):
            if self.trec and len(names) > 1 and f"{{{kind}}}" not in self.trec:
                raise InputError(f"--trec {self.trec}: several {kind}s need {{{kind}}} in the file's name")
        if self.mteb and len(set(map(mteb_name, models))) < len(models):
            raise InputError("--mteb: two of the models have the same name there; evaluate them one by one")

    def check_writable(self) -> None:
        """A typing error should not wait for hours of work. Raises InputError."""
        for path in filter(None, (self.json, self.trec)):
            check_writable(path)
        for path in filter(None, (self.mteb, self.embeddings)):
            check_writable(path, folder=True)

    def write(
        self, model: str, run: Run, datasets: list[RetrievalDataset], results: dict[str, list], told: dict
    ) -> None:
        """What is known after a dataset. run: the model's. results, told: by model; of the first datasets."""
        own = results[model]
        if self.trec:
            names = {"{dataset}": own[-1]["dataset"], "{model}": model.strip("/").replace("/", "__")}
            write_run(Path(re.sub(r"\{(dataset|model)\}", lambda m: names[m[0]], self.trec)), run, model)
        if self.json:
            content = {"results": own, "averages": average(own), "settings": told[model]}
            if len(results) > 1:
                listed = [{"model": name} | result for name, some in results.items() for result in some]
                averages = {name: average(some) for name, some in results.items()}
                content = {"results": listed, "averages": averages, "settings": told}
            write_atomic(self.json, json.dumps(content, indent=2) + "\n")
        if self.mteb:
            write_mteb(Path(self.mteb), model, told[model]["model_revision"], datasets, own)


def write_run(path: Path, run: Run, model: str) -> None:
    """A TREC run file: `qid Q0 docid rank score tag`, scores with the nine digits that restore a float32."""
    parts, tag = [], "_".join(Path(model).name.split()) or "dream"
    for query_id, hits in run.items():
        if len(" ".join([query_id, *hits]).split()) != 1 + len(hits):
            raise InputError(f"--trec: query {query_id!r}: a TREC run cannot hold ids with spaces")
        ranked = enumerate(hits.items(), 1)
        lines = (f"{query_id} Q0 {doc_id} {rank} {score:.9g} {tag}\n" for rank, (doc_id, score) in ranked)
        parts.append("".join(lines))
    write_atomic(path, "".join(parts))


def _languages(dataset: RetrievalDataset) -> list[str]:
    """As mteb names them: language and script."""
    if dataset.task == "MIRACLRetrievalHardNegatives":
        return [MIRACL[dataset.subset]]
    return ["deu-Latn"] if dataset.task == "LegalQuAD" else ["eng-Latn", *CODE.get(dataset.task, [])]


def mteb_name(model: str) -> str:
    """A model that is a folder is called local/NAME."""
    own = Path(model).resolve()
    name = f"local/{own.parent.name}-{own.name}" if own.match("step-*") else f"local/{own.name}"
    return name if own.exists() else model.partition("@")[0]


def write_mteb(
    folder: Path, model: str, revision: str, datasets: list[RetrievalDataset], results: list[dict]
) -> None:
    """Result files as mteb writes and reads them: FOLDER/results/MODEL/REVISION/TASK.json.

    results: of the first datasets, as in eval.py --json.
    """
    model = mteb_name(model)
    folder = folder / "results" / model.replace("/", "__").replace(" ", "_") / revision
    tasks: dict[str, list[tuple[RetrievalDataset, dict]]] = {}
    for dataset, result in zip(datasets, results, strict=False):
        tasks.setdefault(dataset.task, []).append((dataset, result))
    for task, parts in tasks.items():
        scores: dict[str, list[dict]] = {}
        for dataset, result in parts:
            metrics = {name.replace("@", "_at_"): value for name, value in result["metrics"].items()}
            row = {**metrics, "main_score": metrics["ndcg_at_10"], "hf_subset": dataset.subset}
            scores.setdefault(dataset.split, []).append(row | {"languages": _languages(dataset)})
        content = {
            "dataset_revision": parts[0][0].revision or parts[0][0].fingerprint,
            "task_name": task,
            "mteb_version": MTEB_LAYOUT,
            "scores": scores,
            "evaluation_time": sum(result["seconds"] for _, result in parts),
        }
        write_atomic(folder / f"{task}.json", json.dumps(content, indent=2) + "\n")
    write_atomic(folder / "model_meta.json", json.dumps({"name": model, "revision": revision}) + "\n")


def average(results: list[dict]) -> dict[str, dict[str, float]]:
    """Unweighted means: of each benchmark over its parts, and, as "mean", over benchmarks and datasets."""
    members: dict[str, list[dict]] = {}
    for result in results:
        members.setdefault(result["part_of"] or result["dataset"], []).append(result["metrics"])
    means = {name: _mean(metrics) for name, metrics in members.items()}
    averages = {name: means[name] for name, metrics in members.items() if len(metrics) > 1}
    return averages | ({"mean": _mean(list(means.values()))} if len(means) > 1 else {})


def _mean(metrics: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(sum(m[name] for m in metrics) / len(metrics), 5) for name in metrics[0]}
