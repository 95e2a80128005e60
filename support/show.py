"""What is printed for a person to read: tables, settings, the map of heads."""

import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any

from tqdm import tqdm


def print_told(told: list[dict]) -> None:
    """What is said of each model, a line a setting; where models differ, with a bar between."""
    for name in dict.fromkeys(name for own in told for name in own):
        values = [str(own.get(name, "-")) for own in told]
        print(f"{name}: {' | '.join(values if len(set(values)) > 1 else values[:1])}")


def print_header(datasets: list[str], models: list[str]) -> str:
    """The table's head. Returns the form of a row's first columns: dataset and, of several, model."""
    columns = [["dataset", *datasets], ["model", *models]][: 1 + (len(models) > 1)]
    form = "  ".join(f"{{:{max(map(len, names))}}}" for names in columns)
    figures = "  ".join(f"{name:>10}" for name in ("documents", "NDCG@10", "recall@100", "MAP", "MRR@10"))
    print(f"\n{form.format('dataset', 'model')}  {'split':8}  {'queries':>8}  {figures}", flush=True)
    return form


def print_averages(averages: dict[str, dict[str, dict[str, float]]]) -> None:
    """averages: model -> benchmark, or "mean" -> metrics."""
    for model, own in averages.items():
        for name, metrics in own.items():
            part = f"{name}: NDCG@10 {metrics['ndcg@10']:.4f}, the mean of its parts"
            mean = f"mean NDCG@10: {metrics['ndcg@10']:.4f}, each benchmark counted once"
            print(f"{model}: " * (len(averages) > 1) + (mean if name == "mean" else part))


def print_result(result: dict, names: str) -> None:
    """A row. names: what it begins with, padded."""
    metrics = result["metrics"]
    figures = "  ".join(f"{metrics[name]:10.4f}" for name in ("ndcg@10", "recall@100", "map", "mrr@10"))
    counts = f"{result['split']:8}  {result['queries']:8,}  {result['documents']:10,}"
    print(f"{names}  {counts}  {figures}", flush=True)
    for group, means in result.get("groups", {}).items():
        print(f"  {group}: {means['queries']:,} queries, NDCG@10 {means['ndcg@10']:.4f}")
    if number := result["queries_without_hits"]:
        print(
            f"  note: {number:,} queries found nothing and count 0; from a run file, pytrec_eval omits them"
        )
    if number := result["queries_with_ties_beyond_k"]:
        print(f"  note: {number:,} queries tie at rank k with documents beyond the margin: an arbitrary cut")


def print_settings(settings: dict[str, Any], device: object, dtype: object, reason: str) -> None:
    """Settings, on as few lines as they need."""
    pairs = [
        f"{name}={value!r}" if "\n" in str(value) else f"{name}={value}"
        for name, value in sorted(settings.items())
        if name not in ("device", "dtype")
    ]
    print(textwrap.fill("  ".join(pairs), 100, break_on_hyphens=False, break_long_words=False))
    print(f"device={device}  dtype={str(dtype).removeprefix('torch.')} ({reason})", flush=True)


def head_map(scores: list[list[float]], heads: list[tuple[int, int]]) -> str:
    """The layer x head map for a terminal: scores in percent of the best, chosen heads in brackets."""
    chosen, top = set(heads), max(*map(max, scores), 1e-12)
    lines = ["layer  head " + "".join(f"{head:^5}" for head in range(len(scores[0])))]
    for layer, row in enumerate(scores):
        cells = (round(100 * max(score, 0.0) / top) for score in row)
        marked = (
            f"[{cell:>3}]" if (layer, head) in chosen else f" {cell:>3} " for head, cell in enumerate(cells)
        )
        lines.append(f"{layer:>5}       " + "".join(marked))
    return "\n".join(lines)


ENOUGH = {"context_gain": 0.5, "steering_range": 0.2, "times_chance": 1.5}  # for `verdict`


def verdict(report: dict) -> str:
    """One sentence: can these heads of this judge teach on these rows? By ENOUGH; what is unknown is enough.

    The demo has 2.80 nats, 3.33 nats and 7.7 times chance, a judge with random weights 0.01, 1.00 and 0.5.
    """
    gain, best = report["context_gain"], report["steering_best_is_relevant"]
    why = []
    if gain is not None and gain < ENOUGH["context_gain"]:
        why.append("the judge predicts the target hardly better with the relevant document than with another")
    if report["steering_range"] < ENOUGH["steering_range"]:
        why.append("these heads hardly move the loss")
    if best is not None and best < ENOUGH["times_chance"] * report["chance"]:
        why.append("the loss is not lowest with the weight on the relevant document")
    if not why:
        return "these heads of this judge can teach on these rows"
    limits = (
        f"{ENOUGH['context_gain']} nats, {ENOUGH['steering_range']} nats, {ENOUGH['times_chance']} x chance"
    )
    return f"warning: cannot teach on these rows: {', and '.join(why)} (limits: {limits})"


def print_report(labels: dict | None, num_rows: int, num_heads: int, total: int, report: dict) -> None:
    """Whether the chosen heads can teach: what related/qrhead.py's `describe_heads` found."""
    kinds = ", ".join(f"{count} by {kind}" for kind, count in (labels or {}).items() if count)
    gain, best = report["context_gain"], report["steering_best_is_relevant"]
    print(
        f"{num_heads} of {total} heads, on {num_rows} rows set aside"
        + (f" (relevant document known: {kinds})" if kinds else "")
    )
    print(f"  documents' share of their attention   {report['budget']:.2f}")
    print(
        "  context gain                          " + (f"{gain:.2f} nats" if gain is not None else "unknown")
    )
    print(
        f"  steering range                        {report['steering_range']:.2f} nats"
        + (f", best candidate is the relevant one in {best:.0%}" if best is not None else "")
    )
    print(verdict(report))
    if labels and labels["none"] == num_rows:
        print("note: no row tells its relevant document; heads are ranked by the gradient of the loss")
    sys.stdout.flush()


def print_training(results: dict[str, list[dict]]) -> None:
    """A run's NDCG@10 before and after training, beside BM25; results.json's content."""
    print(f"\n{'NDCG@10':32}{'queries':>8}{'BM25':>9}{'before':>9}{'after':>9}")
    for bm25, before, after in zip(*(results[key] for key in ("bm25", "before", "after")), strict=True):
        figures = "".join(f"{result['metrics']['ndcg@10']:9.4f}" for result in (bm25, before, after))
        print(f"{after['dataset']:32}{after['queries']:8,}{figures}")
        for group, means in sorted(after.get("groups", {}).items()):
            own = [result["groups"][group]["ndcg@10"] for result in (bm25, before, after)]
            print(f"  {group:30}{means['queries']:8,}" + "".join(f"{figure:9.4f}" for figure in own))


def print_next(out: Path, checkpoint: Path) -> None:
    """What a finished training leaves, and what can be done with it."""
    named = shlex.quote(str(out))
    print(f"\ncheckpoint: {checkpoint}")
    print(f"next: python eval.py --model {named} --dataset scifact nfcorpus")
    print(f"report: python -m tools.report {named}", flush=True)


def warn_about_temperature(effective: float, candidates: int, temperature: float) -> None:
    """At the first step: effective, of the candidates, have weight."""
    if effective < 1.5:
        print(
            f"warning: of {candidates} candidates {effective:.2f} have weight; raise --temperature "
            f"(now {temperature:g}), or one random document wins at the start"
        )
    elif effective > 0.98 * candidates:
        print(
            f"warning: the weights are uniform ({effective:.2f} of {candidates} candidates); lower "
            f"--temperature (now {temperature:g}), or the scores will not matter"
        )


def progress(items: Any = None, hidden: bool = False, **options: Any) -> tqdm:
    """A progress bar over items, or one to be updated; tqdm's options. None where stderr is no terminal."""
    return tqdm(items, disable=hidden or None, **options)
