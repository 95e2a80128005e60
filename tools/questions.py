"""Questions to mine candidates for: a user's own, SQuAD's file, or made out of text alone."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data import Document, shuffled
from formats.datasets import Corpus
from support.files import InputError, JsonLines, read_json
from support.show import progress

PASSAGE_WORDS = 100  # of whole sentences; a longer sentence is a passage by itself
WORD = re.compile(r"(?<![#&])\b\w+(?:['’-]\w+|[.,:/]\d+)*")  # O'Neil, 3:45 and 1,200 are one word each
RARE = 0.005  # a word of at most this share of the passages is rare, and one of at most two
AROUND = 12  # words of the sentence that are kept around a blank


@dataclass
class Question:
    query: str
    target: str
    source: str  # what the report counts it under
    passage: int | None  # number of the document asked about, where it is known
    windows: list[int] = field(default_factory=list)  # those of its passage that hold the target


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


def windows(text: str, size: int) -> Iterator[str]:
    """Windows of `size` words, each half a window after the one before; the last one ends with the text.

    Two neighbours share half of their words, so a short answer lies whole in one of them.
    """
    words = text.split()
    last = max(len(words) - size, 0)
    for start in [*range(0, last, size // 2), last]:
        yield " ".join(words[start : start + size])


def document_of(corpus: Corpus, number: int) -> str:
    """The id of the document that a passage or window is a part of."""
    return corpus.ids[number].rpartition("#")[0]


def holds(text: str, phrase: str) -> bool:
    """Whether the phrase occurs in the text as whole words, in any case and with any spaces."""
    pattern = r"\s+".join(map(re.escape, phrase.split()))
    return re.search(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE) is not None


def rare_phrases(sentence: str, counts: Counter[str], limit: int) -> list[tuple[int, int]]:
    """Where up to four rare words stand in a row, (start, end), rarest first.

    A rare word occurs in at most `limit` texts or has a digit: names, numbers, technical terms.
    """
    runs = list[list[re.Match]]()
    for word in WORD.finditer(sentence):
        if counts[word[0].lower()] > limit and not any(map(str.isdigit, word[0])):
            continue
        if runs and sentence[runs[-1][-1].end() : word.start()] == " ":
            runs[-1].append(word)
        else:
            runs.append([word])
    runs = [run for run in runs if len(run) <= 4 and run[-1].end() - run[0].start() >= 3]
    runs.sort(key=lambda run: min(counts[word[0].lower()] for word in run))
    return [(run[0].start(), run[-1].end()) for run in runs]


def blank_question(text: str, counts: Counter[str], limit: int, *seed: int) -> tuple[str, str] | None:
    """A query and a target out of a passage; None if it has none.

    The target is the rarest phrase of a sentence, the query the words around it, with "what" in its place.
    Which sentence is drawn by the seed. (Salient spans as in REALM, 2002.08909; cloze questions as in Lewis
    et al., 1906.04980.)
    """
    parts = sentences(text)
    for sentence in (parts[number] for number in shuffled(len(parts), *seed)):
        for start, end in rare_phrases(sentence, counts, limit):
            target, before, after = sentence[start:end], sentence[:start].split(), sentence[end:].split()
            before = before[-max(AROUND // 2, AROUND - len(after)) :]
            query = " ".join([*before, "what", *after[: AROUND - len(before)]])
            query = re.sub(r"\s+([,;:.!?)])", r"\1", query).strip(" .,;:!?") + "?"
            if len(query.split()) >= 5 and not holds(query, target):
                return query, target
    return None


def text_questions(corpus: Corpus, limit: int | None, seed: int) -> list[Question]:
    """A question for each passage of a corpus, or for `limit` of them, where there is one."""
    counts = Counter[str]()  # in how many passages each word occurs
    rare = max(round(RARE * len(corpus)), 2)
    for _, document in corpus:
        counts.update({word.lower() for word in WORD.findall(document.text)})
    chosen = shuffled(len(corpus), seed)[:limit] if limit else range(len(corpus))
    questions = []
    for number in progress(sorted(chosen), desc="questions", unit="passage"):
        drawn = blank_question(corpus[number][1].text, counts, rare, seed, number)
        if drawn is not None:
            questions.append(Question(*drawn, "text", number))
    print(f"{len(questions):,} questions out of {len(chosen):,} passages")
    return questions


def read_question(lines: JsonLines, index: int, numbers: dict[str, int], corpus: Corpus) -> Question:
    """A question with its target, its source and the number of the document asked about."""
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
    return Question(
        lines.text(index, value, key),
        target.strip(),
        lines.text(index, value, "source", default="all"),
        None if passage is None else numbers[str(passage)],
    )


def read_squad(path: Path) -> tuple[list[tuple[str, Document]], list[Question]]:
    """The paragraphs (id, document) and questions of a file in SQuAD's JSON, v1.1 or v2.0.

    The shortest answer is the target. Questions without an answer are left out, and counted. Raises
    InputError, with the place in the file, for what is missing or of another type.
    """

    def get(place: str, value: Any, key: str, kind: type) -> Any:
        found = value.get(key) if isinstance(value, dict) else None
        found = found.strip() if isinstance(found, str) else found
        if isinstance(found, kind) and found != "":
            return found
        wrong = f"{key!r} is missing" + f" or not a {kind.__name__}" * bool(found)
        raise InputError(": ".join(filter(None, (str(path), place, wrong))))

    def each(place: str, value: Any, key: str) -> Iterator[tuple[str, Any]]:
        for number, item in enumerate(get(place, value, key, list)):
            yield f"{place}.{key}[{number}]".lstrip("."), item

    paragraphs, questions, unanswerable = list[tuple[str, Document]](), list[Question](), 0
    for i, (of_article, article) in enumerate(each("", read_json(path), "data")):
        for j, (of_paragraph, paragraph) in enumerate(each(of_article, article, "paragraphs")):
            title = get(of_article, article, "title", str).replace("_", " ") if "title" in article else ""
            document = Document(title, get(of_paragraph, paragraph, "context", str))
            for place, asked in each(of_paragraph, paragraph, "qas"):
                query = get(place, asked, "question", str)
                answers = [get(at, answer, "text", str) for at, answer in each(place, asked, "answers")]
                if not answers or asked.get("is_impossible"):
                    unanswerable += 1
                else:
                    questions.append(Question(query, min(answers, key=len), "squad", len(paragraphs)))
            paragraphs.append((f"{i}.{j}", document))
    if unanswerable:
        print(f"{unanswerable:,} questions left out: they have no answer")
    if not questions:
        raise InputError(f"{path}: no questions")
    return paragraphs, questions
