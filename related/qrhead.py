"""Which heads are injected, and whether they can teach: QRHead (arXiv 2506.09944), on the injected rows.

A head's score is the attention that it pays to the relevant document:

    score_h = mean over examples of  mean over rows t of  sum_{j in S_relevant} a^h_tj

QRHead reads the rows of the question; here they are those that predict the target, as those will be injected
(`detect_rows`). Calibration takes off, token by token, what the same prompt gets under the query "N/A".
Steering asks what such heads can do: the target's loss with the whole weight on each candidate in turn.
"""

import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attention import Heads, Injection, head_tensors, log_softmax_scores
from data import JudgeBatch, Prompt, PromptBuilder, Row, collate
from model import Cache, CausalLM, Config, read_prefix, target_loss
from support.files import InputError, read_json
from support.show import head_map, print_report, progress


@dataclass
class Reader:
    """A judge, and how it reads a row's documents."""

    judge: CausalLM
    builder: PromptBuilder
    device: torch.device
    batch: int = 4  # prompts at once
    inject_rows: str = "target"  # "target" or "suffix", as in data.collate
    keep_budget: bool = True
    detect_rows: str = "target"  # whose attention scores a head: "target", or "query" as QRHead
    calibrate: bool = False
    seed: int = 0  # of the candidates' order

    def loss(self, batch: JudgeBatch, log_weights: Tensor, heads: dict[int, Tensor], prefix: Cache) -> Tensor:
        """DREAM's loss, (B,), when `heads` read the documents by these weights (B, N)."""
        injection = Injection(log_weights, batch.documents, heads, self.keep_budget)
        return target_loss(self.judge, batch, prefix, injection)


@dataclass
class Probe:
    """A change that changes nothing: collects each layer's attention to keys, (B, Hq, S) float32, a mean over
    the rows that row_weights (B, T) weigh."""

    row_weights: Tensor
    attention: list[Tensor] = field(default_factory=list)

    def __call__(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, layer: int) -> Tensor:
        self.attention.append(attention_to_keys(q, k, visible, self.row_weights))
        return out


@torch.no_grad()
def attention_to_keys(q: Tensor, k: Tensor, visible: Tensor, row_weights: Tensor) -> Tensor:
    """How much attention each key gets from a weighted mean of rows, per query head.

    q: (B, Hq, T, D); k: (B, Hkv, S, D); visible: (B, T, S) bool; row_weights: (B, T) float, each row of it
    summing to 1. Returns (B, Hq, S) float32.
    """
    keys = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q.float() @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, Hq, T, S)
    probabilities = logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhts,bt->bhs", probabilities, row_weights)


def relevant_document(row: Row) -> tuple[int | None, str]:
    """The relevant document's index and how it is known: by label, by holding the answer, or not at all."""
    if row.positive is not None:
        return row.positive, "label"
    holders = [i for i, d in enumerate(row.documents) if row.target.lower() in d.full_text.lower()]
    return (holders[0], "answer") if len(holders) == 1 else (None, "none")


@torch.no_grad()
def read(reader: Reader, prompts: list[Prompt], rows: str) -> tuple[JudgeBatch, Cache]:
    """The prompts, split as `collate` says, and their prefix: read once, whatever is then asked of it."""
    batch = collate(prompts, reader.device, rows)
    return batch, read_prefix(reader.judge, batch)


@torch.no_grad()
def attention_on_prefix(reader: Reader, batch: JudgeBatch, prefix: Cache, rows: str) -> Tensor:
    """Every head's attention to the prefix's keys, (B, L, Hq, P) float32, a mean over some rows.

    rows: "target", those that predict the target (teacher-forced); "query", those of the question, as QRHead;
    they end with the row that predicts the first target token, and a batch for them is split at "suffix".
    """
    targets = torch.zeros(batch.suffix_ids.shape, device=reader.device)  # (B, T)
    targets.view(-1)[batch.target_rows] = 1.0
    weights = targets if rows == "target" else (targets.cumsum(-1) - targets == 0).float()  # up to the first
    probe = Probe(weights / weights.sum(-1, keepdim=True))
    reader.judge.model(batch.suffix_ids, prefix, probe)
    return torch.stack([a[..., : batch.documents.shape[1]] for a in probe.attention], 1)


def document_shares(attention: Tensor, batch: JudgeBatch, baseline: Tensor | None = None) -> Tensor:
    """Attention (B, L, Hq, P) summed over each document's tokens: (B, L, Hq, N).

    baseline: the same under a query that asks nothing. QRHead's calibration takes it off token by token, and
    drops tokens that lie more than two standard deviations below their document's mean.
    """
    num_documents = batch.present.shape[1]
    owner = F.one_hot(batch.documents, num_documents + 1)[..., :num_documents].float()  # (B, P, N)
    if baseline is not None:
        attention = attention - baseline
        count = owner.sum(1).clamp(min=1)[:, None, None]  # (B, 1, 1, N)
        mean = torch.einsum("blhp,bpn->blhn", attention, owner) / count
        square = torch.einsum("blhp,bpn->blhn", attention.square(), owner) / count
        floor = mean - 2 * (square - mean.square()).clamp(min=0).sqrt()  # (B, L, Hq, N)
        attention = attention * (attention >= torch.einsum("blhn,bpn->blhp", floor, owner))
    return torch.einsum("blhp,bpn->blhn", attention, owner)


def score_heads(reader: Reader, rows: list[Row]) -> tuple[Tensor, dict[str, int]]:
    """How much each head attends to the relevant document, (L, Hq), and how many rows told it in which way.

    Where no row tells it, scores are the mean norm of the loss's gradient with respect to the retriever's
    scores at uniform weights, each head injected alone.
    """
    labels = {row.index: relevant_document(row) for row in rows}
    told = [kind for _, kind in labels.values()]
    kinds = {kind: told.count(kind) for kind in ("label", "answer", "none")}
    blind = kinds["none"] == len(rows)
    config = reader.judge.config
    scores = torch.zeros(config.num_hidden_layers, config.num_attention_heads, device=reader.device)
    split = "target" if reader.detect_rows == "target" and not reader.calibrate else "suffix"
    usable = rows[:32] if blind else [row for row in rows if labels[row.index][0] is not None]
    for first in progress(range(0, len(usable), reader.batch), desc="heads", unit="batch"):
        some = usable[first : first + reader.batch]
        prompts = reader.builder.shuffled(some, reader.seed)
        if blind:
            scores += _gradient_norms(reader, prompts) / len(usable)
            continue
        (batch, prefix), baseline = read(reader, prompts, split), None
        attention = attention_on_prefix(reader, batch, prefix, reader.detect_rows)
        if reader.calibrate:
            empty = collate(reader.builder.with_query(prompts, "N/A"), reader.device, split)
            baseline = attention_on_prefix(reader, empty, prefix, reader.detect_rows)
        shares = document_shares(attention, batch, baseline)  # (B, L, Hq, N)
        for number, row in enumerate(some):
            scores += shares[number, :, :, labels[row.index][0]] / len(usable)
    return scores.cpu(), kinds


def _gradient_norms(reader: Reader, prompts: list[Prompt]) -> Tensor:
    """(L, Hq): the norm of d loss / d scores at uniform weights, one head injected, summed over prompts."""
    config, device = reader.judge.config, reader.device
    batch, prefix = read(reader, prompts, reader.inject_rows)  # no graph, also of a judge that learns
    norms = torch.zeros(config.num_hidden_layers, config.num_attention_heads, device=device)
    for layer in range(norms.shape[0]):
        for head in range(norms.shape[1]):
            scores = torch.zeros(batch.present.shape, device=device, requires_grad=True)
            log_weights = log_softmax_scores(scores, batch.present, 1.0)
            loss = reader.loss(batch, log_weights, head_tensors([(layer, head)], device), prefix).sum()
            norms[layer, head] = torch.autograd.grad(loss, scores)[0].norm(dim=-1).sum()
    return norms


def choose_heads(scores: Tensor, kind: str, count: int, seed: int) -> Heads:
    """The top, worst, random or all heads of a layer x head map of scores, best first."""
    every = [divmod(i, scores.shape[1]) for i in scores.flatten().argsort(descending=True).tolist()]
    if kind == "random":
        return random.Random(seed).sample(sorted(every), count)
    return {"top": every[:count], "worst": every[-count:], "all": every}[kind]


def describe_heads(reader: Reader, rows: list[Row], heads: Heads) -> dict:
    """Can these heads teach? Losses in nats per token.

    budget: the share of attention that the heads give to documents. context_gain: the target's loss with a
    random document alone, less that with the relevant one. steering: the loss with the whole weight on each
    candidate in turn; its range (worst less best candidate), and how often the best candidate is the relevant
    one.
    """
    known = [(row, index) for row in rows if (index := relevant_document(row)[0]) is not None]
    tensors = head_tensors(heads, reader.device)
    budget, ranges, hits, gains = 0.0, [], 0, []
    for first in progress(range(0, len(rows), reader.batch), desc="steering", unit="batch"):
        some = rows[first : first + reader.batch]
        prompts = reader.builder.shuffled(some, reader.seed)
        batch, prefix = read(reader, prompts, reader.inject_rows)
        attention = attention_on_prefix(reader, batch, prefix, "target")
        shares = document_shares(attention, batch).sum((0, -1))  # (L, Hq)
        budget += sum(float(shares[layer, head]) for layer, head in heads)
        losses = steering(reader, batch, prefix, tensors)  # (B, N)
        ranges += (losses.masked_fill(losses.isinf(), -torch.inf).amax(-1) - losses.amin(-1)).tolist()
        best = zip(losses.argmin(-1).tolist(), some, strict=True)
        hits += sum(candidate == relevant_document(row)[0] for candidate, row in best)
    report: dict[str, float | None] = {"budget": budget / len(heads) / len(rows)}
    report["steering_range"] = sum(ranges) / len(rows)
    report["chance"] = sum(1 / len(row.documents) for row in rows) / len(rows)
    report["steering_best_is_relevant"] = hits / len(known) if known else None
    for first in range(0, len(known) if len(known) > 1 else 0, reader.batch):
        asked = known[first : first + reader.batch]
        others = [known[(first + i + len(known) // 2) % len(known)] for i in range(len(asked))]
        alone = []
        for pairs in (asked, others):
            single = [
                Row(row.index, row.query, row.target, [other.documents[positive]], 0)
                for (row, _), (other, positive) in zip(asked, pairs, strict=True)
            ]
            batch = collate(reader.builder.build(single), reader.device)
            with torch.no_grad():
                alone.append(target_loss(reader.judge, batch))
        gains += (alone[1] - alone[0]).tolist()
    report["context_gain"] = sum(gains) / len(gains) if gains else None
    return report


@torch.no_grad()
def steering(reader: Reader, batch: JudgeBatch, prefix: Cache, heads: dict[int, Tensor]) -> Tensor:
    """(B, N): the target's loss with the whole weight on each candidate in turn; inf where there is none."""
    losses = []
    for candidate in range(batch.present.shape[1]):
        alone = torch.full(batch.present.shape, -torch.inf, device=reader.device)
        alone[:, candidate] = 0.0
        losses.append(reader.loss(batch, alone, heads, prefix))
    return torch.stack(losses, 1).masked_fill(~batch.present, torch.inf)


def read_heads(path: Path, config: Config) -> tuple[Heads, dict]:
    """The heads that a file selects, and its content. Raises InputError."""
    content = read_json(path)
    layers, width = config.num_hidden_layers, config.num_attention_heads
    every = [[layer, head] for layer in range(layers) for head in range(width)]
    chosen = content.get("selected")
    if not isinstance(chosen, list) or not chosen or any(pair not in every for pair in chosen):
        asked = f"[layer, head] pairs of {layers} layers of {width} heads"
        raise InputError(f"{path}: 'selected' must list {asked}")
    if any(pair in chosen[:number] for number, pair in enumerate(chosen)):
        raise InputError(f"{path}: 'selected' names a head twice")
    return [(int(layer), int(head)) for layer, head in chosen], content


def select_heads(reader: Reader, rows: list[Row], which: str, num_heads: int, name: str) -> dict:
    """The heads to inject, as heads.json holds them. Prints the map and the report. Raises InputError.

    which: top, random, worst, all, or a file; num_heads: 0 for the default; name: the judge's, for the file.
    """
    config, template = reader.judge.config, reader.builder.template
    shape = (config.num_hidden_layers, config.num_attention_heads)
    total = math.prod(shape)
    count = num_heads or max(1, min(32, total // 4))
    if count > total:
        raise InputError(f"--num-heads {count}: the judge has {total} heads")
    saved: dict[str, Any] = {"judge": name, "template": template, "calibrate": reader.calibrate}
    saved["detect_rows"] = reader.detect_rows
    if which in ("top", "random", "worst", "all"):
        scores, labels = score_heads(reader, rows)
        heads = choose_heads(scores, which, count, reader.seed)
        saved |= {"heads": which, "labels": labels, "scores": scores.tolist()}
    else:
        path = Path(which)
        heads, given = read_heads(path, config)
        saved |= given
        if num_heads not in (0, len(heads)):
            raise InputError(f"--num-heads {count}: {path} selects {len(heads)} heads; leave the flag out")
        if given.get("judge", name) != name:
            print(f"note: the heads in {path} were detected in {given['judge']!r}", flush=True)
        if given.get("template", template) != template:
            print(f"warning: the heads in {path} were detected with another judge template", flush=True)
        try:
            scores = torch.tensor(given.get("scores") or torch.zeros(shape).tolist()).reshape(shape)
        except (ValueError, TypeError, RuntimeError) as error:
            raise InputError(f"{path}: 'scores' must be {shape[0]} lists of {shape[1]} numbers") from error
    report = describe_heads(reader, rows, heads)
    if not (scores.isfinite().all() and math.isfinite(report["steering_range"])):
        raise InputError(f"{name}: its losses are not finite; damaged weights, or use --dtype float32")
    print(head_map(scores.tolist(), heads))
    print_report(saved.get("labels"), len(rows), len(heads), total, report)
    return {**saved, "selected": [list(pair) for pair in heads], "report": report}
