"""DREAM: train a retriever with nothing but a frozen language model's next-token loss.

    python dream.py train                                     the demo, on a CPU, into runs/demo
    python dream.py train --train rows.jsonl --judge Qwen/Qwen2.5-1.5B --retriever Qwen/Qwen2.5-0.5B --out a
    torchrun --nproc-per-node 8 dream.py train --train rows.jsonl --judge DIR --retriever DIR --out b
    python dream.py train --resume a                          go on where it stopped
    python dream.py train --objective infonce                 InfoNCE, REPLUG or Revela, all else equal

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

What DREAM is compared with takes the same way: an objective (data.Objective) turns rows into what it reads
and scored rows into losses. DREAM's is here, those of other papers are in related/.

DREAM's loss reads no labels, and its judge never changes; this file writes only into the run's folder.
"""

import dataclasses
import json
import math
import random
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention import Injection, head_tensors, log_softmax_scores
from data import (
    Batch,
    Objective,
    Piece,
    PromptBuilder,
    Row,
    Rows,
    check_prompts,
    collate,
    shuffled,
    text_digest,
    to_device,
    token_batches,
)
from eval import bm25_hits, evaluate_embedder, evaluate_hits
from formats.catalogue import expand_names, resolve_dataset, resolve_datasets
from formats.checkpoints import Checkpoint, load_tokenizer, make_builder
from formats.datasets import RetrievalDataset
from formats.embedders import (
    as_saved,
    hidden_size,
    load_adapter,
    load_embedder,
    read_embedding_settings,
    save_adapter,
    save_embedder,
)
from formats.templates import read_template
from model import PROJECTIONS, CausalLM, Embedder, add_lora, learns, target_loss
from related.aside import score_aside, split_rows
from related.infonce import InBatch, InfoNCE
from related.qrhead import Reader, read_heads, select_heads
from related.replug import Replug
from related.revela import Revela
from support import launch, runs
from support.files import InputError, read_json, write_atomic
from support.flags import add_flags, counting, flag, read_settings, resumed, write_settings
from support.runs import COUNTS, Log, locate, resolve_run
from support.show import print_next, print_settings, print_training, progress, warn_about_temperature

DEMO = Path(__file__).resolve().parent / "demo"

# Of the texts in one forward pass: enough to fill a GPU, few enough to be of one length.
GROUP_TOKENS = {"cpu": 1024, "cuda": 4096}


# The objective


class Dream(Objective):
    """The target's loss when the scores decide which documents the judge's heads read; see attention.py."""

    temperature = 0.1
    flags = "judge judge_template judge_context max_target judge_batch judge_lora judge_lr "
    flags += "heads num_heads detect_rows calibrate inject_rows document_mass in_batch_negatives"
    judge_may_learn = True
    heads: dict[int, Tensor]

    def __init__(self, reader: Reader, which: str = "top", num_heads: int = 0, judge_name: str = ""):
        """which, num_heads, judge_name: as in related.qrhead.select_heads."""
        self.reader, self.together = reader, reader.batch
        self.which, self.num_heads, self.judge_name = which, num_heads, judge_name

    def choose(self, aside: list[Row]) -> dict:
        return select_heads(self.reader, aside, self.which, self.num_heads, self.judge_name)

    def use(self, path: Path) -> None:
        heads, _ = read_heads(path, self.reader.judge.config)
        self.heads = head_tensors(heads, self.reader.device)

    def check(self, rows: Rows, usable: list[int]) -> None:
        if self.in_batch_negatives and not self.reader.keep_budget:
            raise InputError("--in-batch-negatives has no effect with --document-mass full; leave one out")
        check_prompts(rows, self.reader.builder)

    def prepare(self, rows: list[Row], seed: tuple[int, ...]) -> list[tuple[Any, int]]:
        prompts = self.reader.builder.shuffled(rows, *seed)
        return [(prompt, len(prompt.input_ids) - 1) for prompt in prompts]

    def loss(self, piece: Piece, log_weights: Tensor, embeddings: Tensor, batch: Batch) -> Tensor:
        prompts = collate(piece.inputs, log_weights.device, self.reader.inject_rows)
        injection = Injection(log_weights, prompts.documents, self.heads, self.reader.keep_budget)
        return target_loss(self.reader.judge, prompts, change=injection)


OBJECTIVES: dict[str, type[Objective]] = dict(dream=Dream, infonce=InfoNCE, replug=Replug, revela=Revela)


@dataclasses.dataclass
class Settings:
    """What `train` is told, a flag a line: default, help and limits. 0 and "" stand for "not given"."""

    train: str = flag("", "training rows, .jsonl (also .gz, .xz, .parquet)", "what is learnt from", "FILE")
    candidates: int = flag(8, "documents per query, the first ones of a row", least=2)
    dev: str = flag("", "dataset, as in eval.py: decides which checkpoint is best", "where it is tested")
    dev_split: str = flag("dev", "its split")
    eval_every: int = flag(100, "steps between evaluations on --dev, each with a checkpoint")
    test: list[str] = flag([], "datasets evaluated before and after training")
    out: str = flag("", "the run's folder", "where it is written", "DIR")
    resume: str = flag("", "go on with this run, by its own settings", metavar="DIR")
    change_settings: bool = flag(False, "let flags beside --resume change the run's settings")
    keep: int = flag(1, "checkpoints kept, beside the best")
    overwrite: bool = flag(False, "start anew where --out holds a run")
    retriever: str = flag("", "what it starts from: a folder, a run, owner/name[@revision]", "the retriever")
    full: bool = flag(False, "train all its weights instead of LoRA adapters")
    lora_rank: int = flag(16, "rank of the adapters", below=2**16)
    lora_alpha: float = flag(32.0, "their scale is alpha / rank")
    lora_dropout: float = flag(0.0, "dropout in front of them", below=1)
    lora_targets: list[str] = flag(list(PROJECTIONS), "projections that get one (default: all seven)")
    max_length: int = flag(0, "tokens a text is embedded from (default: as it was saved, or 512)")
    query_prompt: str | None = flag(None, "put before a query (default: as it was saved)", metavar="TEXT")
    document_prompt: str | None = flag(None, "put before a document (default: likewise)", metavar="TEXT")
    append_eos: bool = flag(False, "end each embedded text with the EOS (default: as it was saved)")
    judge: str = flag("", "frozen language model, named like --retriever", "the judge")
    judge_template: str = flag("plain", "its prompt: plain, qwen, qwen3, llama, or a file", metavar="WHICH")
    judge_context: int = flag(0, "tokens of a prompt (default: the judge's, at most 8192)")
    max_target: int = flag(32, "target tokens used")
    judge_lora: bool = flag(False, "let adapters of the judge learn too (revela: always)")
    judge_lr: float = flag(0.0, "their peak learning rate (default: --lr)")
    heads: str = flag(
        "top", "top, random, worst, all, or a file of tools.heads", "the heads (DREAM)", "WHICH"
    )
    num_heads: int = flag(0, "how many (default: 32, at most a quarter of all)")
    head_examples: int = flag(128, "rows set aside to choose them")
    detect_rows: str = flag("target", "whose attention counts; QRHead: query", choices=("target", "query"))
    calibrate: bool = flag(True, "QRHead's calibration: take off what the query N/A gets")
    inject_rows: str = flag("target", "suffix: the query's rows too", choices=("target", "suffix"))
    document_mass: str = flag("keep", "full: documents get all attention", choices=("keep", "full"))
    objective: str = flag("dream", "what teaches the retriever", "the objective", choices=tuple(OBJECTIVES))
    temperature: float = flag(0.0, "tau of softmax(cosine / tau) (default: the objective's)", above=True)
    in_batch_negatives: bool = flag(False, "dream, infonce: other queries' documents count too")
    judge_temperature: float = flag(0.1, "replug: beta of softmax(log p / beta)", above=True)
    target_likelihood: str = flag("mean", "replug: log p of a token, or of all", choices=("mean", "sum"))
    kl: str = flag("forward", "replug: KL(P || Q), or KL(Q || P)", choices=("forward", "reverse"))
    group_size: int = flag(16, "revela: documents that read one another", least=2)
    normalise_values: bool = flag(False, "revela: divide what is read by the values' norm")
    steps: int = flag(1000, "optimizer steps", "the steps")
    batch: int = flag(32, "queries per step", below=10**6)
    lr: float = flag(1e-4, "peak learning rate of AdamW")
    warmup: float = flag(0.1, "part of the steps that warm up; then a cosine to a tenth", below=1)
    weight_decay: float = flag(0.0, "of AdamW")
    clip: float = flag(1.0, "largest norm of the gradient", above=True)
    seed: int = flag(0, "of everything drawn", least=0)
    judge_batch: int = flag(
        4, "prompts the judge reads at once; revela: groups", "memory, speed (no effect else)"
    )
    retriever_batch: int = flag(64, "texts embedded at once with a graph")
    activation_checkpointing: bool = flag(False, "less memory, one more forward pass of what learns")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = flag("auto", "compute dtype", choices=("auto", "float32", "bfloat16"))
    rows: int = 0  # in the file --train
    rows_fingerprint: str = ""


# One step


def prepare(
    retriever: Embedder,
    objective: Objective,
    rows: list[Row],
    seed: tuple[int, ...],
    rank: int = 0,
    processes: int = 1,
) -> Batch:
    """Tokenise this process's share of a step's rows. seed: decides the candidates' order in the prompts."""
    groups = objective.group(rows, processes)
    indices = [row.index for group in groups for row in group]
    groups = groups[rank::processes]
    rows = [row for group in groups for row in group]
    read = objective.prepare(rows, seed)
    texts = {(row.query, "query"): 0 for row in rows}
    texts |= {(document.full_text, "document"): 0 for row in rows for document in row.documents}
    for number, key in enumerate(texts):  # each distinct text is embedded once
        texts[key] = number
    queries, documents = ([text for text, own in texts if own == kind] for kind in ("query", "document"))
    token_ids = retriever.tokenize(queries, "query") + retriever.tokenize(documents, "document")
    ends = accumulate(map(len, groups))
    spans = [range(end - len(group), end) for group, end in zip(groups, ends, strict=True)]
    spans.sort(key=lambda span: -sum(read[i][1] for i in span))  # of similar length: little padding
    pieces = []
    for first in range(0, len(spans), objective.together):
        numbers = [i for span in spans[first : first + objective.together] for i in span]
        pieces.append(make_piece([rows[i] for i in numbers], [read[i][0] for i in numbers], texts))
    digests = torch.tensor(list(map(text_digest, documents)))  # (D,)
    cut = sum(getattr(item, "tokens_cut", 0) for item, _ in read)
    return Batch(indices, pieces, token_ids, len(queries), digests, sum(count for _, count in read), cut)


def make_piece(rows: list[Row], inputs: list, texts: dict[tuple[str, str], int]) -> Piece:
    """texts: (text, "query" or "document") -> its number among the batch's texts."""
    numbers = [[texts[document.full_text, "document"] for document in row.documents] for row in rows]
    width = max(map(len, numbers))
    filled = [own + own[:1] * (width - len(own)) for own in numbers]  # any document where there is none
    present = [[i < len(own) for i in range(width)] for own in numbers]
    queries = [texts[row.query, "query"] for row in rows]
    known = [(number, row.positive) for number, row in enumerate(rows) if row.positive is not None]
    positives = torch.tensor(known, dtype=torch.int64).reshape(-1, 2)
    q, candidates, there = map(torch.tensor, (queries, filled, present))
    return Piece(rows, inputs, q, candidates, there, positives)


class TwoPasses:
    """The embeddings of a step's texts, as leaves, and the way back from them (GradCache, arXiv 2101.06983).

    The texts are embedded in chunks without a graph; `backward` embeds each again with a graph and sends the
    leaves' gradient into the retriever. A single chunk keeps its graph and is not embedded twice.
    """

    def __init__(self, retriever: Embedder, token_ids: list[list[int]], size: int, seed: tuple | None = None):
        """size: texts in a chunk. seed: of the dropout, where there is some; both passes drop the same."""
        by_length = sorted(range(len(token_ids)), key=lambda i: -len(token_ids[i]))
        self.retriever, self.token_ids, self.seed = retriever, token_ids, seed
        self.chunks = [by_length[i : i + size] for i in range(0, len(by_length), size)]
        with torch.set_grad_enabled(len(self.chunks) == 1):
            self.parts = [self._embed(number) for number in range(len(self.chunks))]
        position = to_device(torch.tensor(by_length).argsort(), retriever.device)  # of each text in the parts
        parts = torch.cat([part.detach() for part in self.parts])
        self.embeddings = parts[position].requires_grad_()  # (U, C) float32

    def _embed(self, number: int) -> Tensor:
        if self.seed is not None:
            torch.manual_seed(random.Random(repr((*self.seed, number))).getrandbits(63))
        ids = [self.token_ids[i] for i in self.chunks[number]]
        groups = token_batches(list(map(len, ids)), GROUP_TOKENS[self.retriever.device.type])
        return torch.cat([self.retriever.embed([ids[i] for i in group]) for group in groups])

    def backward(self) -> None:
        gradient = self.embeddings.grad
        assert gradient is not None
        for number, (chunk, part) in enumerate(zip(self.chunks, self.parts, strict=True)):
            own = gradient[to_device(torch.tensor(chunk), gradient.device)]
            (part if len(self.chunks) == 1 else self._embed(number)).backward(own)


def effective_candidates(log_weights: Tensor, present: Tensor) -> Tensor:
    """exp(H(w)), (B,): how many candidates have weight. log_weights, present: (B, N)."""
    return (-(log_weights.exp() * log_weights.masked_fill(~present, 0.0)).sum(-1)).exp()


def training_step(
    retriever: Embedder,
    objective: Objective,
    batch: Batch,
    temperature: float,
    retriever_batch: int = 64,
    seed: tuple | None = None,
) -> dict[str, Tensor]:
    """Add the gradient of the batch's mean loss to the trainable parameters.

    Micro-batch sizes change nothing but rounding (and the masks of dropout). Returns sums over rows, on the
    device: the loss, the effective number of candidates exp(H(w)), the weight on the relevant document where
    known and in how many rows it is, document tokens that prompts cut, tokens of the retriever, and of all.
    """
    texts, device = TwoPasses(retriever, batch.token_ids, retriever_batch, seed), retriever.device
    in_batch = InBatch(texts.embeddings, batch) if objective.in_batch_negatives else None
    names = ["loss", "effective_candidates", "positive_weight", "labelled", *COUNTS]
    stats = {name: torch.zeros((), device=device) for name in names}
    for piece in batch.pieces:
        parts = piece.queries, piece.candidates, piece.present, piece.positives
        queries, candidates, present, positives = (to_device(part, device) for part in parts)
        scores = torch.einsum("bc,bnc->bn", texts.embeddings[queries], texts.embeddings[candidates])
        log_weights = log_softmax_scores(scores, present, temperature)  # (B, N)
        share = in_batch.log_share(scores, present, queries, candidates, temperature) if in_batch else 0.0
        loss = objective.loss(piece, log_weights + share, texts.embeddings, batch).sum()
        (loss / len(batch.indices)).backward()
        with torch.no_grad():
            stats["loss"] += loss
            stats["effective_candidates"] += effective_candidates(log_weights, present).sum()
            stats["positive_weight"] += log_weights[positives[:, 0], positives[:, 1]].exp().sum()
        stats["labelled"] += len(piece.positives)
    if in_batch:
        in_batch.backward()
    texts.backward()
    stats["document_tokens_cut"] += batch.tokens_cut
    stats["retriever_tokens"] += sum(map(len, batch.token_ids))
    stats["tokens"] += batch.tokens + sum(map(len, batch.token_ids))
    return stats


def take_step(
    retriever: Embedder,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    settings: Settings,
    seed: tuple[int, ...],
) -> dict[str, Tensor]:
    """Gradients of all processes' rows, clipped, and the optimizer's step; one that is not finite changes
    nothing. Returns means over the rows and counts, as scalars on the device."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    num_rows, dropout_seed = len(batch.indices), seed if settings.lora_dropout else None
    retriever.train()
    flags = f"--judge-batch ({settings.judge_batch}), --retriever-batch ({settings.retriever_batch})"
    with launch.enough_memory(f"lower {flags} or --batch ({settings.batch})"):
        sizes = settings.temperature, settings.retriever_batch
        sums = training_step(retriever, objective, batch, *sizes, dropout_seed)
    if launch.join_processes()[1] > 1:
        sums = launch.add_up(sums, parameters)
    stats = {name: sums[name] / num_rows for name in ("loss", "effective_candidates")}
    stats["positive_weight"] = sums["positive_weight"] / sums["labelled"]  # NaN where no row tells it
    stats |= {name: sums[name] for name in COUNTS}
    stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
    stats["skipped"] = ~(stats["grad_norm"].isfinite() & stats["loss"].isfinite())
    optimizer.found_inf = stats["skipped"].float()  # type: ignore[attr-defined]  # 1: changes nothing
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return stats


# Training


def learning_rate(step: int, peak: float, steps: int, warmup_share: float) -> float:
    """Linear warm-up to the peak, then a cosine down to a tenth; step counts from 0."""
    warmup = max(1, round(warmup_share * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def step_rows(step: int, batch: int, rows: Rows, usable: list[int], seed: int) -> list[Row]:
    """The rows of a step: epoch after epoch in an order that depends on the seed and the epoch alone."""
    chosen: list[Row] = []
    for number in range(step * batch, (step + 1) * batch):
        epoch, position = divmod(number, len(usable))
        if not chosen or position == 0:
            order = shuffled(len(usable), seed, epoch)
        chosen.append(rows[usable[order[position]]])
    return chosen


@dataclasses.dataclass
class Models:
    """What a training needs in memory. judge and builder: None where the objective asks no language model."""

    retriever: Embedder
    judge: CausalLM | None
    builder: PromptBuilder | None

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """All that the optimizer moves: the retriever's, then the judge's where it learns too."""
        named = [*self.retriever.decoder.named_parameters()]
        if self.judge is not None:
            named += [(f"judge.{name}", p) for name, p in self.judge.named_parameters()]
        return {name: p for name, p in named if p.requires_grad}

    def save(self, folder: Path, retriever: str, judge: str) -> None:
        """A checkpoint's weights. retriever, judge: the checkpoints that their adapters belong to."""
        base = str(locate(retriever).resolve()) if Path(retriever).is_dir() else retriever
        save_embedder(self.retriever, folder, base)
        if self.judge is not None and learns(self.judge):
            save_adapter(self.judge.model, folder / "judge", judge)


def build_models(settings: Settings, device: torch.device, dtype: torch.dtype, resume: Path | None) -> Models:
    """The models as training starts with them, or as saved in the checkpoint `resume`."""
    checkpoint = judge = builder = None
    if OBJECTIVES[settings.objective].needs_judge:
        checkpoint = Checkpoint(locate(settings.judge), device, dtype)
        judge = build_judge(settings, checkpoint, resume)
        how = settings.judge_template, settings.judge_context, settings.max_target
        builder = make_builder(checkpoint.folder, *how)
    return Models(build_retriever(settings, device, dtype, checkpoint, resume), judge, builder)


def build_judge(settings: Settings, checkpoint: Checkpoint, resume: Path | None) -> CausalLM:
    """The judge: frozen, or with adapters, where it learns too."""
    judge = checkpoint.causal_lm()
    if settings.judge_lora or OBJECTIVES[settings.objective].judge_learns:
        if resume:
            load_adapter(judge.model, resume / "judge")
        else:
            torch.manual_seed(settings.seed + 1)
            add_lora(judge.model, settings.lora_rank, settings.lora_alpha, targets=settings.lora_targets)
        judge.model.activation_checkpointing = settings.activation_checkpointing
    return judge


def build_retriever(
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
    judge: Checkpoint | None,
    resume: Path | None,
) -> Embedder:
    """The retriever to train: a base with LoRA, or all its weights in float32."""
    folder = read_embedding_settings(locate(settings.retriever))["transformer"]
    shared = judge if judge and folder.resolve() == judge.folder.resolve() else None
    if settings.full:
        checkpoint = Checkpoint(resume or folder, device, torch.float32)
        decoder = checkpoint.decoder().requires_grad_()
    else:
        checkpoint = shared or Checkpoint(folder, device, dtype)  # one copy of equal weights
        decoder = checkpoint.decoder()
        if resume:
            load_adapter(decoder, resume)
        else:
            torch.manual_seed(settings.seed)
            how = settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.lora_targets
            add_lora(decoder, *how)
    decoder.activation_checkpointing = settings.activation_checkpointing
    prompts = {"query": settings.query_prompt or "", "document": settings.document_prompt or ""}
    tokenizer = load_tokenizer(folder, checkpoint.config)
    return Embedder(decoder, tokenizer, settings.max_length, prompts, settings.append_eos, dtype)


def build_objective(settings: Settings, models: Models, device: torch.device) -> Objective:
    """The one place that asks which objective it is."""
    together = settings.judge_batch
    if models.judge is None or models.builder is None:
        return InfoNCE(settings.in_batch_negatives)
    read = models.judge, models.builder
    if settings.objective == "replug":
        return Replug(*read, together, settings.judge_temperature, settings.target_likelihood, settings.kl)
    if settings.objective == "revela":
        return Revela(*read, models.retriever, together, settings.group_size, settings.normalise_values)
    dream = Dream(make_reader(settings, *read, device), settings.heads, settings.num_heads, settings.judge)
    dream.in_batch_negatives = settings.in_batch_negatives
    return dream


def make_reader(settings: Settings, judge: CausalLM, builder: PromptBuilder, device: torch.device) -> Reader:
    keep = settings.document_mass == "keep"
    reader = Reader(judge, builder, device, settings.judge_batch, settings.inject_rows, keep)
    how = settings.detect_rows, settings.calibrate, settings.seed
    reader.detect_rows, reader.calibrate, reader.seed = how
    return reader


def make_optimizer(parameters: dict[str, torch.nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    """AdamW; the retriever's parameters first, then those of a judge that learns."""
    peaks = {False: settings.lr, True: settings.judge_lr or settings.lr}
    groups = [
        {
            "params": [p for name, p in parameters.items() if name.startswith("judge.") == of_judge],
            "peak": peak,
        }
        for of_judge, peak in peaks.items()
    ]
    # The fused kind can leave out a step without asking the device.
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True)


def train(settings: Settings) -> int:
    """Train, then score what was saved; by then the training's own models are gone from memory.

    Returns the exit status: 0, or 128 + the signal that stopped the run.
    """
    rank, processes = launch.join_processes()
    if settings.batch < processes:
        raise InputError(f"--batch {settings.batch}: {processes} processes need at least one query each")
    device = launch.pick_device(settings.device)
    tests = [d for name in expand_names(settings.test) for d in resolve_datasets(name, flag="--test")]
    out = Path(settings.out)
    with runs.run_lock(out) if rank == 0 else nullcontext():
        if stopped := fit(settings, tests, device):
            again = shlex.join(["python", "dream.py", "train", "--resume", settings.out])
            print(f"stopped by {stopped.name}; go on with: {again}")
            return 128 + stopped
        if processes > 1:
            torch.distributed.barrier()  # until the first process has saved
        finish(out, tests, device)
    return 0


def fit(settings: Settings, tests: list[RetrievalDataset], device: torch.device) -> signal.Signals | None:
    """The training loop: score, inject, predict, backward, step; now and then evaluate and save.

    Of several processes (torchrun), each takes every so-manieth row of a step and the gradients are added up:
    the same as one process with the whole batch. The first alone chooses heads, writes and prints. Returns
    the signal that ended the run early, if one did.
    """
    out, (rank, processes) = Path(settings.out), launch.join_processes()
    resume = runs.last_checkpoint(out, bool(settings.resume), settings.overwrite)
    if resume:
        runs.check_tests(out, [dataset.name for dataset in tests])
    rows = Rows(settings.train, settings.candidates, OBJECTIVES[settings.objective].documents_only)
    if not settings.change_settings and settings.rows_fingerprint not in ("", rows.fingerprint):
        raise InputError(f"{rows.path}: has changed since the run began; --change-settings goes on with it")
    aside, usable = split_rows(rows, settings.head_examples, settings.seed, settings.batch)
    dev = resolve_dataset(settings.dev, settings.dev_split, "--dev") if settings.dev else None
    if not resume:
        settings = dataclasses.replace(settings, **as_saved(locate(settings.retriever), vars(settings)))
    read = [settings.retriever, *[settings.judge] * OBJECTIVES[settings.objective].needs_judge]
    width = 0 if settings.resume else max(map(hidden_size, read))
    dtype, reason = launch.pick_dtype(settings.dtype, device, width)
    settings = dataclasses.replace(settings, dtype=str(dtype).removeprefix("torch."))
    models = build_models(settings, device, dtype, resume)
    objective = build_objective(settings, models, device)
    print(f"{settings.train}: {len(rows):,} rows; {rows.skipped:,} left out that have a single candidate")
    objective.check(rows, usable)
    others = {n for kind in OBJECTIVES.values() for n in kind.flags.split()} - {*objective.flags.split()}
    print_settings(counting(settings, without=others), device, dtype, reason)
    if not resume:
        begin(settings, objective, aside, models, tests)
    scored = partial(score_aside, aside, models.retriever.encode, out / "results.json")
    if not resume and dev is None and rank == 0:
        scored("before training")
    objective.use(out / "heads.json")
    parameters = models.parameters()
    if rank == 0:
        write_settings(out / "settings.json", settings, rows=len(rows), rows_fingerprint=rows.fingerprint)
        runs.check_space(out, sum(p.numel() for p in parameters.values()), settings.keep)
    if processes > 1:
        for parameter in parameters.values():
            torch.distributed.broadcast(parameter.data, src=0)
    optimizer = make_optimizer(parameters, settings)
    first, best = runs.load_trainer(optimizer, parameters, resume) if resume else (0, {})

    def prepared() -> Iterator[Batch]:
        for step in range(first, settings.steps):
            own = step_rows(step, settings.batch, rows, usable, settings.seed)
            yield prepare(models.retriever, objective, own, (settings.seed, step), rank, processes)

    log = Log(out / "metrics.jsonl" if rank == 0 else None, first)
    bar = progress(total=settings.steps, initial=first, desc="train", unit="step", hidden=rank > 0)
    stopped, done = None, True
    with runs.Interrupt() as interrupt, log, bar:
        for step, batch in enumerate(launch.one_ahead(prepared()), first):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, group["peak"], settings.steps, settings.warmup)
            seed = (settings.seed, step, rank)
            stats = take_step(models.retriever, objective, optimizer, batch, settings, seed)
            log.add(step + 1, stats | {"lr": optimizer.param_groups[0]["lr"]}, batch.indices)
            bar.update()
            stopped, done = interrupt.agreed(), step + 1 == settings.steps
            due = (step + 1) % settings.eval_every == 0 or done
            if step == first or (step + 1) % 10 == 0 or due or stopped:
                bar.set_postfix(log.flush())
            if step == 0 and not objective.one_hot:
                width = max(piece.present.shape[1] for piece in batch.pieces)
                effective = log.last.get("effective_candidates", math.nan)
                warn_about_temperature(effective, width, settings.temperature)
            if due and dev is not None:
                score = evaluate_embedder(models.retriever, dev)["metrics"]["ndcg@10"]
                log.write({"step": step + 1, "dev": {"ndcg@10": score}})
                if rank == 0:
                    bar.write(f"step {step + 1}: dev NDCG@10 {score:.4f}")
                if not best or score > best["ndcg@10"]:
                    best = {"step": step + 1, "ndcg@10": score}
            elif due and rank == 0:
                log.write({"step": step + 1, "aside": scored(f"step {step + 1}")})
            if rank == 0 and (due or stopped):
                log.sync()
                write = partial(models.save, retriever=settings.retriever, judge=settings.judge)
                state = runs.optimizer_state(optimizer, parameters)
                runs.save_checkpoint(out, step + 1, write, state, best, settings.keep)
            if stopped:
                break
            log.clock()  # the wait for the next rows is that step's
    return None if done else stopped


def begin(
    settings: Settings, objective: Objective, aside: list[Row], models: Models, tests: list[RetrievalDataset]
) -> None:
    """Before the first step: heads.json, and results.json with what BM25 and the untrained retriever find."""
    out, (rank, processes) = Path(settings.out), launch.join_processes()
    if rank == 0:
        chosen = objective.choose(aside)
        if settings.overwrite:  # only now that all input was read: --heads may lie in there
            runs.clear(out)
        if chosen:
            write_atomic(out / "heads.json", json.dumps(chosen) + "\n")
    if processes > 1:
        torch.distributed.barrier()
    results: dict[str, list[dict]] = {"bm25": [], "before": [], "after": []}
    for dataset in tests:
        results["before"].append(evaluate_embedder(models.retriever, dataset, per_query=True))
        if rank == 0:
            hits = bm25_hits(dataset, 100, quiet=True)
            results["bm25"].append(evaluate_hits(dataset, hits, 100, per_query=True)[0])
    if rank == 0:
        write_atomic(out / "results.json", json.dumps(results, indent=1) + "\n")


def finish(out: Path, tests: list[RetrievalDataset], device: torch.device) -> None:
    """Score the checkpoint that eval.py would load, and print it beside BM25 and the untrained retriever."""
    if tests:
        results = read_json(out / "results.json")
        embedder = load_embedder(out, device, read_json(out / "settings.json")["dtype"])
        results["after"] = [evaluate_embedder(embedder, dataset, per_query=True) for dataset in tests]
        if launch.join_processes()[0]:
            return
        write_atomic(out / "results.json", json.dumps(results, indent=1) + "\n")
        print_training(results)
    print_next(out, resolve_run(out))


# The command line

GONE = {
    "mine": "is now a command of its own: python -m tools.mine",
    "heads": "is now a command of its own: python -m tools.heads",
    "--refresh-candidates": "was removed, as it did harm; mine between two runs: tools.mine --by RUN",
    "--isolate-documents": "was removed: no difference was measured",
}


def parse_arguments(argv: list[str] | None) -> Settings:
    """The settings of a command line `train ...`: flags over those of a resumed run, or the demo's."""
    usage = "dream.py train [flags]"
    parser = launch.ArgumentParser("dream.py", usage=usage, description=__doc__, gone=GONE)
    parser.add_argument("command", metavar="train", choices=["train"], help="alone: the demo, into runs/demo")
    add_flags(parser, Settings)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    del given["command"]
    settings: dict[str, Any] = {}
    if run := given.get("resume"):
        settings = resumed(Path(run), Settings, given, ("resume", "device", "change_settings")) | {"out": run}
    elif "train" not in given:
        settings, kind = demo_settings(), OBJECTIVES[given.get("objective", "dream")]
        if kind is not Dream:
            del settings["temperature"]  # the demo's is DREAM's
    return complete(Settings(**settings | given), parser.error)


def demo_settings() -> dict[str, Any]:
    """What is trained when nothing is given: demo/settings.json, its paths as they are from here."""
    settings = read_settings(DEMO / "settings.json", Settings)
    return settings | {name: str(DEMO / settings[name]) for name in ("train", "dev", "judge", "retriever")}


def complete(
    settings: Settings, error: Callable[[str], Any], needed: tuple[str, ...] = ("judge", "retriever", "out")
) -> Settings:
    """The settings with what follows from others; error: called with what is missing or excludes itself."""
    objective = OBJECTIVES[settings.objective]
    settings.temperature = settings.temperature or objective.temperature
    for name in ("train", "judge", "retriever"):  # found again from any folder
        value = getattr(settings, name)
        if value and Path(value).exists():
            setattr(settings, name, str(Path(value).resolve()))
    # Its text, so that a file that is changed later changes no run.
    settings.judge_template = read_template(settings.judge_template)
    if settings.judge_lora and not objective.judge_may_learn:
        error(f"--judge-lora: {settings.objective} has no judge that could learn")
    for name in needed:
        if not getattr(settings, name) and (name != "judge" or objective.needs_judge):
            error(f"--{name} is missing; it is needed beside --train")
    return settings


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 2 when the input is wrong, 128 + the signal that stopped a training."""
    return launch.run_command("dream.py", lambda: train(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
