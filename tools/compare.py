"""Compare the runs of a study: means over seeds, tests over queries, as Markdown tables and as figures.

Its entries are the "runs" of results.json: a name, flags, and for each seed a state and, once it is finished,
scores of BM25 ("bm25") and of the retriever before and after training.
"""

import json
import shlex
from functools import cache
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

from support.files import InputError, read_json
from tools import figures
from tools.export import table

FLIPS = 100_000
LEGEND = f"""Means and sample standard deviations over seeds. Difference: to *FIRST* with the same seeds, the
mean over queries. p: two-sided paired randomisation test over queries, {FLIPS:,} random sign flips, scores
averaged over seeds first (Smucker, Allan and Carterette, CIKM 2007); it tells about other queries, not about
other seeds. Holm: adjusted over all comparisons of a dataset. Each run and seed: results.json."""


@cache
def sign_flip_p(differences: tuple[float, ...], flips: int = FLIPS) -> float:
    """Two-sided p of the paired randomisation test: would random signs move the mean as far from 0?

    differences: of two systems' scores, one per query. p = (1 + hits) / (1 + flips), never 0.
    """
    d = np.array([value for value in differences if value])  # (Q,), without those that no sign changes
    generator, hits = np.random.default_rng(0), 0
    bound = abs(d.sum()) - 1e-9 * np.abs(d).sum()  # a tie is a hit, whatever the rounding
    size = max(1, 2**21 // max(1, len(d)))  # flips at once: 16 MB of float64
    for first in range(0, flips, size):
        count = min(size, flips - first)
        bits = np.frombuffer(generator.bytes((count * len(d) + 7) // 8), np.uint8)
        signs = np.unpackbits(bits, count=count * len(d)).reshape(count, len(d))  # (F, Q), 0 or 1
        hits += int((np.abs(2 * (signs @ d) - d.sum()) >= bound).sum())
    return (1 + hits) / (1 + flips)


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down adjustment of p values, in their own order (Holm, 1979)."""
    order = np.argsort(p_values)
    adjusted = np.minimum(1, np.array(p_values)[order] * np.arange(len(order), 0, -1))
    return np.maximum.accumulate(adjusted)[np.argsort(order)].tolist()


def summary(values: list[float]) -> dict:
    """Mean and sample standard deviation, None where there are too few values."""
    deviation = stdev(values) if len(values) > 1 else None
    return {"mean": fmean(values) if values else None, "deviation": deviation}


def read_scores(run: Path) -> dict:
    """What a finished run scored, before and after training, and what it cost. Raises InputError."""
    results, datasets = read_json(run / "results.json"), dict[str, dict]()
    try:
        for kind in ("bm25", "before", "after"):
            for result in results[kind]:
                name = result["dataset"]
                name += " (2)" * (kind in datasets.get(name, {}))  # another folder of the same name
                own = {"queries": result["queries"], "ndcg@10": result["metrics"]["ndcg@10"]}
                own["groups"] = {group: means["ndcg@10"] for group, means in result.get("groups", {}).items()}
                if kind == "after":
                    own["per_query"] = result["ndcg@10_per_query"]
                datasets.setdefault(name, {})[kind] = own
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [record for record in records if "time" in record]
        return {
            "datasets": datasets,
            "dev": max((record["dev"]["ndcg@10"] for record in records if "dev" in record), default=None),
            "retriever_tokens": sum(step["retriever_tokens"] for step in steps),
            "seconds": sum(step["time"]["seconds"] for step in steps),
            "state": "finished",
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{run}: not as train writes it ({error!r}); delete it to run it again") from error


def finished(entry: dict) -> dict[str, dict]:
    """The finished seeds and their scores."""
    return {seed: scores for seed, scores in entry["seeds"].items() if scores["state"] == "finished"}


def compare(entries: list[dict]) -> None:
    """Add to each entry its means over seeds, its difference to the first one's same seeds, and p values."""
    first: dict[str, dict[str, dict[str, float]]] = {}  # NDCG@10: dataset -> seed -> query
    for entry in entries:
        done, entry["datasets"] = finished(entry), {}
        for dataset in next(iter(done.values()))["datasets"] if done else []:
            after = {seed: scores["datasets"][dataset]["after"] for seed, scores in done.items()}
            queries = {seed: own.pop("per_query") for seed, own in after.items()}
            base = first.get(dataset, queries)
            names = next(iter(base.values())).keys()
            if any(own.keys() != names for own in queries.values()):
                raise InputError(f"{entry['name']}: seeds or first run had other queries of {dataset}")
            own = {"queries": len(names)} | summary([own["ndcg@10"] for own in after.values()])
            groups = [own["groups"] for own in after.values()]
            own["groups"] = {group: summary([means[group] for means in groups]) for group in groups[0]}
            if entry is entries[0]:
                first[dataset] = queries
            elif dataset in first and (shared := [seed for seed in queries if seed in base]):
                differences = tuple(
                    fmean(queries[seed][name] - base[seed][name] for seed in shared) for name in names
                )
                own |= {"difference": fmean(differences), "p": sign_flip_p(differences)}
            entry["datasets"][dataset] = own
        for cost in ("dev", "retriever_tokens", "seconds"):
            entry[cost] = summary([scores[cost] for scores in done.values() if scores[cost] is not None])
    for dataset in first:
        compared = [own for entry in entries[1:] if "p" in (own := entry["datasets"].get(dataset, {}))]
        for own, p in zip(compared, holm([own["p"] for own in compared]), strict=True):
            own["p_holm"] = p


def plus_minus(value: dict | None, form: str = ".4f") -> str:
    if not value or value["mean"] is None:
        return "–"
    deviation = f" ± {value['deviation']:{form}}" if value["deviation"] is not None else ""
    return f"{value['mean']:{form}}{deviation}"


def fold(rows: list[list[str]], width: int = 100) -> str:
    """A Markdown table; where it is too wide, several that repeat the first column."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) + 3 for column in zip(*rows, strict=True)]
    blocks: list[list[int]] = []
    for column in range(1, len(widths)):
        if not blocks or sum(widths[c] for c in [*blocks[-1], column]) >= width:
            blocks.append([0])
        blocks[-1].append(column)
    return "\n\n".join(table([[row[c] for c in block] for row in rows], left=1) for block in blocks)


def score_table(dataset: str, entries: list[dict], baselines: bool) -> str:
    """The baselines' scores on a dataset, then the entries' with their differences to the first entry."""
    scored = [(entry["name"], finished(entry).values()) for entry in entries]
    done = [(name, own["datasets"][dataset]) for name, scores in scored for own in scores]
    groups = sorted({group for _, own in done for group in own["after"]["groups"]})
    rows = [["run", "seeds", "NDCG@10", "difference", "p", "p (Holm)", *groups]]
    for kind, title in (("bm25", "BM25"), ("before", "untrained retriever")) if baselines else ():
        found: dict[tuple[str, ...], str] = {}  # several where retrievers or lengths differ
        for name, own in done:
            scores = own[kind]["ndcg@10"], *(own[kind]["groups"][group] for group in groups)
            found.setdefault(
                tuple(f"{score:.4f}" for score in scores), f"{title} ({name})" if found else title
            )
        rows += [[title, "", score, "", "", "", *others] for (score, *others), title in found.items()]
    for entry in entries:
        states = [own["state"] for own in entry["seeds"].values()]
        seeds = [f"{states.count(state)} {state}" for state in ("failed", "missing") if state in states]
        own = entry["datasets"].get(dataset, {"groups": {}, "mean": None})
        compared = [("difference", "+.4f"), ("p", ".2g"), ("p_holm", ".2g")]
        row = [entry["name"], ", ".join([str(states.count("finished")), *seeds]), plus_minus(own)]
        row += [format(own[name], form) if name in own else "" for name, form in compared]
        rows.append(row + [plus_minus(own["groups"].get(group)) for group in groups])
    return fold(rows)


def tables(results: dict) -> list[str]:
    """The tables of a study, with their titles."""
    entries = {entry["name"]: entry for entry in results["runs"]}
    queries = {name: own["queries"] for entry in entries.values() for name, own in entry["datasets"].items()}
    blocks = []
    for item in results["study"]["tables"]:
        chosen = [entries[name] for name in item["runs"]]
        blocks.append(f"## {item['title']}")
        for dataset, count in queries.items() or [("no results yet", 0)]:
            blocks.append(f"**{dataset}**, {count:,} queries")
            blocks.append(score_table(dataset, chosen, item.get("baselines", False)))
        rows = [["run", "best dev NDCG@10", "retriever tokens", "seconds of training"]]
        for entry in chosen:
            costs = [plus_minus(entry[cost], ",.0f") for cost in ("retriever_tokens", "seconds")]
            rows.append([entry["name"], plus_minus(entry["dev"]), *costs])
        blocks.append(fold(rows))
    return blocks


def page(results: dict, name: str, drawn: list[dict]) -> str:
    """results.md of the study that stands in the file `name`. drawn: the figures that there are."""
    study = results["study"]
    parts = [f"# {study['title']}", study.get("about", "")]
    parts += [f"```console\n$ python -m tools.study {shlex.quote(name)}\n```", *tables(results)]
    parts += [f"![{item['title']}]({item['file']})" for item in drawn]
    parts += ["## How to read this", LEGEND.replace("FIRST", study["runs"][0]["name"])]
    for own in results["machines"]:
        where = f"{own['gpu'] or own['cpu'] or 'a CPU'}, {own['cores']} cores, {own['threads']} threads a run"
        parts.append(f"Run on {where}, torch {own['torch']}, at commit {own['commit']}.")
    return "\n\n".join(filter(None, parts)) + "\n"


def draw(item: dict, entries: list[dict], x: list) -> str:
    """Bars or lines as SVG, empty while there is nothing to show. Of several datasets, their unweighted mean.

    item: one of a study's "figures". x: where the lines have their points, one per run.
    """

    def average(scores: dict, kind: str) -> float:
        return fmean(own[kind]["ndcg@10"] for own in scores["datasets"].values())

    seeds = {entry["name"]: [*finished(entry).values()] for entry in entries}
    known = [scores for name in item["runs"] for scores in seeds[name]]
    if not known:
        return ""
    shown = [summary([average(scores, "after") for scores in seeds[name]]) for name in item["runs"]]
    means, deviations = ([own[key] for own in shown] for key in ("mean", "deviation"))
    reference = (average(known[0], "bm25"), "BM25") if item.get("bm25") else None
    datasets = list(known[0]["datasets"])
    label = f"NDCG@10, {datasets[0] if len(datasets) == 1 else f'mean of {len(datasets)} datasets'}"
    if item["kind"] == "bars":
        return figures.bars(item["title"], item["runs"], means, deviations, label, reference)
    points = sorted(zip(x, means, deviations, strict=True), key=lambda point: point[0])
    return figures.lines(item["title"], {"runs": points}, item.get("xlabel", item["x"]), label, reference)
