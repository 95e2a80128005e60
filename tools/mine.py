"""Training rows from a corpus: candidates for questions with answers, or questions out of its text alone.

    python -m tools.mine --corpus corpus.jsonl --questions questions.jsonl --out rows.jsonl
    python -m tools.mine --corpus corpus.jsonl --questions questions.jsonl --by runs/a --out again.jsonl
    python -m tools.mine --corpus corpus.jsonl --from-text rest --out rows.jsonl
    python -m tools.mine --corpus corpus.jsonl --groups 16 --out groups.jsonl

A question is a JSON object a line, {"query", "answers", "passage_id": optional}. Its candidates are the
source passage, where it is known, and the best other documents by BM25 or an embedder (--by); answers are not
used to choose them. It ends with how many targets the judge will find in a candidate as it sees them.

--from-text cuts documents into passages of whole sentences and draws a question from each. "next": a sentence
asks, the one after it is the target, and the passage is shown without the one that asks. "rest": the first
words of a sentence ask for its last third. --groups writes rows of consecutive passages, for Revela.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

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

PASSAGE_WORDS = 100  # of whole sentences; a longer sentence is a passage by itself


def sentences(text: str) -> list[str]:
    """Cut after a full stop, question or exclamation mark, a space, and before a capital or a figure."""
    return [part for part in re.split(r"(?<=[.!?])\s+(?=[\"'(\[]?[A-Z0-9])", text.strip()) if part]


def passages(text: str, words: int = PASSAGE_WORDS) -> Iterator[str]:
    """A text in passages of whole sentences of about so many words."""
    held, count = list[str](), 0
    for sentence in sentences(text):
        length = len(sentence.split())
        if held and count + length > words:
            yield " ".join(held)
            held, count = [], 0
        held.append(sentence)
        count += length
    if held:
        yield " ".join(held)


def text_question(text: str, recipe: str, *seed: int) -> tuple[str, str, str] | None:
    """A query and a target out of a passage, and the passage as a candidate may show it; None if it has none.

    "next": a sentence asks, the sentence after it is the target, and the passage shows all but the one that
    asks. "rest": the first words of a sentence ask, its last third (up to eight words) is the target, and the
    passage stays whole. Which sentence is drawn by the seed. A target that the query gives away (it occurs
    there, or they share four words in a row) is passed over.
    """
    parts = sentences(text)
    for number in shuffled(len(parts), *seed):
        words = parts[number].split()
        if recipe == "next" and number + 1 < len(parts):
            query, target = parts[number], parts[number + 1]
            shown = " ".join(part for part in parts if part != parts[number])
        elif recipe == "rest":
            cut = len(words) - min(max(len(words) // 3, 1), 8)
            query, target, shown = " ".join(words[:cut]), " ".join(words[cut:]), text
        else:
            continue
        if len(query.split()) >= 4 and not _gives_away(query, target):
            return query, target, shown
    return None


def _gives_away(query: str, target: str) -> bool:
    query_words, target_words = (re.findall(r"\w+", text.lower()) for text in (query, target))
    size = min(4, len(target_words))
    runs = {tuple(query_words[i : i + size]) for i in range(len(query_words) - size + 1)}
    return not size or any(
        tuple(target_words[i : i + size]) in runs for i in range(len(target_words) - size + 1)
    )


def mine(args: argparse.Namespace) -> None:
    """Training rows from a corpus and questions with answers: the source passage, where it is known, and the
    best other documents by BM25 or an embedder. Answers are not used to choose candidates."""
    one_process("mine")
    check_writable(args.out)
    out, path = Path(args.out), Path(args.corpus)
    corpus = Corpus(path / "corpus.jsonl" if path.is_dir() else path)
    if args.from_text or args.groups:
        corpus = cut_into_passages(corpus, out)
    if args.groups:
        return write_groups(corpus, out, args.groups)
    if args.from_text:
        questions = text_questions(corpus, args)
    else:
        numbers = {doc_id: number for number, doc_id in enumerate(corpus.ids)}
        lines = JsonLines(Path(args.questions))
        questions = [read_question(lines, index, numbers, corpus) for index in range(len(lines))]
        if args.limit and args.limit < len(questions):
            questions = [questions[i] for i in sorted(shuffled(len(questions), args.seed)[: args.limit])]
    if not questions:
        raise InputError(f"{args.questions or args.corpus}: no questions")
    without = 0
    wanted = min(
        args.candidates + 4, len(corpus)
    )  # some are the source, or have a text that is there already
    queries = [question["query"] for question in questions]
    if args.by == "bm25":
        texts = tqdm((d.full_text for _, d in corpus), total=len(corpus), desc="index", unit="doc")
        _, found = BM25(texts).search(queries, wanted, quiet=False)
    else:
        embedder = load_embedder(args.by, args.device, args.dtype)
        named = {str(number): query for number, query in enumerate(queries)}
        dataset = RetrievalDataset(path.name, "", path, named, {}, documents=corpus)
        found = dense_hits(embedder, dataset, wanted).indices
    with writing(out) as file:
        for question, hits in zip(tqdm(questions, desc="write", unit="row"), found.tolist(), strict=True):
            candidates = candidate_documents(question, hits, corpus)[: args.candidates]
            documents = [{"title": d.title, "text": d.text} for d in candidates]
            if not documents:
                without += 1
                continue
            row = {key: question[key] for key in ("query", "target", "source")} | {"documents": documents}
            row |= {} if question["passage"] is None else {"positive": 0}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if without:
        print(f"{without:,} questions left out: they share no word with any document")
    report_targets(args, out)


def candidate_documents(question: dict, hits: list[int], corpus: Corpus) -> list[Document]:
    """A question's candidates, each text once: its source, where it is known, then the hits.

    Of a question from text, the passage's neighbours stand before the hits and random ones after them, and
    none of those may hold the query or the target.
    """
    source, shown = question["passage"], question.get("shown")
    numbers = [*question.get("neighbours", []), *hits, *question.get("spare", [])]
    others = [corpus[i][1] for i in numbers if i >= 0 and i != source]
    if shown is not None:
        others = [d for d in others if question["target"] not in d.text and question["query"] not in d.text]
    first = [] if source is None else [corpus[source][1]]
    if shown is not None:
        first = [replace(first[0], text=shown)]
    return [document for document in dict.fromkeys(first + others) if document.full_text]


def cut_into_passages(corpus: Corpus, out: Path) -> Corpus:
    """The corpus in passages of whole sentences, written beside the rows; a document's follow one another."""
    path = out.with_name(out.name + ".passages.jsonl")
    with writing(path) as file:
        for doc_id, document in tqdm(corpus, total=len(corpus), desc="passages", unit="doc"):
            for number, text in enumerate(passages(document.text)):
                passage = {"_id": f"{doc_id}#{number}", "title": document.title, "text": text}
                file.write(json.dumps(passage, ensure_ascii=False) + "\n")
    return Corpus(path)


def text_questions(corpus: Corpus, args: argparse.Namespace) -> list[dict]:
    """One question for each passage that has one, by the recipe of `--from-text`; of --limit passages."""
    chosen = shuffled(len(corpus), args.seed)[: args.limit] if args.limit else range(len(corpus))
    questions = []
    for number in tqdm(sorted(chosen), desc="questions", unit="passage"):
        drawn = text_question(corpus[number][1].text, args.from_text, args.seed, number)
        if drawn is None:
            continue
        query, target, shown = drawn
        owner = corpus.ids[number].rpartition("#")[0]
        near = [i for i in (number - 1, number + 1) if 0 <= i < len(corpus)]
        near = [i for i in near if corpus.ids[i].rpartition("#")[0] == owner]
        spare = random.Random(f"{args.seed} {number}").choices(range(len(corpus)), k=2 * args.candidates)
        found = {"query": query, "target": target, "source": "text", "passage": number}
        questions.append({**found, "shown": shown, "neighbours": near, "spare": spare})
    print(f"{len(questions):,} questions out of {len(chosen):,} passages")
    return questions


def write_groups(corpus: Corpus, out: Path, size: int) -> None:
    """Rows of so many passages that follow one another, without question and target: Revela's."""
    if len(corpus) < size:
        raise InputError(f"--groups {size}: the corpus has {len(corpus):,} passages only")
    with writing(out) as file:
        for first in range(0, len(corpus) - size + 1, size):
            documents = [corpus[i][1] for i in range(first, first + size)]
            row = {"documents": [{"title": d.title, "text": d.text} for d in documents]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{out}: {len(corpus) // size:,} rows of {size} passages, for train --objective revela")


def read_question(lines: JsonLines, index: int, numbers: dict[str, int], corpus: Corpus) -> dict:
    """A question with its target, its source and, as `passage`, the number of the document asked about."""
    value = lines[index]
    key = next((k for k in ("query", "question", "text") if k in value), "query")
    target = next((value[k] for k in ("target", "answer", "answers", "output") if value.get(k)), None)
    target = target[0] if isinstance(target, list) and target else target
    if not isinstance(target, str) or not target.strip():
        raise InputError(f"{lines.where(index)}: no answer; give it as 'answers', 'answer' or 'target'")
    passage = value.get("passage_id")
    if passage is not None and str(passage) not in numbers:
        raise InputError(f"{lines.where(index)}: passage_id {passage!r} is not in the corpus")
    if passage is not None and not corpus[numbers[str(passage)]][1].full_text:
        raise InputError(f"{lines.where(index)}: passage_id {passage!r} is an empty document of the corpus")
    return {
        "query": lines.text(index, value, key),
        "target": target.strip(),
        "source": lines.text(index, value, "source", default="all"),
        "passage": None if passage is None else numbers[str(passage)],
    }


def report_targets(args: argparse.Namespace, path: Path) -> None:
    """How many targets occur, letter by letter, in a candidate as the judge will see it, per source."""
    template = read_template(args.judge_template)
    builder = make_builder(locate(args.judge, weights=False), template, args.judge_context, args.max_target)
    rows, sources = Rows(path), JsonLines(path)
    table: dict[str, list[int]] = {}
    for first in tqdm(range(0, len(rows), 256), desc="targets", unit="x256 rows"):
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
    print(f"{path}: {len(rows):,} rows, {rows.skipped:,} with a single candidate left out in training")
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
    add("--corpus", required=True, metavar="PATH", help="corpus.jsonl {_id, title, text}, or its folder")
    add("--questions", metavar="FILE", help="jsonl {query, answers, passage_id: optional}")
    asked = "no questions: a sentence asks for the next, or for its rest"
    add("--from-text", choices=["next", "rest"], help=asked)
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
        parser.error("give one of --questions FILE, --from-text next|rest, --groups N")
    return run_command("mine", lambda: mine(args))


if __name__ == "__main__":
    sys.exit(main())
