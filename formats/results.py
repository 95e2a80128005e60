"""Results as other tools read them: TREC runs, mteb's files, means over datasets."""

import json
from pathlib import Path

from formats.catalogue import MIRACL
from formats.datasets import RetrievalDataset
from support.files import InputError, write_atomic

MTEB_LAYOUT = "2.26.24"  # the mteb whose result files --mteb writes


MTEB_DROPS = {"MSMARCO", "FiQA2018", "ArguAna", "QuoraRetrieval", "FEVER"}  # identical ids, elsewhere kept


CODE = {  # what RTEB's tasks hold beside English
    **dict.fromkeys(("AppsRetrieval", "DS1000Retrieval", "HumanEvalRetrieval"), ["python-Code"]),
    **dict.fromkeys(("MBPPRetrieval", "SWEbenchCodeRetrieval"), ["python-Code"]),
    "FreshStackRetrieval": ["python-Code", "javascript-Code", "go-Code"],
    "WikiSQLRetrieval": ["sql-Code"],
    "CUREv1": ["eng-Latn"],  # of queries and of documents
}


def write_run(path: Path, run: dict[str, dict[str, float]], tag: str) -> None:
    """A TREC run file: `qid Q0 docid rank score tag`, scores with the nine digits that restore a float32."""
    parts = []
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


def write_mteb(
    folder: Path, model: str, revision: str, datasets: list[RetrievalDataset], results: list[dict]
) -> None:
    """Result files as mteb writes and reads them: FOLDER/results/MODEL/REVISION/TASK.json.

    results: of the first datasets, as in eval.py --json. A model that is a folder is called local/NAME.
    """
    model, own = model.partition("@")[0], Path(model).resolve()
    if own.exists():
        model = f"local/{own.parent.name}-{own.name}" if own.match("step-*") else f"local/{own.name}"
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
