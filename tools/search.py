"""Ask a retriever: the best documents of a corpus for a question, by exact search.

    python -m tools.search "Who taught Iris Vane?" --model runs/demo --corpus demo/dev
    python -m tools.search --model runs/mine --corpus path/to/corpus.jsonl.gz     asks for one after another
    python -m tools.search "Who taught Iris Vane?" --corpus demo/dev --explain "Greta Tollen"

Run it from the project's root. The corpus is encoded once; its embeddings are kept as by eval.py's
--embeddings, which may name the same folder, and memory-mapped: what fits stays in memory, the rest is
streamed from disk. Beside them lie the ids and offsets of a corpus.jsonl, and digests of corpus and weights.
They hold while the files have the same path, size and times of change (mtime, ctime); else the files are read
again, and what is in them decides which embeddings belong to them. So a later call reads no documents but
those that it shows. Documents rank as in eval.py. Results go to stdout, all else to stderr.

--explain is for runs of dream.py train. It shows as many documents as a row has candidates there (or --k),
and each one's weight among them, softmax(cosine / tau). With an ANSWER the judge reads all of them in one
prompt, best first (training shuffles them), and tells the loss of the answer in nats per token: with these
weights, with uniform ones, and with the whole weight on each document in turn. How far the last is below that
with uniform weights is the document's gain: how much it helps.
"""

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

import eval as yardstick
from attention import head_tensors, log_softmax_scores
from data import Document, Row
from dream import Settings, build_judge, make_reader, parse_arguments
from formats.catalogue import BEIR, RTEB, resolve_dataset
from formats.checkpoints import Checkpoint, make_builder
from formats.corpus import Corpus
from formats.datasets import RetrievalDataset
from formats.embedders import adapter_base, load_embedder, read_embedding_settings
from formats.kept import STORED, EmbeddingStore, fingerprint
from model import Embedder
from related.bm25 import BM25
from related.qrhead import read, read_heads, steering
from support.files import InputError, cache_folder, check_writable, state_digest, write_atomic
from support.flags import limited
from support.launch import ArgumentParser, pick_device, pick_dtype, run_command
from support.runs import DEFAULT_MODEL, locate, resolve_run
from support.show import progress

Find = Callable[[str, int], yardstick.Hits]  # (question, k) -> what is found for it


def utf8(text: str) -> str:
    """What is given or typed may hold bytes that are no text: "?" instead."""
    return text.encode(errors="replace").decode()


def open_corpus(name: str, index: Path | None = None) -> Corpus:
    """Of a public name, a dataset's folder or zip, or a corpus.jsonl(.gz, .xz) alone. Raises InputError.

    index: where a file's index is kept; without it, every document is read.
    """
    path = cache_folder() / name if name in BEIR else Path(name)
    if name not in ("demo", *RTEB):
        file = path / "corpus.jsonl" if path.is_dir() else path
        if file.is_file() and file.suffix != ".zip":
            return Corpus.indexed(file, index) if index else Corpus(file)
    return resolve_dataset(name, flag="--corpus").documents


def kept_fingerprint(embedder: Embedder, source: Path, folder: Path) -> str:
    """`fingerprint`, which reads all weights: a folder keeps it while the checkpoint stays as it is."""
    weights = read_embedding_settings(source)["transformer"]
    files = [*source.glob("*"), *weights.glob("*")]
    if (weights / "adapter_config.json").exists():
        files += locate(adapter_base(weights)).glob("*")
    how = f"{embedder.decoder.config}{embedder.describe()}{embedder.tokenizer.to_str()}"
    kept = folder / f"model-{state_digest(sorted(files), how)}.txt"
    if not kept.exists():
        write_atomic(kept, fingerprint(embedder))
    return kept.read_text()


def dense_search(embedder: Embedder, corpus: Corpus, folder: Path, dtype: torch.dtype, digest: str) -> Find:
    """Search in the embeddings that a folder keeps; those that are missing are made first."""
    total, step, name = len(corpus), yardstick.DOCUMENT_BLOCK, corpus.name
    # `dense_hits` fills the store; the query is there for nothing else.
    dataset = RetrievalDataset(name, "", Path(name), {"query": "query"}, {}, documents=corpus)
    store = EmbeddingStore(folder, embedder, dataset, dtype, digest)
    blocks = [(start, min(start + step, total)) for start in range(0, total, step)]
    if not all(store.holds(*block) for block in blocks):
        yardstick.dense_hits(embedder, dataset, 1, document_block=step, store=store)
    print(f"{name}: {total:,} documents, embeddings in {store.folder}", file=sys.stderr)
    embeddings = [store.read(*block) for block in blocks]  # (n, C) each, views of their files

    def find(question: str, k: int) -> yardstick.Hits:
        query = embedder.encode([question], "query")  # (1, C)
        best = yardstick.search(query, query[:0], k)  # nothing yet
        for (start, _), block in zip(blocks, embeddings, strict=True):
            # Small tiles: one query is a stream through the processor's caches.
            best = yardstick.search(query, block, k, document_tile=2048, offset=start, best=best)
        scores, indices = best
        return yardstick.Hits(scores.cpu().numpy(), indices.cpu().numpy(), corpus.ids)

    return find


def bm25_search(corpus: Corpus) -> Find:
    texts = (
        document.full_text for _, document in progress(corpus, desc="index", total=len(corpus), unit="doc")
    )
    index = BM25(texts)
    return lambda question, k: yardstick.Hits(*index.search([question], k), corpus.ids)


def best_documents(find: Find, corpus: Corpus, question: str, k: int) -> list[dict]:
    """At most k, in eval.py's order: {"rank", "score", "id", "title", "text"}."""
    hits = find(question, min(k + yardstick.MARGIN, len(corpus)))
    numbers = {corpus.ids[number]: number for number in hits.indices[0].tolist() if number >= 0}
    run, _ = yardstick.make_run([question], hits, k, keep_identical_ids=True)
    return [
        {"rank": rank, "score": score, "id": doc_id, **vars(corpus[numbers[doc_id]][1])}
        for rank, (doc_id, score) in enumerate(run[question].items(), 1)
    ]


def judged_settings(model: str) -> Settings:
    """The settings of the run that --model is, or is a checkpoint of. Raises InputError."""
    run = Path(model) if (Path(model) / "checkpoints.json").exists() else Path(model).parent
    if not all((run / f"{name}.json").is_file() for name in ("checkpoints", "settings", "heads")):
        raise InputError(
            f"--model {model}: no heads.json of a judge; --explain needs a run of dream.py train"
        )
    return parse_arguments(["train", "--resume", str(run)])


@torch.no_grad()
def explain(args: argparse.Namespace, settings: Settings, question: str, found: list[dict]) -> dict:
    """Add to each document its "weight" and, with an answer, "loss" and "gain"; see the top of this file.

    Returns {"answer", "loss" with these weights, "uniform_loss"}, or {} without an answer.
    """
    device = pick_device(args.device)
    scores = torch.tensor([[hit["score"] for hit in found]], device=device)  # (1, N)
    log_weights = log_softmax_scores(scores, scores.isfinite(), settings.temperature)
    for hit, weight in zip(found, log_weights[0].exp().tolist(), strict=True):
        hit["weight"] = weight
    if not args.explain:
        return {}
    checkpoint = Checkpoint(locate(settings.judge), device, pick_dtype(args.dtype, device)[0])
    judge = build_judge(settings, checkpoint, resolve_run(args.model))
    heads = head_tensors(read_heads(Path(settings.out) / "heads.json", checkpoint.config)[0], device)
    documents = [Document(hit["title"], hit["text"]) for hit in found]
    how = settings.judge_template, settings.judge_context, settings.max_target
    builder = make_builder(checkpoint.folder, *how)
    reader = make_reader(settings, judge, builder, device)
    prompts = builder.build([Row(0, question, args.explain, documents, None, "--explain")])
    batch, prefix = read(reader, prompts, settings.inject_rows)

    def loss(log_weights: Tensor) -> float:
        return reader.loss(batch, log_weights, heads, prefix).item()

    uniform = loss(torch.zeros_like(log_weights).log_softmax(-1))
    for hit, alone in zip(found, steering(reader, batch, prefix, heads)[0], strict=True):
        hit |= {"loss": alone.item(), "gain": uniform - alone.item()}
    return {"answer": args.explain, "loss": loss(log_weights), "uniform_loss": uniform}


def questions(given: str | None) -> Iterator[str]:
    """The one that is given, or those that are typed until an empty line, Ctrl-D or Ctrl-C."""
    if given is not None:
        yield given
        return
    with suppress(ImportError):
        import readline  # noqa: F401, lines can then be edited and recalled
    prompt = "question: " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    try:
        while question := utf8(input(prompt)).strip():
            yield question
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
    except UnicodeDecodeError as error:
        raise InputError(f"the question is not {error.encoding}") from error


def show(found: list[dict], summary: dict, full: bool) -> None:
    """For a terminal: of each passage about four lines, or all of it."""

    def plain(text: str) -> str:  # a corpus may hold what a terminal would obey
        return "".join(c if c.isprintable() else " " for c in text)

    width, lines = max(shutil.get_terminal_size().columns, 40) - 5, None if full else 4
    for hit in found:
        name = f"{plain(hit['title'])}  [{plain(hit['id'])}]".strip()
        print(f"{hit['rank']:3}  {hit['score']:.4f}  {name}")
        alone = f"   all weight here: loss {hit['loss']:.3f}, gain {hit['gain']:+.3f}" if summary else ""
        print(f"     weight {hit['weight']:.4f}{alone}\n" if "weight" in hit else "", end="")
        passage = textwrap.wrap(plain(hit["text"]), width, max_lines=lines, placeholder=" ...")
        print("".join(f"     {line}\n" for line in passage), end="")
    if summary:
        print(
            f"{plain(summary['answer'])!r}: loss {summary['loss']:.3f} with these weights, "
            f"{summary['uniform_loss']:.3f} with uniform ones"
        )
    print("" if found else "no document shares a word with the question\n", end="", flush=True)


def search(args: argparse.Namespace) -> None:
    """Everything `main` does, InputError not caught."""
    if args.question is not None and not args.question.strip():
        raise InputError("the question is empty")
    if args.explain and args.question is None:
        raise InputError("--explain ANSWER needs its question on the command line")
    settings = None if args.explain is None else judged_settings(args.model)
    k = args.k or (settings.candidates if settings else 10)
    if args.model == "bm25":
        corpus = open_corpus(args.corpus)
        find = bm25_search(corpus)
    else:
        folder = Path(args.embeddings or cache_folder() / "embeddings")
        check_writable(folder, folder=True)
        corpus = open_corpus(args.corpus, index=folder)
        source = locate(args.model)
        embedder = load_embedder(source, args.device, args.dtype, args.max_length)
        digest = kept_fingerprint(embedder, source, folder)
        find = dense_search(embedder, corpus, folder, STORED[args.embeddings_dtype], digest)
    for question in questions(args.question):
        found = best_documents(find, corpus, question, k)
        summary = explain(args, settings, question, found) if settings else {}
        if args.json:
            answer = {"question": question, "hits": found} | summary
            print(json.dumps(answer, ensure_ascii=sys.stdout.encoding != "utf-8"), flush=True)
        else:
            show(found, summary, args.full)


def main(argv: list[str] | None = None) -> int:
    """The exit status, as `run_command` says."""
    parser = ArgumentParser("search", description=__doc__)
    add = parser.add_argument
    asked = "without it, questions are asked for one after another"
    add("question", nargs="?", type=utf8, help=asked)
    model = "a run, a checkpoint, or bm25 (default: %(default)s)"
    add("--model", default=DEFAULT_MODEL, help=model)
    corpus = "folder with corpus.jsonl, such a file (.gz, .xz), or name as in eval.py (default: %(default)s)"
    add("--corpus", default="demo", metavar="NAME", help=corpus)
    count = "documents shown (default: 10; with --explain as said above)"
    add("--k", type=limited(int, 1), metavar="N", help=count)
    add("--full", action="store_true", help="show whole passages")
    add("--json", action="store_true", help="print a JSON object a question, each on a line")
    told = "the weight of each document, and how much it helps the judge to predict ANSWER"
    add("--explain", nargs="?", const="", type=utf8, metavar="ANSWER", help=told)
    add("--embeddings", metavar="DIR", help="where embeddings are kept (default: $DREAM_CACHE/embeddings)")
    kept = "as what they are kept (default: %(default)s; half precision halves the disk)"
    add("--embeddings-dtype", choices=list(STORED), default="float32", help=kept)
    length = "tokens kept of each text (default: the checkpoint's)"
    add("--max-length", type=limited(int, 1), metavar="N", help=length)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    add("--dtype", default="auto", help="compute dtype: auto, float32, bfloat16, float16 (default: auto)")
    args = parser.parse_args(argv)
    return run_command("search", lambda: search(args))


if __name__ == "__main__":
    sys.exit(main())
