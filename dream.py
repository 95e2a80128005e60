"""DREAM: train a retriever with nothing but a frozen language model's next-token loss.

    python dream.py train                                     the demo, on a CPU, into runs/demo
    python dream.py train --train rows.jsonl --judge Qwen/Qwen2.5-1.5B --retriever Qwen/Qwen2.5-0.5B --out a
    torchrun --nproc-per-node 8 dream.py train --train rows.jsonl --judge DIR --retriever DIR --out b
    python dream.py train --resume a                          go on where it stopped
    python dream.py train --objective infonce                 InfoNCE, REPLUG or Revela, all else equal
    python dream.py heads --train rows.jsonl --judge DIR --out heads.json
    python dream.py mine --corpus corpus.jsonl --questions questions.jsonl --out rows.jsonl

One training step:

    rows --tokenise--> queries, documents, targets
                         |
     retriever (chunks, no graph) --> embeddings, float32 --> leaves --> s = q.d --> log_softmax(s / tau)
                                                                ^                         |
     judge: prefix once, no graph --> keys, values per layer    |                         |
     judge: suffix rows --> attention of selected heads --------|-------------------------+--> logits --> loss
                                                                | backward: d loss / d embeddings
     retriever again, chunk by chunk with a graph  <------------+  --> LoRA gradients --> clip --> AdamW

The documents' rows of the judge never depend on the scores (its mask is causal and only later rows are
injected), so they are read once without a graph; below the first layer with a selected head nothing has a
graph at all. The judge sees the retriever only through the embeddings: they are leaves, and peak memory is
the larger of the two models, not their sum.

What DREAM is compared with takes the same way: an objective is a function from scored rows to losses. With
--judge-lora and for Revela the language model learns too, and nothing of it can be read without a graph.

DREAM's loss reads no labels, and its judge never changes; this file writes only into the run's folder.
"""

import argparse
import json
import math
import os
import random
import shlex
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from attention import CrossDocument, Injection, exact, isolated_documents
from data import (
    CandidatePool,
    Document,
    JudgeBatch,
    Prompt,
    PromptBuilder,
    Row,
    Rows,
    collate,
    pad,
    passages,
    shuffled,
    text_digest,
    text_question,
    to_device,
    token_batches,
)
from eval import bm25_hits, dense_hits, evaluate_embedder, evaluate_hits
from formats.catalogue import expand_names, resolve_datasets
from formats.checkpoints import Checkpoint, load_tokenizer, read_config
from formats.datasets import Corpus, RetrievalDataset
from formats.embedders import load_adapter, load_embedder, save_adapter, save_embedder
from formats.templates import read_template
from model import PROJECTIONS, Cache, CausalLM, Config, Embedder, Probe, add_lora
from related.bm25 import BM25
from support.files import (
    InputError,
    JsonLines,
    check_writable,
    inside,
    read_json,
    sync,
    write_atomic,
    writing,
)
from support.hub import find_folder
from support.launch import ArgumentParser, join_processes, one_ahead, pick_device, pick_dtype, run_command
from support.runs import resolve_run

DEMO = Path(__file__).resolve().parent / "demo"

# Of the texts in one forward pass: enough to fill a GPU, few enough to be of one length.
GROUP_TOKENS = {"cpu": 1024, "cuda": 4096}

Heads = list[tuple[int, int]]  # (layer, query head)

# The objectives, and the temperature at which each is published, or (DREAM, InfoNCE) ours.
TEMPERATURES = {"dream": 0.05, "infonce": 0.05, "replug": 0.1, "revela": 1e-4}


# The judge


def learns(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def read_prefix(judge: CausalLM, batch: JudgeBatch) -> Cache:
    """Keys and values of all before the injected rows: no score reaches them, so a frozen judge needs no
    graph."""
    cache = Cache(batch.prefix_lengths)
    visible = isolated_documents(batch.documents, batch.present.shape[1]) if batch.isolated else None
    with nullcontext() if learns(judge) else torch.no_grad():
        judge.model(batch.prefix_ids, store=cache, visible=visible)
    return cache


def target_loss(
    judge: CausalLM,
    batch: JudgeBatch,
    cache: Cache,
    injection: Injection | None = None,
    probe: Probe | None = None,
) -> Tensor:
    """Each prompt's mean next-token loss over its target tokens, (B,) float32, in nats."""
    hidden = judge.model(batch.suffix_ids, prefix=cache, injection=injection, probe=probe)  # (B, T, C)
    # Only the rows that predict target tokens reach the output projection: 152k words outweigh a layer.
    logits = judge.lm_head(hidden.flatten(0, 1)[batch.target_rows])  # (K, V)
    nll = F.cross_entropy(exact(logits), batch.target_ids, reduction="none")  # (K,)
    owner = batch.target_owner.to(nll.dtype)  # (B, K)
    return owner @ nll / owner.sum(-1)


def head_tensors(heads: Heads, device: torch.device) -> dict[int, Tensor]:
    """layer -> its heads, as the injection wants them; made once, so that no step waits for a copy."""
    layers = sorted({layer for layer, _ in heads})
    return {la: torch.tensor(sorted(h for other, h in heads if other == la), device=device) for la in layers}


def log_softmax_scores(scores: Tensor, present: Tensor, temperature: float) -> Tensor:
    """log w = log_softmax(s / tau) over each query's candidates, (B, N) float32; -inf where there is none."""
    return (exact(scores) / temperature).masked_fill(~present, -torch.inf).log_softmax(-1)


def dream_loss(
    judge: CausalLM,
    batch: JudgeBatch,
    log_weights: Tensor,
    heads: dict[int, Tensor],
    keep_budget: bool = True,
    cache: Cache | None = None,
) -> Tensor:
    """DREAM's objective: the target's loss, (B,), when `heads` read documents by the retriever's weights.

    log_weights: (B, N). Every suffix row of the batch is injected. cache: the prefix's, if read before.
    """
    injection = Injection(log_weights, batch.documents, heads, keep_budget)
    return target_loss(judge, batch, cache or read_prefix(judge, batch), injection)


def shuffled_prompts(builder: PromptBuilder, rows: Sequence[Row], *seed: int) -> list[Prompt]:
    """The rows' prompts, candidates in an order that depends on the seed and the row alone."""
    return builder.build(rows, [shuffled(len(row.documents), *seed, row.index) for row in rows])


# The objectives. Each takes scored rows and returns the loss of each, (B,)


@dataclass
class Scored:
    """Some rows of a step, B of them with up to N candidates, after the retriever has scored them."""

    rows: list[Row]
    judge_inputs: list  # what `judge_inputs` made of each row
    scores: Tensor  # (B, N) cosines; their graph ends at the embeddings
    log_weights: Tensor  # (B, N) log_softmax(s / tau), -inf where there is no candidate
    present: Tensor  # (B, N) bool
    queries: Tensor  # (B, C) embeddings
    candidates: Tensor  # (B, N) numbers of the candidates among `documents`
    documents: Tensor  # (D, C) embeddings of all documents of this process's step
    digests: Tensor  # (D, 1) int64, of their texts


def dream_objective(
    scored: Scored, judge: CausalLM, heads: dict[int, Tensor], args: argparse.Namespace
) -> Tensor:
    """DREAM: the target's loss when the scores decide which documents the heads read; see attention.py."""
    batch = collate(scored.judge_inputs, scored.scores.device, args.inject_rows)
    return dream_loss(judge, batch, scored.log_weights, heads, args.document_mass == "keep")


def infonce_objective(scored: Scored, args: argparse.Namespace) -> Tensor:
    """InfoNCE (arXiv 1807.03748): the cross-entropy of softmax(s / tau) with the marked document.

        -log( exp(s_+ / tau) / sum_j exp(s_j / tau) )

    over the row's candidates, or with --in-batch-negatives over all documents of the step, of all processes;
    equal texts count once. Needs the label that DREAM does without.
    """
    device = scored.scores.device
    logits = (exact(scored.scores) / args.temperature).masked_fill(~scored.present, -torch.inf)  # (B, N)
    if args.in_batch_negatives:
        own = scored.digests[scored.candidates, 0].unsqueeze(1)  # (B, 1, N)
        documents, digests = gather_rows(scored.documents), gather_rows(scored.digests)[:, 0]  # (M, C), (M,)
        others = exact(scored.queries @ documents.T) / args.temperature  # (B, M)
        repeated = (digests[:, None] == digests).tril(-1).any(1)  # (M,)
        known = ((own == digests[:, None]) & scored.present[:, None]).any(-1)  # (B, M)
        logits = torch.cat([logits, others.masked_fill(known | repeated, -torch.inf)], dim=1)
    positives = torch.tensor([row.positive for row in scored.rows])
    return F.cross_entropy(logits, to_device(positives, device), reduction="none")


def judge_likelihoods(scored: Scored, judge: CausalLM, likelihood: str) -> Tensor:
    """log p_judge(target | document, query), (B, N), one prompt a document; -inf where there is none.

    likelihood: "mean" per target token, or their "sum".
    """
    with torch.no_grad():
        batch = collate([p for prompts in scored.judge_inputs for p in prompts], scored.scores.device)
        losses = target_loss(judge, batch, read_prefix(judge, batch))  # (all candidates,)
        losses = losses * batch.target_owner.sum(-1) if likelihood == "sum" else losses
        missing = losses.new_full(scored.present.shape, -torch.inf)
        return missing.masked_scatter(scored.present, -losses)


def replug_objective(scored: Scored, judge: CausalLM, args: argparse.Namespace) -> Tensor:
    """REPLUG-LSR (arXiv 2301.12652): the retriever's distribution is drawn to that of the judge.

        P = softmax(s / gamma)    Q = softmax(log p_judge(target | d_i, query) / beta)    loss = KL(P || Q)

    gamma is --temperature, beta --judge-temperature. --kl reverse is KL(Q || P).
    """
    likelihoods = exact(judge_likelihoods(scored, judge, args.target_likelihood))
    missing = ~scored.present
    log_q = (likelihoods / args.judge_temperature).log_softmax(-1).masked_fill(missing, 0.0)
    log_p = scored.log_weights.masked_fill(missing, 0.0)
    if args.kl == "forward":
        return (scored.log_weights.exp() * (log_p - log_q)).sum(-1)
    return (log_q.exp() * (log_q - log_p)).masked_fill(missing, 0.0).sum(-1)


def revela_objective(scored: Scored, judge: CausalLM, args: argparse.Namespace) -> Tensor:
    """Revela (arXiv 2506.16552): texts of a group help to predict one another; retriever and LM train.

    The rows are the texts of some groups of n, each with its first half as query; weights w_ij over the
    others of its group are softmax_{j != i}(s_ij / tau). Pass 1 reads each text by itself and keeps keys and
    values, in the graph; in pass 2 every head adds sum_{j != i} w_ij b_ij (attention.py). Returns each text's
    share of its group's mean next-token loss, times n.
    """
    n, lengths = scored.present.shape[1], [len(ids) for ids in scored.judge_inputs]
    input_ids, on_device = pad(scored.judge_inputs, scored.scores.device)  # (B, T)
    alone = Cache(on_device)
    judge.model(input_ids, store=alone)
    weights = scored.log_weights.exp().unflatten(0, (-1, n))  # (G, n, n), 0 on the diagonal
    cross = CrossDocument(weights, alone.keys, alone.values, on_device, args.normalise_values)
    hidden = judge.model(input_ids, injection=cross)  # (B, T, C)

    def chunk_loss(rows: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(exact(judge.lm_head(rows)), targets, reduction="none")

    owner = [text for text, length in enumerate(lengths) for _ in range(length - 1)]
    place = [position for length in lengths for position in range(length - 1)]
    owners, places = (to_device(torch.tensor(x), input_ids.device) for x in (owner, place))  # (K,)
    chunks = zip(hidden[owners, places].split(512), input_ids[owners, places + 1].split(512), strict=True)
    # Some logits at a time, computed again in the backward pass: 152k words outweigh everything else.
    losses = torch.cat([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks])  # (K,)
    summed = losses.new_zeros(len(lengths)).index_add(0, owners, losses)  # (B,)
    tokens = (
        (on_device - 1).unflatten(0, (-1, n)).sum(1).clamp(min=1).repeat_interleave(n)
    )  # (B,) of its group
    return summed * n / tokens


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rank, processes = join_processes()
        lengths = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(processes)]
        torch.distributed.all_gather(lengths, torch.tensor([len(rows)], device=rows.device))
        counts = torch.cat(lengths).tolist()
        padded = F.pad(rows, (0, 0, 0, max(counts) - len(rows)))
        parts = [torch.empty_like(padded) for _ in range(processes)]
        torch.distributed.all_gather(parts, padded)
        ctx.own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient)
        return gradient[ctx.own]


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, (M, C); each process gets back the gradient of its own."""
    return _GatherRows.apply(rows) if join_processes()[1] > 1 else rows


# One step


@dataclass
class PreparedRows:
    """What a step needs of this process's rows, in tokens: made while the step before it runs."""

    rows: list[Row]
    indices: list[int]  # of all processes' rows in their file; sums over rows are divided by their number
    texts: dict[tuple[str, str], int]  # (text, kind) -> its number among the distinct texts
    token_ids: list[list[int]]  # of the distinct texts
    judge_inputs: list
    pieces: list[list[int]]  # rows that an objective takes together
    judge_tokens: int


def judge_inputs(
    builder: PromptBuilder | None, rows: list[Row], args: argparse.Namespace, seed: tuple[int, ...]
) -> list:
    """What the judge reads for each row: DREAM, its prompt, the candidates in an order that depends on the
    seed and the row alone; REPLUG, a prompt for each candidate; Revela, the text; InfoNCE, nothing."""
    if builder is None or args.objective == "infonce":
        return [[] for _ in rows]
    if args.objective == "dream":
        return shuffled_prompts(builder, rows, *seed)
    if args.objective == "replug":
        single = [replace(row, documents=[d], positive=None) for row in rows for d in row.documents]
        prompts = iter(builder.build(single))
        return [[next(prompts) for _ in row.documents] for row in rows]
    return builder.plain([row.target for row in rows], args.max_length)


def revela_groups(retriever: Embedder, rows: list[Row], size: int, least: int = 1) -> list[list[Row]]:
    """Groups of `size` different documents for Revela, each as a row: its first half asks, the group answers.

    A group is a row's candidates, topped up with those of the rows that follow. There are as many groups as
    the retriever's tokens pay for that another objective spends on these rows, and at least `least`: a group
    costs its documents and their first halves.
    """

    def tokens(texts: Iterable[str], kind: str) -> int:
        return sum(map(len, retriever.tokenize(list(dict.fromkeys(texts)), kind)))

    budget = tokens((row.query for row in rows if row.query), "query")
    budget += tokens((document.full_text for row in rows for document in row.documents), "document")
    groups, position, spent = list[list[Row]](), 0, 0
    while position < len(rows):
        first, group = position, dict[Document, None]()
        while len(group) < size and position < first + len(rows):
            group |= dict.fromkeys(rows[position % len(rows)].documents)
            position += 1
        documents = list(group)[:size]
        halves = [first_half(document.full_text) for document in documents]
        spent += tokens(halves, "query") + tokens((d.full_text for d in documents), "document")
        if len(groups) >= least and spent > budget:
            break
        index, where = rows[first].index, rows[first].where
        pairs = zip(halves, documents, strict=True)
        groups.append([Row(index, half, d.full_text, documents, None, where) for half, d in pairs])
    return groups


def first_half(text: str) -> str:
    words = text.split()
    return " ".join(words[: (len(words) + 1) // 2])


def prepare_rows(
    retriever: Embedder,
    builder: PromptBuilder | None,
    rows: list[Row],
    args: argparse.Namespace,
    seed: tuple[int, ...],
    rank: int = 0,
    processes: int = 1,
) -> PreparedRows:
    """Tokenise this process's share of a step's rows. seed: decides the candidates' order in the prompts."""
    if args.objective == "revela":
        groups = revela_groups(retriever, rows, args.group_size, processes)
        if len(groups) < processes:
            raise InputError(f"--batch {args.batch}: makes {len(groups)} groups for {processes} processes")
        indices, own = [row.index for group in groups for row in group], groups[rank::processes]
        rows = [row for group in own for row in group]
    else:
        indices, rows = [row.index for row in rows], rows[rank::processes]
    inputs = judge_inputs(builder, rows, args, seed)
    if args.objective == "dream":
        lengths = [len(prompt.input_ids) - 1 for prompt in inputs]
    elif args.objective == "replug":
        lengths = [sum(len(prompt.input_ids) - 1 for prompt in prompts) for prompts in inputs]
    else:
        lengths = [2 * len(token_ids) for token_ids in inputs]  # two passes
    if args.objective == "revela":
        together = args.judge_batch * len(own[0])  # all groups of a step are of one size
        pieces = [list(range(i, min(i + together, len(rows)))) for i in range(0, len(rows), together)]
    elif args.objective == "infonce":
        pieces = [list(range(len(rows)))]
    else:
        order = sorted(range(len(rows)), key=lambda i: -lengths[i])  # of similar length: little padding
        pieces = [order[i : i + args.judge_batch] for i in range(0, len(order), args.judge_batch)]
    texts = {(row.query, "query"): 0 for row in rows}
    texts |= {(document.full_text, "document"): 0 for row in rows for document in row.documents}
    for number, key in enumerate(texts):  # each distinct text is embedded once
        texts[key] = number
    token_ids: list[list[int]] = []
    for kind in ("query", "document"):
        token_ids += retriever.tokenize([text for text, own in texts if own == kind], kind)
    return PreparedRows(rows, indices, texts, token_ids, inputs, pieces, sum(lengths))


COUNTS = ["document_tokens_cut", "retriever_tokens", "tokens"]
SUMS = ["loss", "effective_candidates", "positive_weight", "labelled", *COUNTS]
Objective = Callable[[Scored], Tensor]  # -> loss of each row (B,)


@contextmanager
def memory_advice(flag: str, value: int) -> Iterator[None]:
    """Out of the device's memory: tell which flag to lower, and its value now."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        told = str(error).splitlines()[0][:200]
        raise InputError(f"out of memory: lower {flag}, which is {value} now ({told})") from error


def gradient_of(leaf: Tensor) -> Tensor:
    """What a backward pass has left there."""
    assert leaf.grad is not None
    return leaf.grad


def training_step(
    retriever: Embedder,
    objective: Objective,
    prepared: PreparedRows,
    args: argparse.Namespace,
    seed: tuple[int, ...],
) -> dict[str, Tensor]:
    """Add the gradient of the loss over the prepared rows to the trainable parameters.

    seed: decides the dropout. Micro-batch sizes change nothing but rounding (and, where there is dropout, its
    masks). Returns sums over rows as scalars on the device: the loss, the effective number of candidates
    exp(H(w)), the weight on the relevant document where it is known and in how many rows it is; the document
    tokens that prompts cut, and the tokens read, by the retriever and by all.
    """
    device = retriever.device
    texts, token_ids = prepared.texts, prepared.token_ids
    by_length = sorted(range(len(token_ids)), key=lambda i: -len(token_ids[i]))
    chunks = [by_length[i : i + args.retriever_batch] for i in range(0, len(by_length), args.retriever_batch)]

    def embed(number: int) -> Tensor:
        if args.lora_dropout:  # the same masks in both passes
            torch.manual_seed(random.Random(repr((*seed, number))).getrandbits(63))
        ids = [token_ids[i] for i in chunks[number]]
        # Of similar length: little padding.
        groups = token_batches(list(map(len, ids)), GROUP_TOKENS[device.type])
        return torch.cat([retriever.embed([ids[i] for i in group]) for group in groups])

    # 1. Score. The embeddings become leaves; a single chunk keeps its graph and is not computed twice.
    retriever_memory = partial(memory_advice, "--retriever-batch", args.retriever_batch)
    with retriever_memory(), torch.set_grad_enabled(len(chunks) == 1):
        parts = [embed(number) for number in range(len(chunks))]
    position = to_device(torch.tensor(by_length).argsort(), device)  # of each text among the parts
    embeddings = torch.cat([part.detach() for part in parts])[position].requires_grad_()  # (U, C) float32
    num_queries = sum(kind == "query" for _, kind in texts)
    digests = torch.tensor([[text_digest(text)] for text, kind in texts if kind == "document"])  # (D, 1)
    digests = to_device(digests, device)

    # 2. Inject, predict, backward down to the embeddings.
    stats = {name: torch.zeros((), device=device) for name in SUMS}
    lower = ("--judge-batch", args.judge_batch)
    lower = ("--batch", len(prepared.indices)) if args.objective == "infonce" else lower
    for piece in prepared.pieces:
        rows = [prepared.rows[i] for i in piece]
        width = max(len(row.documents) for row in rows)
        numbers = [[texts[d.full_text, "document"] for d in row.documents] for row in rows]
        present = torch.tensor([[i < len(row) for i in range(width)] for row in numbers])
        if args.objective == "revela":  # no text of a group helps itself
            present &= ~torch.eye(width, dtype=torch.bool).repeat(len(rows) // width, 1)
        present = to_device(present, device)
        candidates = torch.tensor([(row + [num_queries] * width)[:width] for row in numbers])
        candidates = to_device(candidates, device)
        queries = to_device(torch.tensor([texts[row.query, "query"] for row in rows]), device)
        q = embeddings[queries]  # (B, C)
        scores = torch.einsum("bc,bnc->bn", q, embeddings[candidates])
        log_weights = log_softmax_scores(scores, present, args.temperature)
        scored = Scored(
            rows,
            [prepared.judge_inputs[i] for i in piece],
            scores,
            log_weights,
            present,
            q,
            candidates - num_queries,
            embeddings[num_queries:],
            digests,
        )
        with memory_advice(*lower):
            loss = objective(scored).sum()
            (loss / len(prepared.indices)).backward()
        with torch.no_grad():
            stats["loss"] += loss
            entropy = -(log_weights.exp() * log_weights.masked_fill(~present, 0.0)).sum(-1)  # (B,)
            stats["effective_candidates"] += entropy.exp().sum()
            known = [(b, row.positive) for b, row in enumerate(rows) if row.positive is not None]
            if known:
                index = to_device(torch.tensor(known), device)
                stats["positive_weight"] += log_weights[index[:, 0], index[:, 1]].exp().sum()
        stats["labelled"] += len(known)

    # 3. From the embeddings' gradient into the retriever.
    for number, (chunk, part) in enumerate(zip(chunks, parts, strict=True)):
        gradient = gradient_of(embeddings)[to_device(torch.tensor(chunk), device)]
        with retriever_memory():
            (part if len(chunks) == 1 else embed(number)).backward(gradient)
    if args.objective == "dream":
        stats["document_tokens_cut"] += sum(prompt.tokens_cut for prompt in prepared.judge_inputs)
    stats["retriever_tokens"] += sum(map(len, token_ids))
    stats["tokens"] += prepared.judge_tokens + sum(map(len, token_ids))
    return stats


def add_up(stats: dict[str, Tensor], parameters: list[torch.nn.Parameter]) -> dict[str, Tensor]:
    """The sums of `training_step` and the gradients, added up over all processes; one message for all."""
    gradients = list(map(gradient_of, parameters))
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), torch.stack(list(stats.values()))])
    torch.distributed.all_reduce(flat)
    *parts, sums = flat.split([*(gradient.numel() for gradient in gradients), len(stats)])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return dict(zip(stats, sums, strict=True))


def per_row(stats: dict[str, Tensor], num_rows: int) -> dict[str, Tensor]:
    """Means instead of sums, as metrics.jsonl holds them; NaN is a weight that no row tells."""
    means = {name: stats[name] / num_rows for name in ("loss", "effective_candidates")}
    means["positive_weight"] = stats["positive_weight"] / stats["labelled"]
    return means | {name: stats[name] for name in COUNTS}


# Choosing the heads (QRHead, arXiv 2506.09944, on the rows that will be injected)


def relevant_document(row: Row) -> tuple[int | None, str]:
    """The relevant document's index and how it is known: by label, by holding the answer, or not at all."""
    if row.positive is not None:
        return row.positive, "label"
    holders = [i for i, d in enumerate(row.documents) if row.target.lower() in d.full_text.lower()]
    return (holders[0], "answer") if len(holders) == 1 else (None, "none")


def attention_on_prefix(
    judge: CausalLM, prompts: list[Prompt], device: torch.device, rows: str
) -> tuple[Tensor, JudgeBatch]:
    """Every head's attention to the prefix's keys, (B, L, Hq, P) float32, a mean over some rows.

    rows: "target", those that predict the target (teacher-forced); "query", those of the question, as QRHead.
    """
    batch = collate(prompts, device, "target" if rows == "target" else "suffix")
    weights = torch.zeros(batch.suffix_ids.shape, device=device)  # (B, T)
    if rows == "target":
        weights.view(-1)[batch.target_rows] = 1.0
        weights /= weights.sum(-1, keepdim=True)
    else:
        for number, prompt in enumerate(prompts):
            count = prompt.target_start - prompt.question_start
            weights[number, :count] = 1 / count
    probe = Probe(weights)
    with torch.no_grad():
        judge.model(batch.suffix_ids, prefix=read_prefix(judge, batch), probe=probe)
    return torch.stack([a[..., : batch.documents.shape[1]] for a in probe.attention], 1), batch


def document_shares(attention: Tensor, batch: JudgeBatch, baseline: Tensor | None = None) -> Tensor:
    """Attention (B, L, Hq, P) summed over each document's tokens: (B, L, Hq, N).

    baseline: the same under a query that asks nothing. QRHead's calibration takes it off token by token, and
    drops tokens that lie more than two standard deviations below their document's mean.
    """
    num_documents = batch.present.shape[1]
    owner = F.one_hot(batch.documents, num_documents + 1)[..., :num_documents].float()  # (B, P, N)
    if baseline is not None:
        width = min(
            attention.shape[-1], baseline.shape[-1]
        )  # the questions differ in length, after the documents
        owner, attention = owner[:, :width], attention[..., :width] - baseline[..., :width]
        count = owner.sum(1).clamp(min=1)[:, None, None]  # (B, 1, 1, N)
        mean = torch.einsum("blhp,bpn->blhn", attention, owner) / count
        square = torch.einsum("blhp,bpn->blhn", attention.square(), owner) / count
        floor = mean - 2 * (square - mean.square()).clamp(min=0).sqrt()  # (B, L, Hq, N)
        attention = attention * (attention >= torch.einsum("blhn,bpn->blhp", floor, owner))
    return torch.einsum("blhp,bpn->blhn", attention, owner)


def score_heads(
    judge: CausalLM, builder: PromptBuilder, rows: list[Row], args: argparse.Namespace, device: torch.device
) -> tuple[Tensor, dict[str, int]]:
    """How much each head attends to the relevant document when the judge predicts the target.

    Returns scores (L, Hq) and how many rows told their relevant document in which way. Where no row tells its
    relevant document, scores are the mean norm of the loss's gradient with respect to the retriever's scores
    at uniform weights, each head injected alone.
    """
    labels = {row.index: relevant_document(row) for row in rows}
    kinds = {"label": 0, "answer": 0, "none": 0}
    for _, kind in labels.values():
        kinds[kind] += 1
    blind = kinds["none"] == len(rows)
    scores = torch.zeros(judge.config.num_hidden_layers, judge.config.num_attention_heads, device=device)
    usable = rows[:32] if blind else [row for row in rows if labels[row.index][0] is not None]
    for first in tqdm(range(0, len(usable), args.judge_batch), desc="heads", unit="batch"):
        some = usable[first : first + args.judge_batch]
        prompts = shuffled_prompts(builder, some, args.seed)
        if blind:
            scores += _gradient_norms(judge, prompts, args, device) / len(usable)
            continue
        attention, batch = attention_on_prefix(judge, prompts, device, args.detect_rows)
        baseline = None
        if args.calibrate:
            baseline, _ = attention_on_prefix(
                judge, builder.with_query(prompts, "N/A"), device, args.detect_rows
            )
        shares = document_shares(attention, batch, baseline)  # (B, L, Hq, N)
        for number, row in enumerate(some):
            scores += shares[number, :, :, labels[row.index][0]] / len(usable)
    return scores.cpu(), kinds


def _gradient_norms(
    judge: CausalLM, prompts: list[Prompt], args: argparse.Namespace, device: torch.device
) -> Tensor:
    """(L, Hq): the norm of d loss / d scores at uniform weights, one head injected, summed over prompts."""
    batch = collate(prompts, device, args.inject_rows)
    with torch.no_grad():  # also of a judge that learns
        cache = read_prefix(judge, batch)
    norms = torch.zeros(judge.config.num_hidden_layers, judge.config.num_attention_heads, device=device)
    for layer in range(norms.shape[0]):
        for head in range(norms.shape[1]):
            scores = torch.zeros(batch.present.shape, device=device, requires_grad=True)
            log_weights = log_softmax_scores(scores, batch.present, 1.0)
            heads = head_tensors([(layer, head)], device)
            loss = dream_loss(judge, batch, log_weights, heads, args.document_mass == "keep", cache).sum()
            norms[layer, head] = torch.autograd.grad(loss, scores)[0].norm(dim=-1).sum()
    return norms


def choose_heads(scores: Tensor, kind: str, count: int, seed: int) -> Heads:
    """The top, worst, random or all heads of a layer x head map of scores, best first."""
    every = [divmod(i, scores.shape[1]) for i in scores.flatten().argsort(descending=True).tolist()]
    if kind == "random":
        return random.Random(seed).sample(sorted(every), count)
    return {"top": every[:count], "worst": every[-count:], "all": every}[kind]


def describe_heads(
    judge: CausalLM,
    builder: PromptBuilder,
    rows: list[Row],
    heads: Heads,
    args: argparse.Namespace,
    device: torch.device,
) -> dict:
    """Can these heads teach? Losses in nats per token.

    budget: the share of attention that the heads give to documents. context_gain: the target's loss with a
    random document alone, less that with the relevant one. steering: the loss with the whole weight on each
    candidate in turn; its range (worst less best candidate), and how often the best candidate is the relevant
    one.
    """
    known = [(row, index) for row in rows if (index := relevant_document(row)[0]) is not None]
    tensors = head_tensors(heads, device)
    budget, ranges, hits, gains = 0.0, [], 0, []
    for first in tqdm(range(0, len(rows), args.judge_batch), desc="steering", unit="batch"):
        some = rows[first : first + args.judge_batch]
        prompts = shuffled_prompts(builder, some, args.seed)
        shares = document_shares(*attention_on_prefix(judge, prompts, device, "target"))  # (B, L, Hq, N)
        shares = shares.sum((0, -1))  # (L, Hq)
        budget += sum(float(shares[layer, head]) for layer, head in heads)
        losses = steering(judge, prompts, tensors, args, device)  # (B, N)
        ranges += (losses.masked_fill(losses.isinf(), -torch.inf).amax(-1) - losses.amin(-1)).tolist()
        best = losses.argmin(-1).tolist()
        hits += sum(best[number] == relevant_document(row)[0] for number, row in enumerate(some))
    report: dict[str, float | None] = {"budget": budget / len(heads) / len(rows)}
    report["steering_range"] = sum(ranges) / len(ranges)
    report["steering_best_is_relevant"] = hits / len(known) if known else None
    for first in range(0, len(known) if len(known) > 1 else 0, args.judge_batch):
        asked = known[first : first + args.judge_batch]
        others = [known[(first + i + len(known) // 2) % len(known)] for i in range(len(asked))]
        alone = []
        for pairs in (asked, others):
            single = [
                Row(row.index, row.query, row.target, [other.documents[positive]], 0)
                for (row, _), (other, positive) in zip(asked, pairs, strict=True)
            ]
            batch = collate(builder.build(single), device)
            with torch.no_grad():
                alone.append(target_loss(judge, batch, read_prefix(judge, batch)))
        gains += (alone[1] - alone[0]).tolist()
    report["context_gain"] = sum(gains) / len(gains) if gains else None
    return report


@torch.no_grad()
def steering(
    judge: CausalLM,
    prompts: list[Prompt],
    heads: dict[int, Tensor],
    args: argparse.Namespace,
    device: torch.device,
) -> Tensor:
    """(B, N): the target's loss with the whole weight on each candidate in turn; inf where there is none."""
    batch = collate(prompts, device, args.inject_rows)
    cache = read_prefix(judge, batch)
    losses = []
    for candidate in range(batch.present.shape[1]):
        alone = torch.full(batch.present.shape, -torch.inf, device=device)
        alone[:, candidate] = 0.0
        losses.append(dream_loss(judge, batch, alone, heads, args.document_mass == "keep", cache))
    return torch.stack(losses, 1).masked_fill(~batch.present, torch.inf)


def head_map(scores: Tensor, heads: Heads) -> str:
    """The layer x head map for a terminal: scores in percent of the best, chosen heads in brackets."""
    chosen, top = set(heads), max(float(scores.max()), 1e-12)
    lines = ["layer  head " + "".join(f"{head:^5}" for head in range(scores.shape[1]))]
    for layer, row in enumerate(scores.tolist()):
        cells = (round(100 * max(score, 0.0) / top) for score in row)
        marked = (
            f"[{cell:>3}]" if (layer, head) in chosen else f" {cell:>3} " for head, cell in enumerate(cells)
        )
        lines.append(f"{layer:>5}       " + "".join(marked))
    return "\n".join(lines)


def read_heads(path: Path, content: dict, config: Config) -> Heads:
    """The heads that a file selects. Raises InputError."""
    layers, width = config.num_hidden_layers, config.num_attention_heads
    every = [[layer, head] for layer in range(layers) for head in range(width)]
    chosen = content.get("selected")
    if not isinstance(chosen, list) or not chosen or any(pair not in every for pair in chosen):
        raise InputError(
            f"{path}: 'selected' must list [layer, head] pairs of {layers} layers of {width} heads"
        )
    if any(pair in chosen[:number] for number, pair in enumerate(chosen)):
        raise InputError(f"{path}: 'selected' names a head twice")
    return [tuple(pair) for pair in chosen]


def select_heads(
    judge: CausalLM, builder: PromptBuilder, rows: list[Row], args: argparse.Namespace, device: torch.device
) -> tuple[Heads, dict]:
    """The heads to inject, and what heads.json says of them. Prints the map and the report."""
    total = judge.config.num_hidden_layers * judge.config.num_attention_heads
    count = args.num_heads or max(1, min(16, total // 4))
    if count > total:
        raise InputError(f"--num-heads {count}: the judge has {total} heads")
    saved = {
        "judge": str(args.judge),
        "template": builder.template,
        "detect_rows": args.detect_rows,
        "calibrate": args.calibrate,
    }
    if args.heads in ("top", "random", "worst", "all"):
        scores, labels = score_heads(judge, builder, rows, args, device)
        heads = choose_heads(scores, args.heads, count, args.seed)
        saved |= {"heads": args.heads, "labels": labels, "scores": scores.tolist()}
    else:
        path = Path(args.heads)
        saved = {**saved, **(given := read_json(path))}
        heads = read_heads(path, given, judge.config)
        if args.num_heads not in (None, len(heads)):
            raise InputError(f"--num-heads {count}: {path} selects {len(heads)} heads; leave the flag out")
        if given.get("judge", args.judge) != str(args.judge):
            print(f"note: the heads in {path} were detected in {given['judge']!r}", flush=True)
        shape = (judge.config.num_hidden_layers, judge.config.num_attention_heads)
        if given.get("template", builder.template) != builder.template:
            print(f"warning: the heads in {path} were detected with another judge template", flush=True)
        try:
            scores = torch.tensor(given.get("scores") or torch.zeros(shape).tolist()).reshape(shape)
        except (ValueError, TypeError, RuntimeError) as error:
            raise InputError(f"{path}: 'scores' must be {shape[0]} lists of {shape[1]} numbers") from error
    report = describe_heads(judge, builder, rows, heads, args, device)
    if not (scores.isfinite().all() and math.isfinite(report["steering_range"])):
        raise InputError(f"{args.judge}: its losses are not finite; damaged weights, or use --dtype float32")
    print(head_map(scores, heads))
    print_report(saved.get("labels"), len(rows), heads, total, report)
    return heads, {**saved, "selected": [list(pair) for pair in heads], "report": report}


def print_report(labels: dict | None, num_rows: int, heads: Heads, total: int, report: dict) -> None:
    kinds = ", ".join(f"{count} by {kind}" for kind, count in (labels or {}).items() if count)
    gain, best = report["context_gain"], report["steering_best_is_relevant"]
    print(
        f"{len(heads)} of {total} heads, on {num_rows} rows set aside"
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
    if report["steering_range"] < 0.05:
        print("warning: the steering range is under 0.05 nats: these heads cannot teach")
    if labels and labels["none"] == num_rows:
        print("note: no row tells its relevant document; heads are ranked by the gradient of the loss")
    sys.stdout.flush()


# Training


RUN_FILES = (
    "checkpoints.json settings.json heads.json metrics.jsonl results.json report.html report.md".split()
)


def learning_rate(step: int, peak: float, args: argparse.Namespace) -> float:
    """Linear warm-up to the peak, then a cosine down to a tenth; step counts from 0."""
    warmup = max(1, round(args.warmup * args.steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, args.steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def refresh_candidates(
    retriever: Embedder, rows: Rows, usable: list[int], args: argparse.Namespace
) -> tuple[CandidatePool, Tensor]:
    """Mine every row's candidates anew, with the retriever as it is, among all documents of the rows.

    Returns the pool and its numbers, (rows, K) int64: the retriever's best, a few more than are wanted, -1
    where there are no more.
    """
    pool = CandidatePool(rows, usable)
    queries = {str(place): rows[index].query for place, index in enumerate(usable)}
    dataset = RetrievalDataset("candidates", "", rows.path, queries, {}, documents=pool)
    found = dense_hits(retriever, dataset, min(args.candidates + 4, len(pool)), quiet=True).indices
    return pool, torch.from_numpy(found)


def with_candidates(row: Row, pool: CandidatePool, numbers: Tensor, count: int) -> Row:
    """The row with other candidates: the relevant document where it is known, as in `mine`, and the best.

    Where none of a row's own holds its query, as in rows from text, none of the new ones does.
    """
    source = [] if row.positive is None else [row.documents[row.positive]]
    found = [pool[number][1] for number in numbers.tolist() if number >= 0]
    if not any(row.query in document.full_text for document in row.documents):
        found = [document for document in found if row.query not in document.full_text]
    documents = list(dict.fromkeys(source + found))[:count]
    return replace(row, documents=documents, positive=0 if source else None)


def step_rows(
    step: int,
    rows: Rows,
    usable: list[int],
    args: argparse.Namespace,
    mined: tuple[CandidatePool, Tensor] | None = None,
) -> list[Row]:
    """The rows of a step: epoch after epoch in an order that depends on the seed and the epoch alone.

    mined: candidates that replace the rows' own, as `refresh_candidates` found them.
    """
    chosen: list[Row] = []
    for number in range(step * args.batch, (step + 1) * args.batch):
        epoch, position = divmod(number, len(usable))
        if not chosen or position == 0:
            order = shuffled(len(usable), args.seed, epoch)
        place = order[position]
        row = rows[usable[place]]
        chosen.append(with_candidates(row, mined[0], mined[1][place], args.candidates) if mined else row)
    return chosen


def build_judge(args: argparse.Namespace, checkpoint: Checkpoint, resume: Path | None) -> CausalLM:
    """The judge: frozen, or with adapters, where it learns too (--judge-lora, Revela)."""
    judge = checkpoint.causal_lm()
    if args.judge_lora or args.objective == "revela":
        if resume:
            load_adapter(judge.model, resume / "judge")
        else:
            torch.manual_seed(args.seed + 1)
            add_lora(judge.model, args.lora_rank, args.lora_alpha, targets=args.lora_targets)
        judge.model.activation_checkpointing = args.activation_checkpointing
    return judge


def build_retriever(
    args: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    judge: Checkpoint | None,
    resume: Path | None,
) -> Embedder:
    """The retriever to train: a base with LoRA, or all its weights in float32; or as saved in `resume`."""
    folder = find_folder(args.retriever)
    shared = judge if judge and folder.resolve() == judge.folder.resolve() else None
    if args.full:
        checkpoint = Checkpoint(resume or folder, device, torch.float32)
        decoder = checkpoint.decoder().requires_grad_()
    else:
        checkpoint = shared or Checkpoint(folder, device, dtype)  # one copy of equal weights
        decoder = checkpoint.decoder()
        if resume:
            load_adapter(decoder, resume)
        else:
            torch.manual_seed(args.seed)
            add_lora(decoder, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets)
    prompts = {"query": args.query_prompt, "document": args.document_prompt}
    tokenizer = load_tokenizer(folder, checkpoint.config)
    return Embedder(decoder, tokenizer, args.max_length, prompts, args.append_eos, dtype)


def trainable(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def trained(retriever: Embedder, judge: CausalLM | None) -> dict[str, torch.nn.Parameter]:
    """All that the optimizer moves: the retriever's, then the judge's where it learns too."""
    own = {f"judge.{name}": p for name, p in trainable(judge).items()} if judge else {}
    return {name.removeprefix("decoder."): p for name, p in trainable(retriever).items()} | own


def save_checkpoint(
    out: Path,
    step: int,
    retriever: Embedder,
    judge: CausalLM | None,
    optimizer: torch.optim.Optimizer,
    args: argparse.Namespace,
    best: dict,
    candidates: Tensor | None = None,
) -> None:
    """Write OUT/step-N whole or not at all, point checkpoints.json at it, keep the last ones and the best.

    A judge that learns is kept as an adapter in its folder judge; candidates mined anew, as numbers.
    """
    folder = out / f"step-{step:06d}"
    temporary = out / f".{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    base = Path(args.retriever)
    save_embedder(retriever, temporary, str(base.resolve()) if base.is_dir() else args.retriever)
    if judge is not None and learns(judge):
        save_adapter(judge.model, temporary / "judge", args.judge)
    state = {
        f"{name}.{key}": value.contiguous()
        for name, parameter in trained(retriever, judge).items()
        for key, value in optimizer.state[parameter].items()
    }
    save_file(state, temporary / "optimizer.safetensors")
    if candidates is not None:
        save_file({"candidates": candidates}, temporary / "candidates.safetensors")
    write_atomic(temporary / "trainer.json", json.dumps({"step": step, "best": best}, indent=1) + "\n")
    sync(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    names = {"last": folder.name, "best": f"step-{best['step']:06d}" if best else None}
    write_atomic(out / "checkpoints.json", json.dumps(names, indent=1) + "\n")
    # A run that was killed may have left a later one whole that nothing points at.
    steps = sorted(out.glob("step-*"), key=lambda f: (f == folder, f.name.removeprefix("step-").zfill(20)))
    for other in steps[: -args.keep]:
        if other.name != names["best"]:
            shutil.rmtree(other)


def check_prompts(rows: Rows, builder: PromptBuilder, args: argparse.Namespace) -> None:
    """Every row's prompt must be buildable now, not after hours; tells how many targets are cut."""
    cut, later = 0, args.candidates if getattr(args, "refresh_candidates", None) else 0
    for first in tqdm(range(0, len(rows), 1024), desc="check", unit="x1024 rows", disable=len(rows) < 50_000):
        cut += builder.check([rows[i] for i in range(first, min(first + 1024, len(rows)))], later)
    print(f"{cut:,} targets cut to {args.max_target} tokens", flush=True)


def check_labels(rows: Rows, usable: list[int], args: argparse.Namespace) -> None:
    for index in tqdm(usable, desc="check", unit="row", disable=len(rows) < 50_000):
        if (row := rows[index]).positive is None:
            raise InputError(
                f"{row.where}: --objective infonce needs 'positive', the index of the relevant document, "
                f"among the first {args.candidates} (--candidates)"
            )


def load_trainer(
    optimizer: torch.optim.Optimizer, names: Iterable[str], folder: Path
) -> tuple[int, dict[str, Any]]:
    """What `save_checkpoint` left beside the weights: the steps done and the best of them on dev.

    The optimizer gets its state back, for parameters of these names, in this order.
    """
    path = folder / "optimizer.safetensors"
    try:
        saved = load_file(path)
        state = {
            number: {key: saved[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            for number, name in enumerate(names)
        }
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; the run cannot go on from this checkpoint") from error
    except (SafetensorError, OSError, KeyError) as error:
        raise InputError(f"{path}: not a whole file of this run's optimizer ({error})") from error
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    path = folder / "trainer.json"
    progress = read_json(path)
    step, best = progress.get("step"), progress.get("best")
    if type(step) is not int or step < 1 or not isinstance(best, dict):
        raise InputError(f"{path}: 'step' or 'best' is missing or wrong")
    return step, best


def train(args: argparse.Namespace) -> int:
    """Train, then score what was saved; by then the training's own models are gone from memory.

    Returns the exit status: 0, or 128 + the signal that stopped the run.
    """
    rank, processes = join_processes()
    if args.batch < processes:
        raise InputError(f"--batch {args.batch}: {processes} processes need at least one query each")
    device = pick_device(args.device)
    dtype, reason = pick_dtype(args.dtype, device)
    if dtype == torch.float16:
        raise InputError("--dtype float16: small gradients would vanish; train in bfloat16 or float32")
    print_settings(args, device, dtype, reason)
    tests = [d for name in expand_names(args.test) for d in resolve_datasets(name, flag="--test")]
    with run_lock(Path(args.out)) if rank == 0 else nullcontext():
        if stopped := fit(args, tests, device, dtype):
            again = shlex.join(["python", "dream.py", "train", "--resume", args.out])
            print(f"stopped by {stopped.name}; go on with: {again}")
            return 128 + stopped
        if processes > 1:
            torch.distributed.barrier()  # until the first process has saved
        finish(Path(args.out), tests, device, dtype)
    return 0


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Keep other processes from writing to a run; the lock is gone when this process is, however it ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock", timeout=0)
        with lock:
            yield
    except Timeout as error:
        raise InputError(f"{out}: another process is writing to this run") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{out}: cannot be written ({error}); what was saved before is whole") from error


class Interrupt:
    """SIGINT and SIGTERM ask a run to finish its step and save; a second SIGINT ends it at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "Interrupt":
        self._before = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        print(f"\n{self.signal.name}: finishing this step, then saving", file=sys.stderr, flush=True)

    def agreed(self) -> signal.Signals | None:
        """The signal that any process got: all must stop after the same step."""
        if not torch.distributed.is_initialized():
            return self.signal
        number = torch.tensor(self.signal or 0)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return signal.Signals(int(number)) if number else None


def last_checkpoint(args: argparse.Namespace) -> Path | None:
    """Where a resumed run goes on; None for one that begins. Raises InputError where a run is in the way."""
    out = Path(args.out)
    listing = out / "checkpoints.json"
    if not listing.exists():  # killed before its first checkpoint, a run begins anew
        return None
    if args.resume:
        return inside(out, read_json(listing).get("last"), listing)
    if not args.overwrite:
        raise InputError(f"{out}: holds a run already; --resume {out} goes on, --overwrite starts anew")
    return None


def split_rows(args: argparse.Namespace) -> tuple[Rows, list[Row], list[int]]:
    """The rows; those that choose the heads, which are never trained on; the others' numbers."""
    rows = Rows(args.train, args.candidates, documents_only=args.objective == "revela")
    begun_with = vars(args).get("rows_fingerprint", rows.fingerprint)
    if args.resume and not args.change_settings and rows.fingerprint != begun_with:
        raise InputError(f"{args.train}: has changed since the run began; --change-settings goes on with it")
    order = shuffled(len(rows), args.seed)
    aside = min(args.head_examples, len(rows) // 10)
    if not aside:
        raise InputError(f"{args.train}: {len(rows)} rows are too few, at least 10 are needed")
    return rows, [rows[i] for i in order[:aside]], sorted(order[aside:])


def begin(args: argparse.Namespace, heads: dict | None) -> None:
    """The run's folder without what --overwrite throws away, with the heads that were chosen."""
    out = Path(args.out)
    if args.overwrite:  # only now that all input was read: --heads may lie in there
        for name in RUN_FILES:
            (out / name).unlink(missing_ok=True)
        for old in out.glob("step-*/trainer.json"):
            shutil.rmtree(old.parent)
    if heads:
        write_atomic(out / "heads.json", json.dumps(heads) + "\n")


def write_before(args: argparse.Namespace, retriever: Embedder, tests: list[RetrievalDataset]) -> None:
    """results.json with what BM25 and the untrained retriever find."""
    rank, _ = join_processes()
    results: dict[str, list[dict]] = {"bm25": [], "before": [], "after": []}
    for dataset in tests:
        results["before"].append(evaluate_embedder(retriever, dataset, per_query=True))
        if rank == 0:
            hits = bm25_hits(dataset, 100, quiet=True)
            results["bm25"].append(evaluate_hits(dataset, hits, 100, per_query=True)[0])
    if rank == 0:
        write_atomic(Path(args.out) / "results.json", json.dumps(results, indent=1) + "\n")


def check_tests(out: Path, tests: list[RetrievalDataset]) -> None:
    """A resumed run is scored on what it was scored on before it began. Raises InputError."""
    before = read_json(out / "results.json").get("before")
    if not isinstance(before, list):
        raise InputError(f"{out / 'results.json'}: 'before' is missing or no list")
    scored = [result.get("dataset") for result in before if isinstance(result, dict)]
    if scored != [dataset.name for dataset in tests]:
        raise InputError(f"--test: {out} was begun with {scored}; keep to that, and use eval.py for others")


def take_step(
    retriever: Embedder,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batch: PreparedRows,
    args: argparse.Namespace,
    seed: tuple[int, ...],
) -> dict[str, Tensor]:
    """Gradients of all processes' rows, clipped, and the optimizer's step; one that is not finite changes
    nothing. Returns means over the rows and counts, as scalars on the device."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    retriever.train()
    stats = training_step(retriever, objective, batch, args, seed)
    if join_processes()[1] > 1:
        stats = add_up(stats, parameters)
    stats = per_row(stats, len(batch.indices))
    stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
    stats["skipped"] = ~(stats["grad_norm"].isfinite() & stats["loss"].isfinite())
    # Where it is 1, AdamW changes nothing.
    optimizer.found_inf = stats["skipped"].float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return stats


def make_optimizer(names: dict[str, torch.nn.Parameter], args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW; the retriever's parameters first, then those of a judge that learns."""
    peaks = {False: args.lr, True: args.judge_lr or args.lr}
    groups = [
        {"params": [p for name, p in names.items() if name.startswith("judge.") == of_judge], "peak": peak}
        for of_judge, peak in peaks.items()
    ]
    # The fused kind can leave out a step without asking the device.
    return torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)


def fit(
    args: argparse.Namespace, tests: list[RetrievalDataset], device: torch.device, dtype: torch.dtype
) -> signal.Signals | None:
    """The training loop: score, inject, predict, backward, step; now and then evaluate and save.

    Of several processes (torchrun), each takes every so-manieth row of a step and the gradients are added up:
    the same as one process with the whole batch. The first alone chooses heads, writes and prints. Returns
    the signal that ended the run early, if one did.
    """
    out = Path(args.out)
    rank, processes = join_processes()
    resume = last_checkpoint(args)
    if resume:
        check_tests(out, tests)
    rows, held_out, usable = split_rows(args)
    dev = None
    if args.dev:
        dev, *others = resolve_datasets(args.dev, args.dev_split, "--dev")
        if others:
            raise InputError(f"--dev {args.dev}: has several parts; give one of them")

    checkpoint = judge = builder = None
    if args.objective != "infonce":  # which asks no judge
        checkpoint = Checkpoint(args.judge, device, dtype)
        judge = build_judge(args, checkpoint, resume)
        builder = make_builder(args, checkpoint.config, checkpoint.folder)
    print(
        f"{args.train}: {len(rows):,} rows; {rows.skipped:,} left out that have a single candidate",
        flush=True,
    )
    if args.objective == "infonce":
        check_labels(rows, usable, args)
    elif builder and args.objective != "revela":
        check_prompts(rows, builder, args)
    retriever = build_retriever(args, device, dtype, checkpoint, resume)
    heads: Heads = []
    if resume and judge and args.objective == "dream":
        heads = read_heads(out / "heads.json", read_json(out / "heads.json"), judge.config)
    elif not resume:
        saved = None
        if rank == 0 and judge and builder and args.objective == "dream":
            heads, saved = select_heads(judge, builder, held_out, args, device)
        if rank == 0:
            begin(args, saved)
        if judge:
            heads = share_heads(heads, judge.config, device)
        write_before(args, retriever, tests)
    names = trained(retriever, judge)
    if rank == 0:
        settings = {**vars(args), "rows": len(rows), "rows_fingerprint": rows.fingerprint, "resume": None}
        settings |= {"change_settings": False, "overwrite": False}
        write_atomic(out / "settings.json", json.dumps(settings, indent=1) + "\n")
        check_space(out, names.values(), args)
    objective = make_objective(args, judge, heads, device)
    retriever.decoder.activation_checkpointing = args.activation_checkpointing
    if processes > 1:
        for parameter in names.values():
            torch.distributed.broadcast(parameter.data, src=0)
    optimizer = make_optimizer(names, args)
    first_step, best, mined = 0, dict[str, Any](), None
    if resume:
        first_step, best = load_trainer(optimizer, names, resume)
        if (resume / "candidates.safetensors").exists():
            mined = CandidatePool(rows, usable), load_candidates(resume / "candidates.safetensors", usable)
    log = Log(out / "metrics.jsonl" if rank == 0 else None, first_step)
    bar = tqdm(total=args.steps, initial=first_step, desc="train", unit="step", disable=rank > 0)

    def prepared() -> Iterator[PreparedRows]:
        """Every step's rows, those of the next in the background; candidates mined anew in between."""
        nonlocal mined
        every = args.refresh_candidates or args.steps
        for first in range(first_step // every * every, args.steps, every):
            if first and first >= first_step:
                mined = refresh_candidates(retriever, rows, usable, args)
            steps = range(max(first, first_step), min(first + every, args.steps))
            some = (step_rows(step, rows, usable, args, mined) for step in steps)
            seeds = ((args.seed, step) for step in steps)
            yield from one_ahead(
                prepare_rows(retriever, builder, own, args, seed, rank, processes)
                for own, seed in zip(some, seeds, strict=True)
            )

    with Interrupt() as interrupt, bar:
        began = time.perf_counter()
        for step, batch in enumerate(prepared(), first_step):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, group["peak"], args)
            stats = take_step(retriever, objective, optimizer, batch, args, (args.seed, step, rank))
            rate = {"lr": learning_rate(step, args.lr, args)}
            log.add(step + 1, stats | rate, time.perf_counter() - began, batch.indices)
            bar.update()
            stopped, done = interrupt.agreed(), step + 1 == args.steps
            due = (step + 1) % args.eval_every == 0 or done
            if step == first_step or (step + 1) % 10 == 0 or due or stopped:
                bar.set_postfix(log.flush())
            if step == 0 and args.objective != "revela":  # its own temperature is one-hot by design
                warn_about_temperature(log.last, max(len(row.documents) for row in batch.rows), args)
            if due and dev is not None:
                score = evaluate_embedder(retriever, dev)["metrics"]["ndcg@10"]
                log.write({"step": step + 1, "dev": {"ndcg@10": score}})
                if rank == 0:
                    bar.write(f"step {step + 1}: dev NDCG@10 {score:.4f}")
                if not best or score > best["ndcg@10"]:
                    best = {"step": step + 1, "ndcg@10": score}
            if rank == 0 and (due or stopped):
                log.sync()
                numbers = mined[1] if mined else None
                save_checkpoint(out, step + 1, retriever, judge, optimizer, args, best, numbers)
            if stopped and not done:
                break
            began = time.perf_counter()  # the wait for the next rows is that step's
    bar.close()
    log.close()
    return stopped if args.steps > first_step and not done else None


def make_objective(
    args: argparse.Namespace, judge: CausalLM | None, heads: Heads, device: torch.device
) -> Objective:
    if judge is None or args.objective == "infonce":
        return partial(infonce_objective, args=args)
    if args.objective == "dream":
        return partial(dream_objective, judge=judge, heads=head_tensors(heads, device), args=args)
    return partial(
        {"replug": replug_objective, "revela": revela_objective}[args.objective], judge=judge, args=args
    )


def load_candidates(path: Path, usable: list[int]) -> Tensor:
    try:
        candidates = load_file(path)["candidates"]
    except (SafetensorError, OSError, KeyError) as error:
        raise InputError(f"{path}: not a whole file of this run's candidates ({error})") from error
    if len(candidates) != len(usable):
        raise InputError(f"{path}: holds candidates of {len(candidates)} rows, the run has {len(usable)}")
    return candidates


def check_space(out: Path, parameters: Iterable[torch.nn.Parameter], args: argparse.Namespace) -> None:
    """Tell now, not after hours, that the checkpoints will not fit on the disk. Raises InputError."""
    weights = sum(parameter.numel() for parameter in parameters)
    # Weights and two moments in float32; beside those kept, the best and the one being written.
    need = 12 * weights * (args.keep + 2)
    if need > (free := shutil.disk_usage(out).free):
        raise InputError(f"{out}: checkpoints need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def share_heads(heads: Heads, config: Config, device: torch.device) -> Heads:
    """The first process's heads, in every process."""
    _, processes = join_processes()
    if processes == 1:
        return heads
    chosen = torch.zeros(config.num_hidden_layers, config.num_attention_heads, device=device)
    for layer, head in heads:
        chosen[layer, head] = 1
    torch.distributed.broadcast(chosen, src=0)
    return [(layer, head) for layer, head in chosen.nonzero().tolist()]


class Log:
    """metrics.jsonl, one object a step. Figures stay on the device until `flush`: no step waits for them."""

    PATIENCE = 10  # steps in a row whose loss or gradient is not finite; then the run ends

    def __init__(self, path: Path | None, first_step: int):
        self.pending: list[dict] = []
        self.last: dict = {}
        self.skipped = 0  # in a row
        self.file = None  # all but the first process write nothing
        if path is not None:
            kept = []
            if first_step:  # lines after the checkpoint belong to steps that will be done again
                if not path.exists():
                    raise InputError(f"{path}: no such file; the run cannot go on without its metrics")
                whole, _, _ = path.read_text().rpartition("\n")  # half a line is of a process that was killed
                kept = [line for line in whole.splitlines() if json.loads(line)["step"] <= first_step]
            write_atomic(path, "".join(line + "\n" for line in kept))
            self.file = open(path, "a", encoding="utf-8")

    def add(self, step: int, stats: dict, seconds: float, rows: list[int]) -> None:
        self.pending.append({"step": step, **stats, "rows": rows, "time": {"seconds": seconds}})

    def flush(self) -> dict[str, str]:
        """Read and write what is pending; returns what the progress bar shows. Raises InputError."""
        shown, tokens, began = {}, 0, time.perf_counter()
        records: list[dict[str, Any]] = [
            {k: v.item() if isinstance(v, Tensor) else v for k, v in record.items()}
            for record in self.pending
        ]
        if records:  # steps are only sent to a GPU: what is still to be computed is waited for here
            records[-1]["time"]["seconds"] += time.perf_counter() - began
        for values in records:
            self.skipped = self.skipped + 1 if values["skipped"] else 0
            if self.skipped:
                print(f"step {values['step']} is skipped: its loss or gradient is not finite", flush=True)
            else:
                del values["skipped"], values["rows"]
            numbers = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
            whole = {k: int(numbers[k]) for k in COUNTS}
            self.write(numbers | whole)
            tokens += whole["tokens"]
            self.last = numbers if "loss" in numbers else self.last
            if self.skipped == self.PATIENCE:
                raise InputError(
                    f"{self.PATIENCE} steps in a row, up to {values['step']}, had a loss or gradient that is "
                    "not finite (their rows are in metrics.jsonl); lower --lr, or use --dtype float32"
                )
        if records and self.last:
            seconds = sum(record["time"]["seconds"] for record in records)
            shown = {"loss": f"{self.last['loss']:.3f}", "tokens/s": f"{tokens / seconds:,.0f}"}
            shown["candidates"] = f"{self.last['effective_candidates']:.2f}"
        self.pending = []
        return shown

    def write(self, record: dict) -> None:
        if self.file:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()

    def sync(self) -> None:
        """To the disk, before a checkpoint that says these steps are done."""
        if self.file:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file:
            self.file.close()


def warn_about_temperature(stats: dict, candidates: int, args: argparse.Namespace) -> None:
    effective = stats.get("effective_candidates", math.nan)
    if effective < 1.5:
        print(
            f"warning: of {candidates} candidates {effective:.2f} have weight; raise --temperature "
            f"(now {args.temperature:g}), or one random document wins at the start"
        )
    elif effective > 0.98 * candidates:
        print(
            f"warning: the weights are uniform ({effective:.2f} of {candidates} candidates); lower "
            f"--temperature (now {args.temperature:g}), or the scores will not matter"
        )


def finish(out: Path, tests: list[RetrievalDataset], device: torch.device, dtype: torch.dtype) -> None:
    """Score the checkpoint that eval.py would load, and print it beside BM25 and the untrained retriever."""
    if tests:
        results = read_json(out / "results.json")
        embedder = load_embedder(out, device, dtype)
        results["after"] = [evaluate_embedder(embedder, dataset, per_query=True) for dataset in tests]
        if join_processes()[0]:
            return
        write_atomic(out / "results.json", json.dumps(results, indent=1) + "\n")
        print(f"\n{'NDCG@10':32}{'queries':>8}{'BM25':>9}{'before':>9}{'after':>9}")
    for number, dataset in enumerate(tests):
        bm25, before, after = (results[key][number] for key in ("bm25", "before", "after"))
        figures = "".join(f"{result['metrics']['ndcg@10']:9.4f}" for result in (bm25, before, after))
        print(f"{dataset.name:32}{after['queries']:8,}{figures}")
        for group, means in sorted(after.get("groups", {}).items()):
            figures = "".join(
                f"{result['groups'][group]['ndcg@10']:9.4f}" for result in (bm25, before, after)
            )
            print(f"  {group:30}{means['queries']:8,}{figures}")
    print(f"\ncheckpoint: {resolve_run(out)}")
    named = shlex.quote(str(out))
    print(f"next: python eval.py --model {named} --dataset scifact nfcorpus")
    print(f"report: python -m tools.report {named}", flush=True)


# Mining candidates


def mine(args: argparse.Namespace) -> None:
    """Training rows from a corpus and questions with answers: the source passage, where it is known, and the
    best other documents by BM25 or an embedder. Answers are not used to choose candidates."""
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
        device = pick_device(args.device)
        embedder = load_embedder(args.by, device, pick_dtype(args.dtype, device)[0])
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
    folder = find_folder(args.judge, weights=False)
    builder = make_builder(args, read_config(folder / "config.json"), folder)
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


# The command line


def make_builder(args: argparse.Namespace, config: Config, folder: Path) -> PromptBuilder:
    """The judge's prompts, in its own tokens; a BOS where its tokenizer puts one."""
    tokenizer = load_tokenizer(folder, config)
    with_own, plain = (tokenizer.encode("a", add_special_tokens=own).ids for own in (True, False))
    bos = with_own[0] if with_own[:1] != plain[:1] else None
    context = min(args.judge_context or 8192, config.context)
    isolate = vars(args).get("isolate_documents", False)  # `mine` has no such flag
    return PromptBuilder(tokenizer, context, args.max_target, args.judge_template, bos, isolate)


def heads(args: argparse.Namespace) -> None:
    """Detect, show and save heads, without training."""
    check_writable(args.out)
    device = pick_device(args.device)
    dtype, reason = pick_dtype(args.dtype, device)
    print_settings(args, device, dtype, reason)
    rows = Rows(args.train, args.candidates)
    aside = shuffled(len(rows), args.seed)[: args.head_examples]
    checkpoint = Checkpoint(args.judge, device, dtype)
    builder = make_builder(args, checkpoint.config, checkpoint.folder)
    check_prompts(rows, builder, args)
    _, saved = select_heads(checkpoint.causal_lm(), builder, [rows[i] for i in aside], args, device)
    write_atomic(args.out, json.dumps(saved) + "\n")
    print(f"written: {args.out}")


def print_settings(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, reason: str) -> None:
    """All settings, on as few lines as they need."""
    pairs = [
        f"{name}={value!r}" if "\n" in str(value) else f"{name}={value}"
        for name, value in sorted(vars(args).items())
        if name not in ("device", "dtype")
    ]
    print(textwrap.fill("  ".join(pairs), 100, break_on_hyphens=False, break_long_words=False))
    print(f"device={device}  dtype={str(dtype).removeprefix('torch.')} ({reason})", flush=True)


def number(kind: type, least: float, below: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """The type of a flag: a finite number from `least` on (`above`: beyond it), under `below`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (least <= value < below) or above and value == least:
            limit = "" if below == math.inf else f" and below {below:g}"
            raise argparse.ArgumentTypeError(
                f"{text} is not {'above' if above else 'at least'} {least:g}{limit}"
            )
        return value

    parse.__name__ = kind.__name__  # for argparse's own message
    return parse


# What `train` and `heads` do when they are given neither rows nor a judge: the demo.
DEMO_DEFAULTS = {
    "train": str(DEMO / "train.jsonl"),
    "dev": str(DEMO / "dev"),
    "test": ["demo"],
    "judge": str(DEMO / "checkpoint"),
    "retriever": str(DEMO / "checkpoint"),
    "out": "runs/demo",
    "full": True,  # a network this small learns faster in all of its weights than in adapters
    "steps": 150,
    "lr": 2e-3,
    "judge_batch": 32,
    "retriever_batch": 512,
    "eval_every": 50,
}


def above_zero(text: str) -> float:
    return number(float, 0, above=True)(text)


above_zero.__name__ = "float"  # for argparse's own message

# The flags, in the help's sections: the commands that have one by their initials, its name, default, what it
# takes (a name, int, float, bool, or a list of choices), help, and more for argparse.
FLAGS: dict[str, list[tuple]] = {
    "what is learnt from": [
        ("th", "train", None, "FILE", "training rows, .jsonl (also .gz, .xz, .parquet)"),
        ("m", "corpus", None, "PATH", "corpus.jsonl {_id, title, text}, or its folder", {"required": True}),
        ("m", "questions", None, "FILE", "jsonl {query, answers, passage_id: optional}"),
        (
            "m",
            "from_text",
            None,
            ["next", "rest"],
            "no questions: a sentence asks for the next, or for its rest",
        ),
        ("m", "groups", None, int, "no questions: rows of N consecutive passages, for --objective revela"),
        ("m", "by", "bm25", "HOW", "who finds candidates: bm25, or an embedder's folder"),
        ("m", "limit", None, int, "a random sample of so many questions"),
        (
            "thm",
            "candidates",
            8,
            int,
            "documents per query, the first ones of a row",
            {"type": number(int, 2)},
        ),
        ("t", "refresh_candidates", None, int, "mine them anew with the retriever, every N steps"),
    ],
    "where it is tested": [
        ("t", "dev", None, "NAME", "dataset, named as in eval.py: decides which checkpoint is best"),
        ("t", "dev_split", "dev", "NAME", "its split"),
        ("t", "eval_every", 100, int, "steps between evaluations on --dev, each with a checkpoint"),
        ("t", "test", [], "NAME", "datasets evaluated before and after training", {"nargs": "*"}),
    ],
    "where it is written": [
        ("t", "out", None, "DIR", "the run's folder"),
        ("h", "out", "heads.json", "FILE", "where the heads are written"),
        ("m", "out", None, "FILE", "where the rows are written", {"required": True}),
        ("t", "resume", None, "DIR", "go on with this run, by its own settings"),
        ("t", "change_settings", False, bool, "let flags beside --resume change the run's settings"),
        ("t", "keep", 1, int, "checkpoints kept, beside the best"),
        ("t", "overwrite", False, bool, "start anew where --out holds a run"),
    ],
    "the retriever": [
        (
            "t",
            "retriever",
            None,
            "NAME",
            "checkpoint it starts from: a folder, or owner/name[@revision] on the hub",
        ),
        ("t", "full", False, bool, "train all its weights instead of LoRA adapters"),
        ("t", "lora_rank", 16, int, "rank of the adapters", {"type": number(int, 1, 2**16)}),
        ("t", "lora_alpha", 32.0, float, "their scale is alpha / rank"),
        ("t", "lora_dropout", 0.0, float, "dropout in front of them", {"type": number(float, 0, 1)}),
        (
            "t",
            "lora_targets",
            list(PROJECTIONS),
            "NAME",
            "projections that get one (default: all seven)",
            {"nargs": "+"},
        ),
        ("t", "max_length", 512, int, "tokens a query or document is embedded from"),
        ("t", "query_prompt", "", "TEXT", "put before each query when it is embedded"),
        ("t", "document_prompt", "", "TEXT", "put before each document when it is embedded"),
        ("t", "append_eos", False, bool, "end each embedded text with the EOS"),
    ],
    "the judge": [
        ("th", "judge", None, "NAME", "frozen language model, named like --retriever"),
        ("m", "judge", str(DEMO / "checkpoint"), "NAME", "checkpoint whose tokens the report counts in"),
        ("thm", "judge_template", "plain", "WHICH", "its prompt: plain, qwen, qwen3, llama, or a file"),
        ("thm", "judge_context", None, int, "tokens of a prompt (default: the judge's, at most 8192)"),
        ("thm", "max_target", 32, int, "target tokens used"),
        ("th", "isolate_documents", False, bool, "no document of a prompt sees another"),
        ("t", "judge_lora", False, bool, "let adapters of the judge learn too (revela: always)"),
        ("t", "judge_lr", None, float, "their peak learning rate (default: --lr)"),
    ],
    "the heads (DREAM)": [
        ("th", "heads", "top", "WHICH", "top, random, worst, all, or a file that `heads` wrote"),
        ("th", "num_heads", None, int, "how many (default: 16, at most a quarter of all)"),
        ("th", "head_examples", 128, int, "rows set aside to choose them"),
        ("th", "detect_rows", "target", ["target", "query"], "rows whose attention counts; QRHead: query"),
        ("th", "calibrate", False, bool, "QRHead's calibration: take off what the query N/A gets"),
        ("th", "inject_rows", "target", ["target", "suffix"], "suffix: the query's rows too"),
        ("th", "document_mass", "keep", ["keep", "full"], "full: documents get all attention"),
    ],
    "the objective": [
        ("t", "objective", "dream", list(TEMPERATURES), "what teaches the retriever"),
        (
            "t",
            "temperature",
            0.05,
            float,
            "tau of softmax(cosine / tau); replug 0.1, revela 0.0001",
            {"type": above_zero},
        ),
        ("t", "in_batch_negatives", False, bool, "infonce: other queries' documents count as well"),
        ("t", "judge_temperature", 0.1, float, "replug: beta of softmax(log p / beta)", {"type": above_zero}),
        ("t", "target_likelihood", "mean", ["mean", "sum"], "replug: log p of a target token, or of all"),
        ("t", "kl", "forward", ["forward", "reverse"], "replug: KL(P || Q), or KL(Q || P)"),
        ("t", "group_size", 16, int, "revela: documents that read one another", {"type": number(int, 2)}),
        ("t", "normalise_values", False, bool, "revela: divide what is read by the values' norm"),
    ],
    "the steps": [
        ("t", "steps", 1000, int, "optimizer steps"),
        ("t", "batch", 32, int, "queries per step", {"type": number(int, 1, 10**6)}),
        ("t", "lr", 1e-4, float, "peak learning rate of AdamW"),
        (
            "t",
            "warmup",
            0.1,
            float,
            "part of the steps that warm up; then a cosine to a tenth",
            {"type": number(float, 0, 1)},
        ),
        ("t", "weight_decay", 0.0, float, "of AdamW"),
        ("t", "clip", 1.0, float, "largest norm of the gradient", {"type": above_zero}),
        ("thm", "seed", 0, int, "of everything drawn", {"type": number(int, 0)}),
    ],
    "memory and speed (no effect on results)": [
        ("th", "judge_batch", 4, int, "prompts the judge reads at once; revela: groups"),
        ("t", "retriever_batch", 64, int, "texts embedded at once with a graph"),
        ("t", "activation_checkpointing", False, bool, "less memory, one more forward pass of what learns"),
        ("thm", "device", "auto", "NAME", "auto, cpu, cuda, cuda:1, ..."),
        ("thm", "dtype", "auto", "NAME", "compute dtype: auto, float32, bfloat16; heads, mine: float16"),
    ],
}
ABOUT = {
    "train": "train a retriever; without flags, the demo into runs/demo",
    "heads": "choose the judge's heads, show them as a map and save them",
    "mine": "make training rows from a corpus, and questions with answers or its text alone",
}
EXAMPLES = {
    "train": "dream.py train --train rows.jsonl --judge DIR --retriever DIR --out runs/mine",
    "heads": "dream.py heads --train rows.jsonl --judge Qwen/Qwen2.5-1.5B --out heads.json",
    "mine": "dream.py mine --corpus corpus.jsonl --questions questions.jsonl --out rows.jsonl",
}


def add_flags(command: str, parser: argparse.ArgumentParser) -> dict:
    """Give a command's parser its flags; returns their defaults.

    For argparse all defaults are None, until it is known whether this is the demo.
    """
    kinds: dict[type, dict] = {
        int: {"type": number(int, 1, 10**9), "metavar": "N"},
        float: {"type": number(float, 0), "metavar": "X"},
        bool: {"action": argparse.BooleanOptionalAction},
    }
    defaults = {}
    for section, flags in FLAGS.items():
        group = parser.add_argument_group(section)
        for where, name, default, kind, text, *more in flags:
            if command[0] not in where:
                continue
            options = {"choices": kind} if isinstance(kind, list) else kinds.get(kind, {"metavar": kind})
            defaults[name] = default
            if default not in (None, "", []) and not isinstance(default, bool | list):
                text += f" (default: {default})"
            options = options | {"default": None, "help": text} | dict(*more)
            group.add_argument("--" + name.replace("_", "-"), **options)
    return defaults


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    raw = partial(argparse.RawDescriptionHelpFormatter, max_help_position=34)
    parser = ArgumentParser("dream.py", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | heads | mine")
    defaults = {}
    for name, text in ABOUT.items():
        usage, example = f"dream.py {name} [flags]", f"example: python {EXAMPLES[name]}"
        sub = commands.add_parser(
            name, help=text, usage=usage, description=text, epilog=example, formatter_class=raw
        )
        defaults[name] = add_flags(name, sub)

    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    command = given.pop("command")
    settings = defaults[command]
    if given.get("resume"):
        path = Path(given["resume"]) / "settings.json"
        settings |= check_settings(path, read_json(path), settings) | {"out": given["resume"]}
        free = ("resume", "device", "change_settings")
        changed = {k: v for k, v in given.items() if k not in free and v != settings.get(k)}
        if changed and not given.get("change_settings"):
            told = ", ".join(
                f"--{k.replace('_', '-')} {v} (was {settings.get(k)})" for k, v in changed.items()
            )
            raise InputError(f"{given['resume']}: differs from its settings: {told}; add --change-settings")
    elif command in ("train", "heads") and "train" not in given:
        settings |= {
            k: v for k, v in DEMO_DEFAULTS.items() if k in settings and (k, command) != ("out", "heads")
        }
    if command == "train" and not given.get("resume"):
        settings["temperature"] = TEMPERATURES[given.get("objective", "dream")]
    settings |= given
    for name in ("train", "judge", "retriever"):  # found again from any folder
        if settings.get(name) and Path(settings[name]).exists():
            settings[name] = str(Path(settings[name]).resolve())
    # Its text, so that a file that is changed later changes no run.
    settings["judge_template"] = read_template(settings["judge_template"])
    if command == "mine" and sum(map(bool, map(settings.get, ("questions", "from_text", "groups")))) != 1:
        parser.error("give one of --questions FILE, --from-text next|rest, --groups N")
    objective = settings.get("objective", "dream")
    if settings.get("judge_lora") and objective in ("infonce", "replug"):
        parser.error(f"--judge-lora: {objective} has no judge that could learn")
    if settings.get("refresh_candidates") and objective == "revela":
        parser.error("--refresh-candidates: revela has no queries to mine by")
    needed = ("retriever", "out") if objective == "infonce" else ("judge", "retriever", "out")
    for name in needed:
        if settings.get(name, "") is None:
            parser.error(f"--{name} is missing; it is needed beside --train")
    return argparse.Namespace(**{**settings, "command": command})


def check_settings(path: Path, settings: dict, defaults: dict) -> dict:
    """The settings of a run, of the types that the flags give. Raises InputError."""
    choices = {flag[1]: flag[3] for flags in FLAGS.values() for flag in flags if isinstance(flag[3], list)}
    for name, value in settings.items():
        default = defaults.get(name)
        kinds = {float: (int, float), type(None): (int, float, str, type(None))}.get(
            type(default), type(default)
        )
        kinds = str if name in ("train", "judge", "retriever", "out") else kinds
        if name in defaults and (not isinstance(value, kinds) or value not in choices.get(name, [value])):
            raise InputError(f"{path}: {name} is {value!r}, not what the flag gives")
    return settings


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 2 when the input is wrong, 128 + the signal that stopped a training."""

    def work() -> int | None:
        args = parse_arguments(argv)
        if args.command != "train" and os.environ.get("WORLD_SIZE", "1") != "1":
            raise InputError(f"{args.command} runs in one process, without torchrun")
        return {"train": train, "heads": heads, "mine": mine}[args.command](args)

    return run_command("dream.py", work)


if __name__ == "__main__":
    sys.exit(main())
