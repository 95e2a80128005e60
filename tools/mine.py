"""Training rows from a corpus: candidates for questions with answers, or questions out of its text alone.

    python -m tools.mine --questions train-v1.1.json --window 45 --out rows.jsonl
    python -m tools.mine --corpus corpus.jsonl --questions questions.jsonl --out rows.jsonl
    python -m tools.mine --corpus corpus.jsonl --questions questions.jsonl --by runs/a --out again.jsonl
    python -m tools.mine --corpus corpus.jsonl --from-text --window 45 --out rows.jsonl
    python -m tools.mine --corpus corpus.jsonl --groups 16 --out groups.jsonl

A question is a JSON object a line, {"query", "answers", "passage_id": optional}, or one of SQuAD's .json,
whose paragraphs are the corpus. Its candidates are the source passage, where it is known, the best other
documents by BM25 or an embedder (--by), and random ones where these are too few; answers are not used to
choose them. It ends with how many targets the judge will find in a candidate as it sees them.

--window cuts documents into windows of so many words. The source is the best window of its passage that holds
the answer. The others come from other passages, at most one of each, and do not hold it.

--from-text cuts documents into passages of whole sentences. A sentence of each asks for a name, number or
rare phrase that is taken out of it. The other candidates do not hold it, and come from other documents if
there are enough. --groups writes rows of consecutive passages, for Revela.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from data import Document, Rows, shuffled
from eval import dense_hits
from formats.checkpoints import make_builder
from formats.datasets import Corpus, RetrievalDataset
from formats.embedders import load_embedder
from formats.templates import read_template
from related.bm25 import BM25
from support.files import InputError, JsonLines, check_writable, writing
from support.flags import limited
from support.launch import ArgumentParser, one_process, run_command
from support.runs import locate
from support.show import progress
from tools.questions import (
    PASSAGE_WORDS,
    Question,
    document_of,
    holds,
    passages,
    read_question,
    read_squad,
    text_questions,
    windows,
)

FEW = "; train needs at least 10"


Documents = Corpus | list[tuple[str, Document]]  # (id, document) by number


def write_corpus(documents: Documents, path: Path, cut: Callable[[str], Iterable[str]] | None) -> Corpus:
    """The documents as a corpus.jsonl; cut in parts, which follow one another and have the ids ID#N."""
    with writing(path) as file:
        for doc_id, document in progress(documents, desc="passages", unit="doc"):
            for number, text in enumerate(cut(document.text) if cut else [document.text]):
                name = f"{doc_id}#{number}" if cut else doc_id
                passage = {"_id": name, "title": document.title, "text": text}
                file.write(json.dumps(passage, ensure_ascii=False) + "\n")
    return Corpus(path)


def find_windows(questions: list[Question], documents: Documents, corpus: Corpus) -> list[Question]:
    """The questions with the windows of their passage that hold the target; left out are those without."""
    of_document: dict[str, list[int]] = {}
    for number in range(len(corpus)):
        of_document.setdefault(document_of(corpus, number), []).append(number)
    for question in questions:
        if question.passage is not None:
            own = of_document[documents[question.passage][0]]
            question.windows = [n for n in own if holds(corpus[n][1].text, question.target)]
    kept = [question for question in questions if question.passage is None or question.windows]
    if lost := len(questions) - len(kept):
        print(f"{lost:,} questions left out: no window of their passage holds the answer")
    return kept


def mine(args: argparse.Namespace) -> None:
    """Training rows from questions with answers or from text: each question's passage, where it is known, and
    the best other documents by BM25 or an embedder."""
    one_process("mine")
    check_writable(args.out)
    out = Path(args.out)
    documents: Documents
    questions = list[Question]()
    if not args.corpus:
        documents, questions = read_squad(Path(args.questions))
    else:
        path = Path(args.corpus)
        documents = Corpus(path / "corpus.jsonl" if path.is_dir() else path)
        if args.questions:
            numbers = {doc_id: number for number, doc_id in enumerate(documents.ids)}
            lines = JsonLines(Path(args.questions))
            questions = [read_question(lines, index, numbers, documents) for index in range(len(lines))]
    if args.limit:
        questions = [questions[i] for i in sorted(shuffled(len(questions), args.seed)[: args.limit])]
    cut: Callable[[str], Iterable[str]] | None = None
    if args.from_text or args.groups:
        cut = partial(passages, words=args.window or PASSAGE_WORDS)
    elif args.window:
        cut = partial(windows, size=args.window)
    if isinstance(documents, Corpus) and cut is None:
        corpus = documents
    else:
        corpus = write_corpus(documents, out.with_name(out.name + ".passages.jsonl"), cut)
    if args.window and args.questions:
        questions = find_windows(questions, documents, corpus)
    if args.groups:
        return write_groups(corpus, out, args.groups)
    if args.from_text:
        questions = text_questions(corpus, args.limit, args.seed)
    if not questions:
        raise InputError(f"{args.questions or args.corpus}: no questions")
    # Some hits are the source, or have a text that is there already; of cut documents many are passed over.
    wanted = 12 * args.candidates if cut else args.candidates + 4
    found = search(corpus, [q.query for q in questions], min(wanted, len(corpus)), args)
    without = 0
    with writing(out) as file:
        for question, hits in zip(progress(questions, desc="write", unit="row"), found, strict=True):
            best = [number for number in hits.tolist() if number >= 0]
            if question.passage is None and not best:
                without += 1
                continue
            candidates = candidate_documents(question, best, corpus, args, cut is not None)
            row: dict = {"query": question.query, "target": question.target, "source": question.source}
            row["documents"] = [{"title": d.title, "text": d.text} for d in candidates]
            row |= {} if question.passage is None else {"positive": 0}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if without:
        print(f"{without:,} questions left out: they share no word with any document")
    report_targets(args, out)


def search(corpus: Corpus, queries: list[str], k: int, args: argparse.Namespace) -> np.ndarray:
    """(Q, k) numbers of the best documents of each query by BM25 or the embedder --by; -1 beyond them."""
    if args.by == "bm25":
        texts = progress((d.full_text for _, d in corpus), total=len(corpus), desc="index", unit="doc")
        return BM25(texts).search(queries, k, quiet=False)[1]
    embedder = load_embedder(args.by, args.device, args.dtype)
    named, path = {str(number): query for number, query in enumerate(queries)}, Path(corpus.name)
    dataset = RetrievalDataset(path.name, "", path, named, {}, documents=corpus)
    return np.asarray(dense_hits(embedder, dataset, k).indices)


def candidate_documents(
    question: Question, hits: list[int], corpus: Corpus, args: argparse.Namespace, cut: bool
) -> list[Document]:
    """A question's candidates, --candidates if the corpus has as many, each text once.

    The source comes first, where it is known; with windows it is the best one that holds the target, by BM25
    among themselves if none is a hit. Then the hits, and random documents. cut: the corpus consists of parts
    of documents; then none but the source holds the target or is of its document (of text alone: unless
    there are too few others), and windows are of one document each.
    """
    passage, found = question.passage, dict[Document, None]()
    if question.windows:
        passage = next((number for number in hits if number in question.windows), None)
        if passage is None:
            index = BM25(corpus[number][1].full_text for number in question.windows)
            passage = question.windows[max(index.search([question.query], 1)[1].item(), 0)]
    taken = set[str]()  # documents of which no other part may come
    if passage is not None:
        found[corpus[passage][1]] = None
        if cut:
            taken.add(document_of(corpus, passage))
    for own_too in (False, True) if args.from_text else (False,):
        for number in chain(hits, at_random(len(corpus), f"{args.seed} {question.query}")):
            if len(found) == args.candidates:
                return list(found)
            owner = document_of(corpus, number)
            if number == passage or (owner in taken and not own_too):
                continue
            document = corpus[number][1]
            told = cut and passage is not None and holds(document.full_text, question.target)
            if not document.full_text or told:
                continue
            found[document] = None
            if cut and not args.from_text:
                taken.add(owner)
    return list(found)


def at_random(count: int, seed: str) -> Iterator[int]:
    """Random numbers below `count`, and at last every one that chance may have passed over."""
    generator = random.Random(seed)
    yield from (int(generator.random() * count) for _ in range(count))
    yield from range(count)


def write_groups(corpus: Corpus, out: Path, size: int) -> None:
    """Rows of so many passages that follow one another, without question and target: Revela's."""
    if len(corpus) < size:
        raise InputError(f"--groups {size}: the corpus has {len(corpus):,} passages only")
    with writing(out) as file:
        for first in range(0, len(corpus) - size + 1, size):
            documents = [corpus[i][1] for i in range(first, first + size)]
            row = {"documents": [{"title": d.title, "text": d.text} for d in documents]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    rows = len(corpus) // size
    print(f"{out}: {rows:,} rows of {size} passages, for train --objective revela{FEW * (rows < 10)}")


def report_targets(args: argparse.Namespace, path: Path) -> None:
    """How many targets occur, letter by letter, in a candidate as the judge will see it, per source."""
    template = read_template(args.judge_template)
    builder = make_builder(locate(args.judge, weights=False), template, args.judge_context, args.max_target)
    rows, sources = Rows(path), JsonLines(path)
    table: dict[str, list[int]] = {}
    for first in progress(range(0, len(rows), 256), desc="targets", unit="x256 rows"):
        some = [rows[i] for i in range(first, min(first + 256, len(rows)))]
        for row, prompt in zip(some, builder.build(some), strict=True):
            seen = [builder.tokenizer.decode(prompt.input_ids[s:e]).lower() for s, e in prompt.spans]
            holds = [row.target.lower() in text for text in seen]
            counts = table.setdefault(sources[row.index].get("source", "all"), [0] * 6)
            of_source = row.positive is not None and holds[row.positive]
            for i, count in enumerate(
                (1, row.positive is not None, any(holds), of_source, prompt.tokens_cut > 0, prompt.target_cut)
            ):
                counts[i] += count
    kept = f"{len(rows):,} rows, {rows.skipped:,} with a single candidate left out in training"
    print(f"{path}: {kept}{FEW * (len(rows) < 10)}")
    print(f"targets that occur in the candidates as {args.judge} sees them, in {builder.context:,} tokens:")
    width = max(len("source"), *map(len, table))
    print(f"{'source':{width}}{'rows':>10}{'in any':>10}{'in source':>12}{'docs cut':>10}{'target cut':>12}")
    for name, counts in sorted(table.items()):
        total, known, *rest = counts
        shares = [f"{count / total:.1%}" for count in rest]
        shares[1] = f"{rest[1] / known:.1%}" if known else "-"  # of the rows whose source is known
        print(f"{name:{width}}{total:>10,}{shares[0]:>10}{shares[1]:>12}{shares[2]:>10}{shares[3]:>12}")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """The exit status, as `run_command` says."""
    parser = ArgumentParser("mine", description=__doc__)
    add, count, demo = parser.add_argument, limited(int, 1, 10**9), Path(__file__).parent.parent / "demo"
    add("--corpus", metavar="PATH", help="corpus.jsonl {_id, title, text}, or its folder")
    asked = "jsonl {query, answers, passage_id: optional}; or SQuAD's .json, without --corpus"
    add("--questions", metavar="FILE", help=asked)
    window = "candidates are windows of so many words, the source around its answer; of text: whole sentences"
    add("--window", type=limited(int, 2, 10**9), metavar="WORDS", help=window)
    asked = "no questions: a sentence of each passage asks for a phrase blanked out of it"
    add("--from-text", action="store_true", help=asked)
    add("--groups", type=count, metavar="N", help="no questions: rows of N consecutive passages, for Revela")
    add("--out", required=True, metavar="FILE", help="where the rows are written")
    add("--by", default="bm25", help="who finds candidates: bm25, or an embedder (default: %(default)s)")
    add("--limit", type=count, metavar="N", help="a random sample of so many questions")
    documents = "documents per query (default: %(default)s)"
    add("--candidates", type=limited(int, 2), default=8, metavar="N", help=documents)
    judge = "checkpoint whose tokens the report counts in (default: the demo's)"
    add("--judge", default=str(demo / "checkpoint"), metavar="NAME", help=judge)
    add("--judge-template", default="plain", help="its prompt: plain, qwen, qwen3, llama, or a file")
    context = "tokens of a prompt (default: the judge's, at most 8192)"
    add("--judge-context", type=count, default=0, metavar="N", help=context)
    add("--max-target", type=count, default=32, metavar="N", help="target tokens used (default: %(default)s)")
    add("--seed", type=limited(int, 0), default=0, metavar="N", help="of everything drawn")
    add("--device", help="for --by: auto, cpu, cuda, cuda:1 (default: auto)")
    add("--dtype", help="for --by: auto, float32, bfloat16, float16 (default: auto)")
    args = parser.parse_args(argv)
    if sum(map(bool, (args.questions, args.from_text, args.groups))) != 1:
        parser.error("give one of --questions FILE, --from-text, --groups N")
    squad = (args.questions or "").endswith(".json")
    if squad and args.corpus:
        told = "a .json file is SQuAD's, and its paragraphs are the corpus: leave out --corpus"
        parser.error(f"--questions {args.questions}: {told} (or call JSON lines .jsonl)")
    if not squad and not args.corpus:
        parser.error("--corpus PATH is missing; only SQuAD's questions, FILE.json, bring their own")
    return run_command("mine", lambda: mine(args))


if __name__ == "__main__":
    sys.exit(main())
