"""DREAM: train a retriever with nothing but a frozen language model's next-token loss.

    python dream.py train                                     the demo, on a CPU, into runs/demo
    python dream.py train --train rows.jsonl --judge Qwen/Qwen2.5-1.5B --retriever Qwen/Qwen2.5-0.5B --out a
    torchrun --nproc-per-node 8 dream.py train --train rows.jsonl --judge DIR --retriever DIR --out b
    python dream.py train --resume a                          go on where it stopped
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

This file never changes the judge, reads no labels in its loss, and writes only into the run's folder.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from attention import Injection, exact
from data import (
    Corpus,
    InputError,
    JsonLines,
    JudgeBatch,
    Prompt,
    PromptBuilder,
    RetrievalDataset,
    Row,
    Rows,
    check_writable,
    collate,
    inside,
    read_json,
    read_template,
    shuffled,
    sync,
    to_device,
    token_batches,
    write_atomic,
    writing,
)
from eval import (
    BM25,
    bm25_hits,
    dense_hits,
    evaluate_embedder,
    evaluate_hits,
    expand_names,
    memory_advice,
    one_ahead,
    resolve_datasets,
)
from model import (
    PROJECTIONS,
    Cache,
    CausalLM,
    Checkpoint,
    Config,
    Embedder,
    Probe,
    add_lora,
    find_folder,
    join_processes,
    leave_processes,
    load_adapter,
    load_embedder,
    load_tokenizer,
    pick_device,
    pick_dtype,
    resolve_run,
    save_embedder,
)

DEMO = Path(__file__).resolve().parent / "demo"

# Of the texts in one forward pass: enough to fill a GPU, few enough to be of one length.
GROUP_TOKENS = {"cpu": 1024, "cuda": 4096}

Heads = list[tuple[int, int]]  # (layer, query head)


# The judge


def read_prefix(judge: CausalLM, batch: JudgeBatch) -> Cache:
    """Keys and values of all before the injected rows: no score reaches them, so no graph is needed."""
    cache = Cache(batch.prefix_lengths)
    with torch.no_grad():
        judge.model(batch.prefix_ids, store=cache)
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
    first_row = torch.zeros_like(batch.prefix_lengths)
    injection = Injection(log_weights, batch.documents, heads, first_row, 0, keep_budget)
    return target_loss(judge, batch, cache or read_prefix(judge, batch), injection)


def shuffled_prompts(builder: PromptBuilder, rows: Sequence[Row], *seed: int) -> list[Prompt]:
    """The rows' prompts, candidates in an order that depends on the seed and the row alone."""
    return builder.build(rows, [shuffled(len(row.documents), *seed, row.index) for row in rows])


@dataclass
class PreparedRows:
    """What a step needs of its rows, in tokens: made while the step before it runs."""

    rows: list[Row]
    texts: dict[tuple[str, str], int]  # (text, kind) -> its number among the distinct texts
    token_ids: list[list[int]]  # of the distinct texts
    prompts: list[Prompt]


def prepare_rows(
    retriever: Embedder, builder: PromptBuilder, rows: list[Row], seed: tuple[int, ...]
) -> PreparedRows:
    """Tokenise queries, documents and prompts. seed: decides the candidates' order in the prompts."""
    texts = {(row.query, "query"): 0 for row in rows}
    texts |= {(document.full_text, "document"): 0 for row in rows for document in row.documents}
    for number, key in enumerate(texts):  # each distinct text is embedded once
        texts[key] = number
    token_ids: list[list[int]] = []
    for kind in ("query", "document"):
        token_ids += retriever.tokenize([text for text, own in texts if own == kind], kind)
    return PreparedRows(rows, texts, token_ids, shuffled_prompts(builder, rows, *seed))


SUMS = ("loss", "effective_candidates", "positive_weight", "labelled", "document_tokens_cut", "tokens")
Objective = Callable[[JudgeBatch, Tensor], Tensor]  # (batch, log weights (B, N)) -> loss of each query (B,)


def training_step(
    retriever: Embedder,
    objective: Objective,
    prepared: PreparedRows,
    args: argparse.Namespace,
    seed: tuple[int, ...],
    num_rows: int | None = None,
) -> dict[str, Tensor]:
    """Add the gradient of the loss over the prepared rows to the retriever's trainable parameters.

    seed: decides the dropout. num_rows: what the sum of losses is divided by, if these rows are a part of
    more. Micro-batch sizes change nothing but rounding (and, where there is dropout, its masks). Returns sums
    over rows as scalars on the device: the loss, the effective number of candidates exp(H(w)), the weight on
    the relevant document where it is known and in how many rows it is; the document tokens that prompts cut,
    and the tokens read.
    """
    device = retriever.device
    rows, texts, token_ids = prepared.rows, prepared.texts, prepared.token_ids
    num_rows = num_rows or len(rows)
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
    position = torch.empty(len(token_ids), dtype=torch.int64)
    position[torch.tensor(by_length)] = torch.arange(len(token_ids))  # text -> its row among the embeddings
    embeddings = torch.cat([part.detach() for part in parts]).requires_grad_()  # (U, C) float32

    # 2. Inject, predict, backward down to the embeddings.
    stats = {name: torch.zeros((), device=device) for name in SUMS}
    pairs = sorted(zip(rows, prepared.prompts, strict=True), key=lambda pair: -len(pair[1].input_ids))
    for first in range(0, len(rows), args.judge_batch):
        some, own = zip(*pairs[first : first + args.judge_batch], strict=True)
        batch = collate(own, device, args.inject_rows)
        queries = [texts[row.query, "query"] for row in some]
        padding = [0] * batch.present.shape[1]
        documents = [
            ([texts[d.full_text, "document"] for d in row.documents] + padding)[: len(padding)]
            for row in some
        ]
        q = embeddings[to_device(position[queries], device)]  # (B, C)
        d = embeddings[to_device(position[torch.tensor(documents)], device)]  # (B, N, C)
        scores = torch.einsum("bc,bnc->bn", q, d)
        log_weights = log_softmax_scores(scores, batch.present, args.temperature)
        with memory_advice("--judge-batch", args.judge_batch):
            loss = objective(batch, log_weights).sum()
            (loss / num_rows).backward()
        with torch.no_grad():
            stats["loss"] += loss
            entropy = -(log_weights.exp() * log_weights.masked_fill(~batch.present, 0.0)).sum(-1)  # (B,)
            stats["effective_candidates"] += entropy.exp().sum()
            known = [(b, row.positive) for b, row in enumerate(some) if row.positive is not None]
            if known:
                index = to_device(torch.tensor(known), device)
                stats["positive_weight"] += log_weights[index[:, 0], index[:, 1]].exp().sum()
        stats["labelled"] += len(known)
        stats["tokens"] += batch.num_tokens

    # 3. From the embeddings' gradient into the retriever.
    start = 0
    for number, part in enumerate(parts):
        gradient = embeddings.grad[start : start + len(part)]
        with retriever_memory():
            (part if len(chunks) == 1 else embed(number)).backward(gradient)
        start += len(part)
    stats["document_tokens_cut"] += sum(prompt.tokens_cut for prompt in prepared.prompts)
    stats["tokens"] += sum(map(len, token_ids))
    return stats


def add_up(stats: dict[str, Tensor], parameters: list[torch.nn.Parameter]) -> dict[str, Tensor]:
    """The sums of `training_step` and the gradients, added up over all processes; one message for all."""
    gradients = [parameter.grad for parameter in parameters]
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
    return means | {name: stats[name] for name in ("document_tokens_cut", "tokens")}


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
    cache = read_prefix(judge, batch)
    norms = torch.zeros(judge.config.num_hidden_layers, judge.config.num_attention_heads, device=device)
    for layer in range(norms.shape[0]):
        for head in range(norms.shape[1]):
            scores = torch.zeros(batch.present.shape, device=device, requires_grad=True)
            log_weights = log_softmax_scores(scores, batch.present, 1.0)
            heads = head_tensors([(layer, head)], device)
            dream_loss(judge, batch, log_weights, heads, args.document_mass == "keep", cache).sum().backward()
            norms[layer, head] = scores.grad.norm(dim=-1).sum()
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
    known = [(row, relevant_document(row)[0]) for row in rows]
    known = [(row, positive) for row, positive in known if positive is not None]
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
    report = {"budget": budget / len(heads) / len(rows)}
    report["steering_range"] = sum(ranges) / len(ranges)
    report["steering_best_is_relevant"] = hits / len(known) if known else None
    for first in range(0, len(known) - 1, args.judge_batch):
        some = known[first : first + args.judge_batch]
        others = [known[(first + i + len(known) // 2) % len(known)] for i in range(len(some))]
        losses = []
        for pairs in (some, others):
            single = [
                Row(row.index, row.query, row.target, [other.documents[positive]], 0)
                for (row, _), (other, positive) in zip(some, pairs, strict=True)
            ]
            batch = collate(builder.build(single), device)
            with torch.no_grad():
                losses.append(target_loss(judge, batch, read_prefix(judge, batch)))
        gains += (losses[1] - losses[0]).tolist()
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
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    every = [[layer, head] for layer in range(layers) for head in range(heads)]
    chosen = content.get("selected")
    if not isinstance(chosen, list) or not chosen or any(pair not in every for pair in chosen):
        raise InputError(
            f"{path}: 'selected' must list [layer, head] pairs of {layers} layers of {heads} heads"
        )
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


RUN_FILES = ("checkpoints.json", "settings.json", "heads.json", "metrics.jsonl", "results.json")


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to a tenth; step counts from 0."""
    warmup = max(1, round(args.warmup * args.steps))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, args.steps - warmup)
    return args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def step_rows(step: int, rows: Rows, usable: list[int], args: argparse.Namespace) -> list[Row]:
    """The rows of a step: epoch after epoch in an order that depends on the seed and the epoch alone."""
    chosen = []
    for number in range(step * args.batch, (step + 1) * args.batch):
        epoch, position = divmod(number, len(usable))
        if not chosen or position == 0:
            order = shuffled(len(usable), args.seed, epoch)
        chosen.append(rows[usable[order[position]]])
    return chosen


def build_retriever(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, judge: Checkpoint, resume: Path | None
) -> Embedder:
    """The retriever to train: a base with LoRA, or all its weights in float32; or as saved in `resume`."""
    folder = find_folder(args.retriever)
    same = folder.resolve() == judge.folder.resolve()
    if args.full:
        checkpoint = Checkpoint(resume or folder, device, torch.float32)
        decoder = checkpoint.decoder().requires_grad_()
    else:
        checkpoint = judge if same else Checkpoint(folder, device, dtype)  # one copy of equal weights
        decoder = checkpoint.decoder()
        if resume:
            load_adapter(decoder, resume)
        else:
            torch.manual_seed(args.seed)
            add_lora(decoder, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets)
    prompts = {"query": args.query_prompt, "document": args.document_prompt}
    tokenizer = load_tokenizer(folder, checkpoint.config)
    return Embedder(decoder, tokenizer, args.max_length, prompts, args.append_eos, dtype)


def trainable(retriever: Embedder) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in retriever.decoder.named_parameters() if p.requires_grad}


def save_checkpoint(
    out: Path,
    step: int,
    retriever: Embedder,
    optimizer: torch.optim.Optimizer,
    args: argparse.Namespace,
    best: dict,
) -> None:
    """Write OUT/step-N whole or not at all, point checkpoints.json at it, keep the last ones and the best."""
    folder = out / f"step-{step:06d}"
    temporary = out / f".{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    base = Path(args.retriever)
    save_embedder(retriever, temporary, str(base.resolve()) if base.is_dir() else args.retriever)
    state = {
        f"{name}.{key}": value.contiguous()
        for name, parameter in trainable(retriever).items()
        for key, value in optimizer.state[parameter].items()
    }
    save_file(state, temporary / "optimizer.safetensors")
    write_atomic(temporary / "trainer.json", json.dumps({"step": step, "best": best}, indent=1) + "\n")
    sync(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    names = {"last": folder.name, "best": f"step-{best['step']:06d}" if best else None}
    write_atomic(out / "checkpoints.json", json.dumps(names, indent=1) + "\n")
    for other in sorted(out.glob("step-*"))[: -args.keep]:
        if other.name != names["best"]:
            shutil.rmtree(other)


def check_rows(rows: Rows, builder: PromptBuilder, args: argparse.Namespace) -> None:
    """Every row's prompt must be buildable now, not after hours; tells what is cut and left out."""
    cut = 0
    for first in tqdm(range(0, len(rows), 1024), desc="check", unit="x1024 rows", disable=len(rows) < 50_000):
        cut += builder.check([rows[i] for i in range(first, min(first + 1024, len(rows)))])
    print(
        f"{args.train}: {len(rows):,} rows; {rows.skipped:,} left out that have a single candidate; "
        f"{cut:,} targets cut to {args.max_target} tokens",
        flush=True,
    )


def load_optimizer(optimizer: torch.optim.Optimizer, retriever: Embedder, folder: Path) -> None:
    path = folder / "optimizer.safetensors"
    try:
        saved = load_file(path)
        state = {
            number: {key: saved[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            for number, name in enumerate(trainable(retriever))
        }
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; the run cannot go on from this checkpoint") from error
    except (SafetensorError, OSError, KeyError) as error:
        raise InputError(f"{path}: not a whole file of this run's optimizer ({error})") from error
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def train(args: argparse.Namespace) -> int:
    """Train, then score what was saved; by then the training's own models are gone from memory.

    Returns the exit status: 0, or 128 + the signal that stopped the run.
    """
    rank, processes = join_processes()
    if args.batch < processes:
        raise InputError(f"--batch {args.batch}: {processes} processes need at least one query each")
    device = pick_device(args.device)
    dtype, reason = pick_dtype(args.dtype, device)
    print_settings(args, device, dtype, reason)
    tests = [d for name in expand_names(args.test) for d in resolve_datasets(name, flag="--test")]
    with run_lock(Path(args.out)) if rank == 0 else nullcontext():
        if stopped := fit(args, tests, device, dtype):
            print(f"stopped by {stopped.name}; go on with: python dream.py train --resume {args.out}")
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

    def __init__(self):
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "Interrupt":
        self._before = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame) -> None:
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
    resume = None
    if args.resume and (out / "checkpoints.json").exists():  # killed before its first, a run begins anew
        listing = out / "checkpoints.json"
        resume = inside(out, read_json(listing).get("last"), listing)
    elif not args.resume and (out / "checkpoints.json").exists():
        if not args.overwrite:
            raise InputError(f"{out}: holds a run already; --resume {out} goes on, --overwrite starts anew")

    rows = Rows(args.train, args.candidates)
    begun_with = vars(args).get("rows_fingerprint", rows.fingerprint)
    if args.resume and not args.change_settings and rows.fingerprint != begun_with:
        raise InputError(f"{args.train}: has changed since the run began; --change-settings goes on with it")
    order = shuffled(len(rows), args.seed)
    aside = min(args.head_examples, len(rows) // 10)  # rows that choose the heads are never trained on
    held_out, usable = [rows[i] for i in order[:aside]], sorted(order[aside:])
    if not held_out:
        raise InputError(f"{args.train}: {len(rows)} rows are too few, at least 10 are needed")
    dev = None
    if args.dev:
        dev, *others = resolve_datasets(args.dev, args.dev_split, "--dev")
        if others:
            raise InputError(f"--dev {args.dev}: has several parts; give one of them")

    checkpoint = Checkpoint(args.judge, device, dtype)
    judge = checkpoint.causal_lm()
    builder = make_builder(args, checkpoint.config, checkpoint.folder)
    check_rows(rows, builder, args)
    retriever = build_retriever(args, device, dtype, checkpoint, resume)
    if resume:
        heads = read_heads(out / "heads.json", read_json(out / "heads.json"), judge.config)
    else:
        heads = []
        if rank == 0:
            heads, saved = select_heads(judge, builder, held_out, args, device)
            if args.overwrite:  # only now that all input was read: --heads may lie in there
                for name in RUN_FILES:
                    (out / name).unlink(missing_ok=True)
                for old in out.glob("step-*/trainer.json"):
                    shutil.rmtree(old.parent)
            write_atomic(out / "heads.json", json.dumps(saved) + "\n")
        heads = share_heads(heads, judge.config, device)
        results = {"bm25": [], "before": [], "after": []}
        for dataset in tests:
            results["before"].append(evaluate_embedder(retriever, dataset))
            if rank == 0:
                hits = bm25_hits(dataset, 100, quiet=True)
                results["bm25"].append(evaluate_hits(dataset, hits, 100)[0])
        if rank == 0:
            write_atomic(out / "results.json", json.dumps(results, indent=1) + "\n")
    if rank == 0:
        settings = {**vars(args), "rows": len(rows), "rows_fingerprint": rows.fingerprint, "resume": None}
        settings |= {"change_settings": False, "overwrite": False}
        write_atomic(out / "settings.json", json.dumps(settings, indent=1) + "\n")
        check_space(out, retriever, args)
    tensors = head_tensors(heads, device)

    def objective(batch: JudgeBatch, log_weights: Tensor) -> Tensor:
        return dream_loss(judge, batch, log_weights, tensors, args.document_mass == "keep")

    retriever.decoder.activation_checkpointing = args.activation_checkpointing
    parameters = list(trainable(retriever).values())
    if processes > 1:
        for parameter in parameters:
            torch.distributed.broadcast(parameter.data, src=0)
    optimizer = torch.optim.AdamW(
        parameters,
        lr=args.lr,
        weight_decay=args.weight_decay,
        fused=True,  # the kind that can leave out a step without asking the device
    )
    first_step, best = 0, {}
    if resume:
        load_optimizer(optimizer, retriever, resume)
        state = read_json(resume / "trainer.json")
        first_step, best = state.get("step"), state.get("best")
        if type(first_step) is not int or first_step < 1 or not isinstance(best, dict):
            raise InputError(f"{resume / 'trainer.json'}: 'step' or 'best' is missing or wrong")
    log = Log(out / "metrics.jsonl" if rank == 0 else None, first_step)
    bar = tqdm(total=args.steps, initial=first_step, desc="train", unit="step", disable=rank > 0)

    def prepared() -> Iterator[PreparedRows]:
        for step in range(first_step, args.steps):
            own = step_rows(step, rows, usable, args)[rank::processes]
            yield prepare_rows(retriever, builder, own, (args.seed, step))

    with Interrupt() as interrupt, bar:
        for step, batch in enumerate(one_ahead(prepared()), first_step):
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            retriever.train()
            stats = training_step(retriever, objective, batch, args, (args.seed, step, rank), args.batch)
            if processes > 1:
                stats = add_up(stats, parameters)
            stats = per_row(stats, args.batch)
            stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
            stats["skipped"] = ~(stats["grad_norm"].isfinite() & stats["loss"].isfinite())
            optimizer.found_inf = stats["skipped"].float()  # where it is 1, AdamW changes nothing
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            stats["lr"] = learning_rate(step, args)
            log.add(step + 1, stats, time.perf_counter() - started, [row.index for row in batch.rows])
            bar.update()
            stopped, done = interrupt.agreed(), step + 1 == args.steps
            due = (step + 1) % args.eval_every == 0 or done
            if step == first_step or (step + 1) % 10 == 0 or due or stopped:
                bar.set_postfix(log.flush())
            if step == 0:
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
                save_checkpoint(out, step + 1, retriever, optimizer, args, best)
            if stopped and not done:
                break
    bar.close()
    log.close()
    return stopped if args.steps > first_step and not done else None


def check_space(out: Path, retriever: Embedder, args: argparse.Namespace) -> None:
    """Tell now, not after hours, that the checkpoints will not fit on the disk. Raises InputError."""
    weights = sum(parameter.numel() for parameter in trainable(retriever).values())
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
                for line in path.read_text().splitlines():
                    if not line.endswith("}") or json.loads(line)["step"] > first_step:
                        break  # half a line is from a process that was killed
                    kept.append(line)
            write_atomic(path, "".join(line + "\n" for line in kept))
            self.file = open(path, "a", encoding="utf-8")

    def add(self, step: int, stats: dict, seconds: float, rows: list[int]) -> None:
        self.pending.append({"step": step, **stats, "rows": rows, "time": {"seconds": seconds}})

    def flush(self) -> dict[str, str]:
        """Read and write what is pending; returns what the progress bar shows. Raises InputError."""
        shown, tokens = {}, 0
        for record in self.pending:
            values = {k: v.item() if isinstance(v, Tensor) else v for k, v in record.items()}
            self.skipped = self.skipped + 1 if values["skipped"] else 0
            if self.skipped:
                print(f"step {values['step']} is skipped: its loss or gradient is not finite", flush=True)
            else:
                del values["skipped"], values["rows"]
            numbers = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
            whole = {k: int(numbers[k]) for k in ("tokens", "document_tokens_cut")}
            self.write(numbers | whole)
            tokens += whole["tokens"]
            self.last = numbers if "loss" in numbers else self.last
            if self.skipped == self.PATIENCE:
                raise InputError(
                    f"{self.PATIENCE} steps in a row, up to {values['step']}, had a loss or gradient that is "
                    "not finite (their rows are in metrics.jsonl); lower --lr, or use --dtype float32"
                )
        if self.pending and self.last:
            seconds = sum(record["time"]["seconds"] for record in self.pending)
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
        results["after"] = [evaluate_embedder(embedder, dataset) for dataset in tests]
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
    print(f"next: python eval.py --model {out} --dataset scifact nfcorpus", flush=True)


# Mining candidates


def mine(args: argparse.Namespace) -> None:
    """Training rows from a corpus and questions with answers: the source passage, where it is known, and the
    best other documents by BM25 or an embedder. Answers are not used to choose candidates."""
    check_writable(args.out)
    path = Path(args.corpus)
    corpus = Corpus(path / "corpus.jsonl" if path.is_dir() else path)
    numbers = {doc_id: number for number, doc_id in enumerate(corpus.ids)}
    lines = JsonLines(Path(args.questions))
    questions = [read_question(lines, index, numbers, corpus) for index in range(len(lines))]
    if args.limit and args.limit < len(questions):
        questions = [questions[i] for i in sorted(shuffled(len(questions), args.seed)[: args.limit])]
    if not questions:
        raise InputError(f"{args.questions}: no questions")
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
    out = Path(args.out)
    with writing(out) as file:
        for question, hits in zip(tqdm(questions, desc="write", unit="row"), found.tolist(), strict=True):
            source = question.pop("passage")
            candidates = {corpus[i][1]: None for i in [source, *hits] if i is not None and i >= 0}
            candidates = [document for document in candidates if document.full_text][: args.candidates]
            documents = [{"title": d.title, "text": d.text} for d in candidates]
            if not documents:
                without += 1
                continue
            row = {**question, "documents": documents, **({} if source is None else {"positive": 0})}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if without:
        print(f"{without:,} questions left out: they share no word with any document")
    report_targets(args, out)


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
    builder = make_builder(args, Config.read(folder / "config.json"), folder)
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
    bos = config.bos_token_id if tokenizer.encode("a").ids[:1] == [config.bos_token_id] else None
    context = min(args.judge_context or 8192, config.context)
    return PromptBuilder(tokenizer, context, args.max_target, args.judge_template, bos)


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
    check_rows(rows, builder, args)
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


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dream.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | heads | mine")
    about = {
        "train": "train a retriever; without flags, the demo into runs/demo",
        "heads": "choose the judge's heads, show them as a map and save them",
        "mine": "make training rows from a corpus and questions with answers",
    }
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, text in about.items()}
    defaults: dict[str, dict] = {name: {} for name in parsers}

    def flag(where: str, name: str, default, kind, help: str, **options) -> None:
        """A flag of the commands with an initial in `where`. kind: int, float, bool or its value's name.

        Its default stays None for argparse until it is known whether this is the demo.
        """
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind in (int, float):
            kinds = {int: (number(int, 1, 10**9), "N"), float: (number(float, 0), "X")}
            options = dict(zip(("type", "metavar"), kinds[kind], strict=True)) | options
        elif kind is not None:
            options["metavar"] = kind
        shown = default not in (None, "", []) and kind is not bool
        for command, sub in parsers.items():
            if command[0] in where:
                defaults[command][name] = default
                text = help + (f" (default: {default})" if shown else "")
                sub.add_argument("--" + name.replace("_", "-"), default=None, help=text, **options)

    demo = str(DEMO / "checkpoint")
    flag("th", "train", None, "FILE", "training rows, .jsonl (also .gz, .xz)")
    flag(
        "t",
        "dev",
        None,
        "NAME",
        "dataset for evaluation in training, decides what is best; named as in eval.py",
    )
    flag("t", "dev_split", "dev", "NAME", "its split")
    flag("t", "test", [], "NAME", "datasets evaluated before and after training, likewise", nargs="*")
    flag("t", "out", None, "DIR", "the run's folder")
    flag("h", "out", "heads.json", "FILE", "where the heads are written")
    flag("t", "resume", None, "DIR", "go on with this run, by its own settings")
    flag("t", "change_settings", False, bool, "let flags beside --resume change the run's settings")
    flag("t", "keep", 1, int, "checkpoints kept, beside the best")
    flag("t", "overwrite", False, bool, "start anew where --out holds a run")
    flag(
        "th",
        "judge",
        None,
        "NAME",
        "frozen language model: a folder, or owner/name[@revision] on the Hugging Face hub",
    )
    flag("m", "judge", demo, "NAME", "checkpoint whose tokens the report counts in")
    flag("thm", "judge_template", "plain", "WHICH", "its prompt: plain, qwen, qwen3, llama, or a file")
    flag("t", "retriever", None, "NAME", "checkpoint that the retriever starts from, likewise")
    flag("t", "full", False, bool, "train all weights of the retriever instead of LoRA adapters")
    flag("t", "lora_rank", 16, int, "rank of the adapters", type=number(int, 1, 2**16))
    flag("t", "lora_alpha", 32.0, float, "their scale is alpha / rank")
    flag("t", "lora_dropout", 0.0, float, "dropout in front of the adapters", type=number(float, 0, 1))
    flag("t", "lora_targets", list(PROJECTIONS), "NAME", "projections that get one", nargs="+")
    flag("t", "max_length", 512, int, "tokens a query or document is embedded from")
    flag("t", "query_prompt", "", "TEXT", "put before each query when it is embedded")
    flag("t", "document_prompt", "", "TEXT", "put before each document when it is embedded")
    flag("t", "append_eos", False, bool, "end each embedded text with the EOS")
    flag(
        "thm",
        "candidates",
        8,
        int,
        "documents per query, the first ones of a row",
        type=number(int, 2),
    )
    flag("t", "temperature", 0.05, float, "tau of softmax(cosine / tau)", type=number(float, 0, above=True))
    flag("th", "heads", "top", "WHICH", "top, random, worst, all, or a file that `heads` wrote")
    flag("th", "num_heads", None, int, "how many (default: 16, at most a quarter of all)")
    flag("th", "head_examples", 128, int, "rows set aside to choose them")
    flag(
        "th",
        "detect_rows",
        "target",
        None,
        "rows whose attention counts; QRHead: query",
        choices=["target", "query"],
    )
    flag("th", "calibrate", False, bool, "QRHead's calibration: take off what the query N/A gets")
    flag("th", "inject_rows", "target", None, "suffix: the query's rows too", choices=["target", "suffix"])
    flag("th", "document_mass", "keep", None, "full: documents get all attention", choices=["keep", "full"])
    flag("thm", "max_target", 32, int, "target tokens used")
    flag("thm", "judge_context", None, int, "tokens of a prompt (default: the judge's, at most 8192)")
    flag("t", "steps", 1000, int, "optimizer steps")
    flag("t", "batch", 32, int, "queries per step", type=number(int, 1, 10**6))
    flag("th", "judge_batch", 4, int, "prompts the judge reads at once; decides memory and speed only")
    flag("t", "retriever_batch", 64, int, "texts embedded at once with a graph; likewise")
    flag("t", "activation_checkpointing", False, bool, "less memory, one more forward pass of the retriever")
    flag("t", "lr", 1e-4, float, "peak learning rate of AdamW")
    flag(
        "t",
        "warmup",
        0.1,
        float,
        "part of the steps that warm up; then a cosine to a tenth",
        type=number(float, 0, 1),
    )
    flag("t", "weight_decay", 0.0, float, "of AdamW")
    flag("t", "clip", 1.0, float, "largest norm of the gradient", type=number(float, 0, above=True))
    flag("t", "eval_every", 100, int, "steps between evaluations on --dev, each with a checkpoint")
    flag("m", "corpus", None, "PATH", "corpus.jsonl {_id, title, text}, or its folder", required=True)
    flag("m", "questions", None, "FILE", "jsonl {query, answers, passage_id: optional}", required=True)
    flag("m", "out", None, "FILE", "where the rows are written", required=True)
    flag("m", "by", "bm25", "HOW", "bm25, or an embedder's folder")
    flag("m", "limit", None, int, "a random sample of so many questions")
    flag("thm", "seed", 0, None, "of everything drawn", type=number(int, 0), metavar="N")
    flag("thm", "device", "auto", "NAME", "auto, cpu, cuda, cuda:1, ...")
    flag("thm", "dtype", "auto", "NAME", "compute dtype: auto, float32, bfloat16, float16")

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
    settings |= given
    for name in ("train", "judge", "retriever"):  # found again from any folder
        if settings.get(name) and Path(settings[name]).exists():
            settings[name] = str(Path(settings[name]).resolve())
    # Its text, so that a file that is changed later changes no run.
    settings["judge_template"] = read_template(settings["judge_template"])
    for name in ("judge", "retriever", "out"):
        if settings.get(name, "") is None:
            parser.error(f"--{name} is missing; it is needed beside --train")
    return argparse.Namespace(**{**settings, "command": command})


def check_settings(path: Path, settings: dict, defaults: dict) -> dict:
    """The settings of a run, of the types that the flags give. Raises InputError."""
    for name, value in settings.items():
        default = defaults.get(name)
        kinds = {float: (int, float), type(None): (int, str, type(None))}.get(type(default), type(default))
        kinds = str if name in ("train", "judge", "retriever", "out") else kinds
        if name in defaults and not isinstance(value, kinds):
            raise InputError(f"{path}: {name} is {value!r}, not what the flag gives")
    return settings


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse_arguments(argv)
        if args.command != "train" and os.environ.get("WORLD_SIZE", "1") != "1":
            raise InputError(f"{args.command} runs in one process, without torchrun")
        return {"train": train, "heads": heads, "mine": mine}[args.command](args) or 0
    except KeyboardInterrupt:
        print("dream.py: interrupted", file=sys.stderr)
        return 130
    except InputError as error:
        print(f"dream.py: error: {error}", file=sys.stderr)
        return 2
    finally:
        leave_processes()


if __name__ == "__main__":
    sys.exit(main())
