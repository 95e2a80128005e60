"""The report of a run: one HTML file that needs nothing beside it, and the same as Markdown.

    python -m tools.report runs/demo                           runs/demo/report.html, report.md, report/*.svg
    python -m tools.report runs/mine --dataset nfcorpus --out nfcorpus.html
    python -m tools.report runs/mine --queries 0               no search: nothing is loaded or encoded

Run it from the project's root. A run may be unfinished or killed: what there is, is shown. The queries are
searched with the checkpoint that eval.py would load. Settings that are local paths show their last part only.
"""

import argparse
import json
import re
import statistics
import sys
from collections import namedtuple
from collections.abc import Iterator, Sequence
from html import escape
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import quote

import eval as yardstick
from dream import OBJECTIVES, Settings
from formats.catalogue import expand_names, resolve_datasets
from formats.embedders import load_embedder
from formats.results import average
from formats.templates import TEMPLATES
from support.files import InputError, check_writable, write_atomic
from support.flags import limited, sections
from support.launch import ArgumentParser, run_command
from support.runs import RUN_FILES, read_run
from tools import figures
from tools.export import public_name, table

CURVES = {
    "loss": "Loss (nats)",
    "dev": "Dev NDCG@10",
    "effective_candidates": "Effective number of candidates",
    "positive_weight": "Weight on the relevant document",
    "lr": "Learning rate",
    "grad_norm": "Norm of the gradient, before clipping",
}
HEADS = {
    "budget": "documents' share of their attention",
    "context_gain": "context gain, in nats",
    "steering_range": "steering range, in nats",
    "steering_best_is_relevant": "share of rows whose best candidate is the relevant one",
}
INPUTS = {"train", "dev", "test", "judge", "retriever", "out"}  # of each run its own, not a changed default
POINTS = 500  # of a curve, about: there are hardly more pixels
DEPTH, SHOWN = 100, 3  # documents of a query: among which the first relevant one is looked for, and shown
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Run NAME</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
:root { --page: #fff; --card: #f6f8fa; --text: #1f2328; --quiet: #59636e; --rule: #d1d9e0; --mark: #fff3c4 }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --card: #161b22; --text: #e6edf3;
  --quiet: #9198a1; --rule: #3d444d; --mark: #3b2f0b } }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif }
main { margin: auto; padding: 1rem 1rem 4rem; max-width: 72rem; overflow-wrap: break-word; display: grid;
  gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 29rem), 1fr)) }
h1, h2, h3, p { grid-column: 1 / -1; margin: 0; min-width: 0 }
h2 { margin-top: 2.5rem }
.card { margin: 0; padding: 1rem; background: var(--card); border-radius: .5rem; overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; text-align: left; min-width: 16rem }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--rule); vertical-align: top; font-weight: 400 }
caption { padding: 0 .6rem .3rem; text-align: left; font-weight: 600 }
small, thead th { font-weight: 400; font-size: .875rem; color: var(--quiet) }
.number { text-align: right; white-space: nowrap }
.marked { background: var(--mark) }
@media (max-width: 32rem) { .card { padding: .6rem } th, td, caption { padding: .3rem .25rem } }
</style></head><body><main>
"""

Heading = namedtuple("Heading", "level text")
Figure = namedtuple("Figure", "name title svg")
# left: columns to the left, the others hold numbers; marked: rows that stand out; note: about the table
Table = namedtuple("Table", "caption header rows left marked note", defaults=(1, (), ""))
Block = str | Heading | Figure | Table  # a str is a paragraph
Blocks = Iterator[Block]
Run = namedtuple("Run", "folder steps dev settings heads results checkpoints")
Args = argparse.Namespace
UNGIVEN = ("num_heads", "judge_context", "judge_lr")  # 0 there: not given


def collect(folder: Path) -> Run:
    """What a run has written so far. Raises InputError."""
    if not any((folder / name).is_file() for name in RUN_FILES):
        raise InputError(f"{folder}: is no run of dream.py train (none of {', '.join(RUN_FILES)})")
    contents = read_run(folder, "settings", "heads", "results", "checkpoints")
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # a kill may leave half a line
    records = [json.loads(line) for line in lines]
    dev = {record["step"]: record["dev"]["ndcg@10"] for record in records if "dev" in record}
    return Run(folder, [r for r in records if not ("dev" in r or "aside" in r)], dev, *contents)


def plain(text: str) -> str:
    """Without what a browser or terminal would obey: controls, and marks that turn a text's direction."""
    return "".join(c if c.isprintable() else " " for c in text)


def cut(text: str, length: int) -> str:
    text = " ".join(plain(text).split())
    return text if len(text) <= length else text[:length].rstrip() + " …"


def known(value: Any) -> bool:
    return type(value) in (int, float) and figures.finite(value)


def decimals(value: object, places: int = 4) -> str:
    return f"{value:,.{places}f}" if known(value) else "–"


def opening(run: Run) -> Blocks:
    done, total = max((step["step"] for step in run.steps), default=0), run.settings.get("steps", 0)
    names = [name for name in ("objective", "judge", "retriever", "train") if run.settings.get(name)]
    told = "".join(f"{name}: {setting(name, run.settings[name])}; " for name in names)
    finished = 0 < done == total and (run.results.get("after") or not run.settings.get("test"))
    told += f"{done:,} of {total:,} steps" + ("." if finished else ", not finished.")
    if name := run.checkpoints.get("best") or run.checkpoints.get("last"):
        told += f" Checkpoint: {name}, dev NDCG@10 {decimals(run.dev.get(int(name[5:])))}."
    yield Heading(1, f"Run {run.folder.resolve().name}")
    yield told


def results(run: Run, args: Args) -> Blocks:
    """NDCG@10 of BM25, before and after training on each test dataset and its groups, and their means."""
    kinds = {"BM25": "bm25", "before": "before", "after": "after"}
    columns, rows = [run.results.get(kind, []) for kind in kinds.values()], []
    for row in zip_longest(*columns, fillvalue={}):  # there is no `after` until the end
        first = next(filter(None, row))
        rows.append((first["dataset"], first["queries"], [result.get("metrics", {}) for result in row]))
        for group, means in sorted(first.get("groups", {}).items()):
            parts = [result.get("groups", {}).get(group, {}) for result in row]
            rows.append((f"{first['dataset']}: {group}", means["queries"], parts))
    means = [average(column) for column in columns]
    rows += [(name, "", [own.get(name, {}) for own in means]) for name in means[0]]
    if not rows:
        return
    rows = [(name, count, [part.get("ndcg@10") for part in parts]) for name, count, parts in rows]
    cells = [[name, str(count), *map(decimals, scores)] for name, count, scores in rows]
    name, _, scores = rows[-1] if means[0] else rows[0]
    title = f"NDCG@10: {name}"
    yield Table("NDCG@10", ["dataset", "queries", *kinds], cells)
    yield Figure("results", title, figures.bars(title, list(kinds), scores))


def curves(run: Run, args: Args) -> Blocks:
    for name, title in CURVES.items():
        points = run.dev.items() if name == "dev" else [(step["step"], step.get(name)) for step in run.steps]
        points = [(step, value if known(value) else None) for step, value in points]  # None: a gap
        there = [(step, value) for step, value in points if value is not None]
        thin, width = len(points) // POINTS + 1, round(len(there) / 20)
        series: dict[str, Sequence[figures.Point]] = {title: points}
        if name not in ("dev", "lr") and width > 1:
            sums = [0.0, *accumulate(value for _, value in there)]
            means = [(sums[i] - sums[max(i - width, 0)]) / min(i, width) for i in range(1, len(sums))]
            smooth = [(step, mean) for (step, _), mean in zip(there, means, strict=True)]
            series = {"each step": points, f"mean of the last {width} steps": smooth}
        if there:
            series = {label: own[::thin] for label, own in series.items()}
            svg = figures.lines(title, series, xlabel="step", faint=("each step",), width=480)
            yield Figure(name, title, svg)


def heads(run: Run, args: Args) -> Blocks:
    """Only of the objective that injects weights into heads."""
    if run.heads.get("scores"):
        title = "Scores of the judge's heads"
        yield Figure("heads", title, figures.head_map(title, run.heads["scores"], run.heads["selected"]))
    if run.heads:
        rows = [[told, decimals(run.heads["report"][name], 2)] for name, told in HEADS.items()]
        yield Table("Can the selected heads teach?", ["on rows set aside", "value"], rows)


def queries(run: Run, args: Args) -> Blocks:
    """Those that gained most by training, and those that lost most or are found worst."""
    if not args.queries:
        return
    if not (name := args.dataset or next(iter(run.settings.get("test", [])), None)):
        raise InputError("the run has no test dataset, --dataset NAME chooses one")
    if not run.checkpoints:
        raise InputError("the run has no checkpoint yet")
    dataset = resolve_datasets(expand_names([name])[0])[0]
    embedder = load_embedder(run.folder, args.device)
    hits = yardstick.dense_hits(embedder, dataset, DEPTH + yardstick.MARGIN)
    result, ranked = yardstick.evaluate_hits(dataset, hits, DEPTH, per_query=True)
    scores = result["ndcg@10_per_query"]
    numbers = {hits.doc_ids[i]: i for row in hits.indices for i in row.tolist() if i >= 0}
    measured = [r for r in run.results.get("before", []) if r["fingerprint"] == result["fingerprint"]]
    before = measured[0].get("ndcg@10_per_query") if measured else None
    gain = {query: score - (before[query] if before else 0.0) for query, score in scores.items()}
    best = [q for q in sorted(gain, key=lambda q: (-gain[q], q)) if gain[q] > 0][: (args.queries + 1) // 2]
    worst = sorted(gain.keys() - set(best), key=lambda q: (min(gain[q], 0.0), scores[q], q))

    def found(query: str) -> Table:
        relevant = {doc_id for doc_id, judged in dataset.qrels[query].items() if judged > 0}
        ids, rows = list(ranked[query]), []
        for doc_id in ids[:SHOWN]:
            document = dataset.documents[numbers[doc_id]][1]
            text = cut(": ".join(filter(str.strip, (document.title, document.text))), 180)
            rows.append(["✓ " * (doc_id in relevant) + text, f"{ranked[query][doc_id]:.3f}"])
        ranks = [rank for rank, doc_id in enumerate(ids, 1) if doc_id in relevant]
        note = f"NDCG@10 {scores[query]:.4f}" + (f", before {before[query]:.4f}" if before else "")
        first = f"rank {ranks[0]}" if ranks else f"none of the best {len(ids)}"
        note += f"; first relevant document: {first}"
        marked, title = [rank - 1 for rank in ranks if rank <= SHOWN], cut(dataset.queries[query], 240)
        return Table(title, ["best documents, ✓ relevant", "cosine"], rows, marked=marked, note=note)

    names = ("Gained most", "Lost most, or still found worst") if before else ("Found best", "Found worst")
    yield f"Of the {len(dataset.qrels):,} queries of {dataset.name}."
    for name, chosen in zip(names, (best, worst[: args.queries // 2]), strict=True):
        if chosen:
            yield Heading(3, name)
            yield from map(found, chosen)


def speed(run: Run, args: Args) -> Blocks:
    if not run.steps:
        return
    seconds, tokens = [step["time"]["seconds"] for step in run.steps], [step["tokens"] for step in run.steps]
    of_retriever = sum(step.get("retriever_tokens", 0) for step in run.steps)  # older runs do not tell
    rates = [count / time for count, time in zip(tokens, seconds, strict=True) if time > 0]
    facts = {
        "tokens a second, median": decimals(statistics.median(rates), 0),
        "seconds a step, median": decimals(statistics.median(seconds), 3),
        "minutes of all steps, without evaluation and saving": decimals(sum(seconds) / 60, 1),
        "steps": decimals(len(run.steps), 0),
        "steps skipped, loss or gradient not finite": decimals(sum("skipped" in s for s in run.steps), 0),
        "tokens read by retriever and judge": decimals(sum(tokens), 0),
        "tokens read by the retriever": decimals(of_retriever or None, 0),
        "document tokens cut from prompts": decimals(sum(s["document_tokens_cut"] for s in run.steps), 0),
    }
    yield Table("Training", ["measure", "value"], list(map(list, facts.items())))


def setting(name: str, value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(setting(name, item) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value in (None, "") or not value and name in UNGIVEN:
        return "none"
    templates = {text: name for name, text in TEMPLATES.items()}
    text = public_name(value) if name in {*INPUTS, "heads"} else templates.get(value, str(value))
    return json.dumps(text, ensure_ascii=False) if text != text.strip() or "\n" in text else text


def settings(run: Run, args: Args) -> Blocks:
    """Grouped as in --help; marked are those that are not the default."""
    names = run.settings.keys() - {"resume", "change_settings", "overwrite"}  # of a call
    defaults, objective = vars(Settings()), run.settings.get("objective", "dream")
    defaults["temperature"] = OBJECTIVES[objective].temperature or run.settings.get("temperature")  # fitted
    for group, flags in sections(Settings).items():
        shown = Table(group.capitalize(), ["setting", "value"], [], 2, [])
        for name in (name for name in flags if name in names):
            value, default = setting(name, run.settings[name]), setting(name, defaults[name])
            changed = value != default and name not in INPUTS
            shown.marked.extend([len(shown.rows)] * changed)
            shown.rows.append([name, value + f" (default: {default})" * changed])
        if shown.rows:
            yield shown


def html(block: Block) -> str:
    def line(cells: list[str], kinds: list[str], more: str = "") -> str:
        parts = (f"<{k}>{escape(plain(cell))}</{k[:2]}>" for k, cell in zip(kinds, cells, strict=True))
        return f"<tr{more}>{''.join(parts)}</tr>"

    match block:
        case Heading(level, title):
            return f"<h{level}>{escape(plain(title))}</h{level}>"
        case Figure(_, _, svg):
            return f'<figure class="card">\n{svg}</figure>'
        case Table(caption, header, rows, left, marked, note):
            right = [' class="number"' * (column >= left) for column in range(len(header))]
            head = line(header, [f'th scope="col"{kind}' for kind in right])
            kinds = ['th scope="row"', *(f"td{kind}" for kind in right[1:])]
            body = [line(row, kinds, ' class="marked"' * (i in marked)) for i, row in enumerate(rows)]
            told = escape(plain(caption)) + f"<br><small>{escape(plain(note))}</small>" * bool(note)
            top = f'<div class="card"><table><caption>{told}</caption>\n<thead>{head}</thead><tbody>'
            return "\n".join([top, *body, "</tbody></table></div>"])
    return f"<p>{escape(plain(block))}</p>"


def markdown(block: Block, folder: str) -> str:
    def text(value: str) -> str:
        return re.sub(r"[\\`*\[\]<>|~$#]|\b_|_\b|&(?=#?\w+;)|^[-+=]", r"\\\g<0>", plain(value))

    match block:
        case Heading(level, title):
            return f"{'#' * level} {text(title)}"
        case Figure(name, title, _):
            return f"![{text(title)}]({quote(folder)}/{name}.svg)"
        case Table(caption, header, rows, left, marked, note):
            cells = [list(map(text, row)) for row in [header, *rows]]
            for number in marked:
                cells[number + 1][0] = f"**{cells[number + 1][0]}**"
            return "\n\n".join(filter(None, [f"**{text(caption)}**", text(note), table(cells, left)]))
    return text(block)


def report(args: Args) -> None:
    """Everything `main` does, InputError not caught."""
    out = Path(args.out or Path(args.run) / "report.html")
    if out.suffix != ".html":
        raise InputError(f"--out {out}: must end in .html")
    try:
        run = collect(Path(args.run))
        check_writable(out)
        blocks = list(opening(run))
        for section in (results, curves, heads, queries, speed, settings):
            try:
                own = list(section(run, args))
            except InputError as error:
                own = [f"Left out: {error}."]
            blocks += [Heading(2, section.__name__.capitalize()), *own] if own else []
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise InputError(f"{args.run}: its files are not as train writes them ({error!r})") from error
    for name, _, svg in (block for block in blocks if isinstance(block, Figure)):
        write_atomic(out.with_suffix("") / f"{name}.svg", svg)
    write_atomic(out.with_suffix(".md"), "\n\n".join(markdown(block, out.stem) for block in blocks) + "\n")
    head = HEAD.replace("NAME", escape(plain(run.folder.resolve().name)))
    write_atomic(out, "\n".join([head, *map(html, blocks), "</main></body></html>\n"]))
    print(f"written: {out}, {out.with_suffix('.md')}")


def main(argv: list[str] | None = None) -> int:
    """The exit status, as `run_command` says."""
    parser = ArgumentParser("report", description=__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's folder")
    add("--out", metavar="FILE.html", help="where (default: RUN/report.html); beside it FILE.md, FILE/*.svg")
    add("--dataset", metavar="NAME", help="of the queries, as in eval.py (default: the run's first test set)")
    add("--queries", type=limited(int, 0), default=10, metavar="N", help="how many (default: 10)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    args = parser.parse_args(argv)
    return run_command("report", lambda: report(args))


if __name__ == "__main__":
    sys.exit(main())
