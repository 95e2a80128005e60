"""The inputs: training rows, judge prompts with document spans, and the batches of a training step.

Everything read from outside is checked here, once, with the file and the line in the message; inside, data is
trusted. Large files stay on disk: a JSON-lines file is an array of line offsets, and a line is parsed when it
is asked for. This file never scores or trains.

A training row, one JSON object a line (.jsonl, also .gz and .xz):
    {"query": "...", "target": "...", "documents": ["...", {"title": "...", "text": "..."}], "positive": 0}
`target` is the output that the judge predicts; `positive`, the index of the relevant document, is optional:
no training loss of DREAM reads it, only the selection of heads and the reports do. Rows of FlagEmbedding
("pos", "neg") and Tevatron ("positive_passages", "negative_passages") are read too, when they have a target:
their candidates are the first positive, then the negatives.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from support.files import InputError, JsonLines
from support.show import progress


@dataclass(frozen=True)
class Document:
    title: str
    text: str

    @property
    def full_text(self) -> str:
        """What the retriever embeds, as BEIR joins them."""
        return f"{self.title} {self.text}".strip()


@dataclass
class Row:
    index: int
    query: str
    target: str
    documents: list[Document]
    positive: int | None  # index into documents
    where: str = ""  # file and line, for messages


class Rows:
    """Training rows from a file; all are checked at the start, parsed again when used.

    num_candidates: at most so many documents of a row are used, the first ones (a mined row lists its best
    first). Equal documents count once. A row that keeps fewer than two candidates teaches nothing: it is left
    out, and counted in `skipped`. documents_only: rows need no query and no target (Revela reads neither).
    Raises InputError for anything malformed.
    """

    def __init__(self, path: str | Path, num_candidates: int | None = None, documents_only: bool = False):
        self.path, self.num_candidates, self.documents_only = Path(path), num_candidates, documents_only
        self._lines = JsonLines(self.path)
        self.fingerprint = self._lines.fingerprint
        rows = (self._parse(i) for i in range(len(self._lines)))
        self._kept = array("q", (row.index for row in rows if len(row.documents) > 1))
        self.skipped = len(self._lines) - len(self._kept)
        if not self._kept:
            raise InputError(
                f"{self.path}: no row with a query, a target and at least two different documents"
            )

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Row:
        return self._parse(self._kept[index])

    def _parse(self, index: int) -> Row:
        lines, value = self._lines, self._lines[index]
        where = lines.where(index)
        target = next((value[key] for key in ("target", "answer", "output") if value.get(key)), None)
        if isinstance(target, list) and target:
            target = target[0]
        if self.documents_only:
            target = ""
        elif not isinstance(target, str) or not target.strip():
            raise InputError(
                f"{where}: no target; give the output to predict as 'target' (or 'answer' or 'output')"
            )
        given, positive = self._candidates(where, value)
        position: dict[Document, int] = {}
        group = self.documents_only and "query" not in value  # of passages that belong together: all of them
        limit = None if group else self.num_candidates
        for number, document in enumerate(given):
            if isinstance(document, str):
                document = Document("", document.strip())
            elif isinstance(document, dict):
                title = document.get("title") or ""
                if not isinstance(title, str):
                    raise InputError(f"{where}: the title of document {number} is not a string")
                document = Document(title.strip(), lines.text(index, document, "text", default=""))
            else:
                raise InputError(f"{where}: document {number} is neither a string nor an object with 'text'")
            if not document.full_text:
                raise InputError(f"{where}: document {number} is empty")
            if limit is None or len(position) < limit or document in position:
                position.setdefault(document, len(position))
            if number == positive:
                positive_document = document
        documents = list(position)
        if positive is not None:
            positive = position.get(positive_document)  # None where num_candidates cut it off
        query = "" if self.documents_only else lines.text(index, value, "query")
        return Row(index, query, target.strip(), documents, positive, where)

    @staticmethod
    def _candidates(where: str, value: dict) -> tuple[list, int | None]:
        """The candidates of a row in any of the three forms, and which of them is known to be relevant."""
        for positives, negatives in (("pos", "neg"), ("positive_passages", "negative_passages")):
            if "documents" in value or positives not in value:
                continue
            relevant, others = value[positives], value.get(negatives) or []
            if not isinstance(relevant, list) or not relevant or not isinstance(others, list):
                raise InputError(f"{where}: {positives!r} and {negatives!r} must be lists, the first filled")
            return [relevant[0], *others], 0
        given, positive = value.get("documents"), value.get("positive")
        if not isinstance(given, list) or not given:
            raise InputError(
                f"{where}: no candidates; give them as 'documents', a list of strings or title/text "
                "(or as 'pos' and 'neg', or 'positive_passages' and 'negative_passages')"
            )
        if positive is not None and (type(positive) is not int or not 0 <= positive < len(given)):
            raise InputError(
                f"{where}: 'positive' is {positive!r}, expected an index into {len(given)} documents"
            )
        return given, positive


def text_digest(text: str) -> int:
    """A 64-bit number that tells texts apart, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def longest_token(tokenizer: Tokenizer) -> int:
    """Characters of the longest token; of a text that is cut, so many per kept token are all that matter."""
    return max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)


# The prompt begins with words of no document: language models park attention on their first tokens, and were
# those in a document's span, that document's share would be nothing but the park.
TEMPLATE = "Read the documents and answer the question.\n\n{documents}Question: {query}\nAnswer: {target}"


def document_block(document: Document) -> str:
    """A document as the judge reads it; all of it lies inside the document's span."""
    title = f"{document.title}\n" if document.title else ""
    return f"Document: {title}{document.text}\n\n"


@dataclass
class Prompt:
    """One query's prompt as token ids. spans[i] = [start, end) of candidate i, wherever it stands."""

    input_ids: list[int]  # instruction, documents, question, target
    spans: list[tuple[int, int]]
    question_start: int  # the first token after the documents
    target_start: int  # the first token of the target
    target_cut: bool  # the target was longer than max_target
    tokens_cut: int  # document tokens dropped to fit the context


class PromptBuilder:
    """Builds judge prompts from token ids, segment by segment, and records spans while it does.

    Each segment (instruction, each document, question, target) is tokenised on its own, without special
    tokens; a BOS, if the judge has one, stands once at the front. Documents are cut to fit `context`, longest
    first; the query and the instruction never are. Raises InputError where a prompt cannot fit.
    """

    MIN_DOCUMENT_TOKENS = 16  # below this a block holds little more than its marker and its title

    def __init__(
        self,
        tokenizer: Tokenizer,
        context: int,
        max_target: int = 32,
        template: str = TEMPLATE,
        bos_id: int | None = None,
    ):
        self.tokenizer, self.context, self.max_target = tokenizer, context, max_target
        self.template = template
        self._characters = (context + 1) * longest_token(tokenizer)
        if any(template.count(name) != 1 for name in ("{documents}", "{query}", "{target}")):
            raise InputError("the judge template must hold {documents}, {query} and {target} once each")
        instruction, rest = template.split("{documents}")
        if "{query}" not in rest or not rest.split("{query}")[1].endswith("{target}"):
            raise InputError("the judge template must hold {documents}, then {query}, and end with {target}")
        if not instruction.strip():
            raise InputError("the judge template must begin with words of its own, before {documents}")
        for marker in re.findall(r"<\|\w+\|>", template):
            if tokenizer.token_to_id(marker) is None:
                raise InputError(
                    f"the judge template holds {marker}, which the judge's tokenizer does not know; "
                    "choose the --judge-template of this judge's family"
                )
        # Only the template may hold special tokens: a document that spells one out gets its letters' tokens.
        # They also end a segment, so the words next to the query are tokenised together with it.
        before, after = rest.removesuffix("{target}").split("{query}")
        added = tokenizer.get_added_tokens_decoder().values()
        pattern = re.compile("|".join(re.escape(t.content) for t in added if t.special) or "(?!)")
        last = max((match.end() for match in pattern.finditer(before)), default=0)
        first = match.start() if (match := pattern.search(after)) else len(after)
        self._before_query, self._after_query = before[last:], after[:first]
        self._target_space = ""
        if first == len(after):  # byte-level tokens carry the space in front of a word
            self._after_query = after.rstrip(" ")
            self._target_space = after[len(self._after_query) :]
            # Llama 2's tokenizer puts a space before every text by itself: one is enough.
            bare, spaced = self._encode(["a", " a"])
            if bare != spaced and bare and str(tokenizer.id_to_token(bare[0])).startswith("\u2581"):
                self._target_space = self._target_space[1:]
        self._block_end = self._encode(["\n\n"])[0]
        self._bos = [bos_id] if bos_id is not None else []
        self._start = self._bos + self._encode([instruction], special=True)[0]
        self._question_ends = self._encode([before[:last], after[first:]], special=True)

    def _encode(self, texts: list[str], special: bool = False) -> list[list[int]]:
        """Token ids of each text; `special`: as the template's own, in which special tokens count."""
        self.tokenizer.encode_special_tokens = not special
        texts = [text[: self._characters] for text in texts]
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def build(self, rows: Sequence[Row], orders: list[list[int]] | None = None) -> list[Prompt]:
        """One prompt a row; orders[b] lists row b's candidates as they stand in it (default: as given)."""
        orders = orders or [list(range(len(row.documents))) for row in rows]
        documents = list(dict.fromkeys(document for row in rows for document in row.documents))
        blocks = dict(zip(documents, self._encode(list(map(document_block, documents))), strict=True))
        return [
            self._assemble(row, order, [blocks[document] for document in row.documents], *ends)
            for row, order, ends in zip(rows, orders, self._ends(rows), strict=True)
        ]

    def shuffled(self, rows: Sequence[Row], *seed: int) -> list[Prompt]:
        """One prompt a row, its candidates in an order that depends on the seed and the row alone."""
        return self.build(rows, [shuffled(len(row.documents), *seed, row.index) for row in rows])

    def plain(self, texts: list[str], max_length: int) -> list[list[int]]:
        """Each text by itself as a language model reads it, no template; at most max_length tokens."""
        return [(self._bos + ids)[:max_length] for ids in self._encode(texts)]

    def _ends(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], list[int]]]:
        """Each row's question and target, in tokens. Raises InputError for a target without any."""
        questions = self._questions([row.query for row in rows])
        targets = self._encode([self._target_space + row.target for row in rows])
        for row, question, target in zip(rows, questions, targets, strict=True):
            if not target:
                raise InputError(f"{row.where}: the target {row.target!r} has no tokens")
            yield question, target

    def _questions(self, queries: list[str]) -> list[list[int]]:
        """All that stands between the documents and the target, in tokens."""
        front, end = self._question_ends
        encoded = self._encode([self._before_query + query + self._after_query for query in queries])
        return [front + ids + end for ids in encoded]

    def check(self, rows: Sequence[Row]) -> int:
        """Raise InputError for a row whose prompt cannot be built; return how many targets will be cut."""
        cut = 0
        for row, (question, target) in zip(rows, self._ends(rows), strict=True):
            cut += len(target) > self.max_target
            taken = len(self._start) + len(question) + min(len(target), self.max_target)
            if taken + len(row.documents) * self.MIN_DOCUMENT_TOKENS > self.context:
                self.build([row])  # fits only if its documents are short
        return cut

    def with_query(self, prompts: list[Prompt], query: str) -> list[Prompt]:
        """The same prompts, documents and targets, with another query (QRHead's calibration asks "N/A")."""
        question = self._questions([query])[0]
        changed = []
        for prompt in prompts:
            head = prompt.input_ids[: prompt.question_start] + question
            target = prompt.input_ids[prompt.target_start :]
            changed.append(replace(prompt, input_ids=head + target, target_start=len(head)))
        return changed

    def _assemble(
        self, row: Row, order: list[int], blocks: list[list[int]], question: list[int], target: list[int]
    ) -> Prompt:
        target_cut, target = len(target) > self.max_target, target[: self.max_target]
        room = self.context - len(self._start) - len(question) - len(target)
        lengths = [len(block) for block in blocks]
        limit = fit_longest_first(lengths, room)
        if limit < min(self.MIN_DOCUMENT_TOKENS, max(lengths)):
            raise InputError(
                f"{row.where}: the judge's context of {self.context} tokens leaves {max(room, 0)} for its "
                f"{len(blocks)} documents; use fewer --candidates or a larger --judge-context"
            )
        input_ids = list(self._start)
        spans = [(0, 0)] * len(blocks)
        for candidate in order:
            block = blocks[candidate]
            if len(block) > limit:  # what is cut still ends as a block does
                block = block[: limit - len(self._block_end)] + self._block_end
            spans[candidate] = (len(input_ids), len(input_ids) + len(block))
            input_ids += block
        question_start = len(input_ids)
        input_ids += question
        cut = sum(max(length - limit, 0) for length in lengths)
        return Prompt(input_ids + target, spans, question_start, len(input_ids), target_cut, cut)


def check_prompts(rows: Rows, builder: PromptBuilder) -> None:
    """Every row's prompt must be buildable now, not after hours; prints how many targets are cut."""
    cut = 0
    for first in progress(
        range(0, len(rows), 1024), desc="check", unit="x1024 rows", hidden=len(rows) < 50_000
    ):
        cut += builder.check([rows[i] for i in range(first, min(first + 1024, len(rows)))])
    print(f"{cut:,} targets cut to {builder.max_target} tokens", flush=True)


def fit_longest_first(lengths: list[int], room: int) -> int:
    """The largest limit with sum(min(length, limit)) <= room: long documents share what short ones leave."""
    left, limit = room, 0
    for index, length in enumerate(sorted(lengths)):
        share = left // (len(lengths) - index)
        if length > share:
            return max(share, 0)
        left, limit = left - length, length
    return limit


def shuffled(count: int, *seed: int) -> list[int]:
    """A permutation of range(count) that depends on the seed numbers alone."""
    return np.random.default_rng(seed).permutation(count).tolist()


# A training step's rows, and what teaches the retriever on them


@dataclass
class Piece:
    """Rows of a step that an objective takes together, B of them with up to N candidates."""

    rows: list[Row]
    inputs: list  # what the objective reads of each row, in tokens
    queries: Tensor  # (B,) int64, numbers of their queries among the batch's texts
    candidates: Tensor  # (B, N) int64, numbers of their documents among the batch's texts
    present: Tensor  # (B, N) bool, which candidates exist
    positives: Tensor  # (K, 2) int64, row and candidate of each known relevant document


@dataclass
class Batch:
    """This process's share of a step, in tokens: made in the background while the step before it runs."""

    indices: list[int]  # of all processes' rows in their file; sums over rows are divided by their number
    pieces: list[Piece]
    token_ids: list[list[int]]  # of the distinct texts, for the retriever: first the queries, then documents
    num_queries: int
    digests: Tensor  # (D,) int64, of the documents' texts
    tokens: int  # that the objective reads
    tokens_cut: int  # document tokens that prompts dropped to fit the judge's context


class Objective(ABC):
    """What teaches the retriever: `prepare` turns rows into what it reads, `loss` gives each row's loss.

    DREAM's is in dream.py, those of other papers in related/. The core never asks which one it is.
    """

    temperature = 0.05  # tau of softmax(cosine / tau) where the user gives none
    needs_judge = True  # a language model
    judge_may_learn = False
    judge_learns = False  # whatever the user says
    documents_only = False  # rows need no query and no target
    flags = ""  # those that only some objectives read, and this one does
    one_hot = False  # the weights are meant to be: no warning about the temperature
    in_batch_negatives = False  # the other rows' documents share the softmax
    together: int  # groups in a piece

    def check(self, rows: Rows, usable: list[int]) -> None:  # noqa: B027, nothing to check is the rule
        """Raise InputError for a row that it cannot use. usable: the numbers of those to train on."""

    def choose(self, aside: list[Row]) -> dict:
        """What is decided before the first step, on rows that are never trained on; {} for nothing."""
        return {}

    def use(self, path: Path) -> None:  # noqa: B027
        """Take up what `choose` decided, from the run's heads.json."""

    def group(self, rows: list[Row], least: int) -> list[list[Row]]:
        """Rows that belong in one piece; at least so many groups."""
        return [[row] for row in rows]

    @abstractmethod
    def prepare(self, rows: list[Row], seed: tuple[int, ...]) -> list[tuple[Any, int]]:
        """What it reads of each row, in tokens, and their number."""

    @abstractmethod
    def loss(self, piece: Piece, log_weights: Tensor, embeddings: Tensor, batch: Batch) -> Tensor:
        """The loss of each of a piece's rows, (B,).

        log_weights (B, N): log_softmax(cosine / tau), -inf where there is no candidate; with in-batch
        negatives their weights add up to less than 1. embeddings (U, C): of all the batch's texts, unit
        vectors. The gradient flows into both.
        """


@dataclass
class JudgeBatch:
    """Prompts as tensors, split where the graph begins: a prefix read without a graph, a suffix of injected
    rows.

    P, T: longest prefix and suffix; N: most candidates of a prompt; K: target tokens of all prompts together.
    All on one device, right-padded.
    """

    prefix_ids: Tensor  # (B, P)
    prefix_lengths: Tensor  # (B,)
    suffix_ids: Tensor  # (B, T) the rows after the prefix, up to the one that predicts the last target token
    documents: Tensor  # (B, P) the candidate each key belongs to, N for none
    present: Tensor  # (B, N) bool, which candidates exist
    target_rows: Tensor  # (K,) which of the B*T suffix rows predict target tokens
    target_ids: Tensor  # (K,) the tokens they predict
    target_owner: Tensor  # (B, K) float32: 1 where the prompt owns the target token


def collate(prompts: Sequence[Prompt], device: torch.device, rows: str = "target") -> JudgeBatch:
    """Tensors of some prompts. rows: "target": the query is in the prefix; "suffix": in the injected rows."""
    num_documents = max(len(prompt.spans) for prompt in prompts)
    starts = [prompt.target_start - 1 if rows == "target" else prompt.question_start for prompt in prompts]
    prefixes = [prompt.input_ids[:start] for prompt, start in zip(prompts, starts, strict=True)]
    suffixes = [prompt.input_ids[start:-1] for prompt, start in zip(prompts, starts, strict=True)]
    width = max(map(len, suffixes))
    documents, target_rows, target_ids = [], list[int](), []
    counts = [len(prompt.input_ids) - prompt.target_start for prompt in prompts]
    for number, (prompt, suffix, count) in enumerate(zip(prompts, suffixes, counts, strict=True)):
        owner = [num_documents] * len(prefixes[number])
        for candidate, (first, end) in enumerate(prompt.spans):
            owner[first:end] = [candidate] * (end - first)
        documents.append(owner)
        target_rows += range(number * width + len(suffix) - count, number * width + len(suffix))
        target_ids += prompt.input_ids[prompt.target_start :]
    present = torch.arange(num_documents) < torch.tensor([[len(prompt.spans)] for prompt in prompts])
    target_owner = torch.zeros(len(prompts), len(target_ids))
    owners = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts))  # (K,)
    target_owner[owners, torch.arange(len(target_ids))] = 1.0
    prefix_ids, prefix_lengths = pad(prefixes, device)
    return JudgeBatch(
        prefix_ids,
        prefix_lengths,
        pad(suffixes, device)[0],
        pad(documents, device, value=num_documents)[0],
        to_device(present, device),
        to_device(torch.tensor(target_rows), device),
        to_device(torch.tensor(target_ids), device),
        to_device(target_owner, device),
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without making the host wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def pad(
    token_ids: Sequence[Sequence[int] | np.ndarray], device: torch.device, value: int = 0
) -> tuple[Tensor, Tensor]:
    """Right-pad lists of ids: (B, T) int64 and their lengths (B,) int64."""
    lengths = [len(ids) for ids in token_ids]
    padded = np.full((len(lengths), max(lengths)), value, np.int64)
    for row, ids in zip(padded, token_ids, strict=True):
        row[: len(ids)] = ids
    return to_device(torch.from_numpy(padded), device), to_device(torch.tensor(lengths), device)


def token_batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices of texts in batches of similar length, longest first, each at most max_tokens when padded.

    A text longer than max_tokens is a batch of its own.
    """
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * width > max_tokens:
            batches.append([])
            width = max(lengths[index], 1)
        batches[-1].append(index)
    return batches
