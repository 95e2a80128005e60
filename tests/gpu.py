"""Does it run on a GPU, and how fast? Checks and timings by name, each in a process of its own.

    python -m tests.gpu --json gpu.json               all of them, in under ten minutes
    python -m tests.gpu --only bias step              some of them
    python -m tests.gpu --device cpu --quick          tiny: does the script itself run?

An error in a GPU's kernel spoils its process for good, and a slow part must not eat the time of the others:
hence the processes, each with a time limit. The file is written anew after each part, so that a killed call
loses nothing. A check compares a number with a limit; timings have none. A step's tokens are the judge's and
the retriever's together. Exit status: 1 where a part failed or was not run. `tests/gpu.sh` calls this.
"""

import argparse
import copy
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

# Nothing of ours and no package is imported up here: a part that misses one fails alone.

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 560  # of all parts together
CUDA_ONLY = "only on CUDA"
QWEN = {  # of their config.json
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rope_theta": 1e6,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 5e5,
}
TINY = {"vocab_size": 6144, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}  # instead, with --quick
SHOWN = {
    "difference": "{:.1e}",
    "count": "{:,.0f}",
    "tflops": "{:,.0f} TFLOP/s",
    "seconds_per_step": "{:.3f} s/step",
    "seconds": "{:.3f} s",
    "tokens_per_s": "{:,.0f} tok/s",
    "peak_gb": "{:.2f} GB",
    "before": "{:.4f} before",
    "after": "{:.4f} after",
}


@dataclass
class Line:
    """One figure of a part. limit: what `difference` or `count` may be at most; None for a timing."""

    what: str
    figures: dict[str, float]
    limit: float | None = None

    @property
    def ok(self) -> bool:
        return self.limit is None or next(iter(self.figures.values())) <= self.limit


def difference(what, found, expected, limit) -> Line:
    """The largest distance of a pair of tensors, each relative to the norm of the expected one."""
    pairs = zip(found, expected, strict=True)
    parts = [float((a.double().cpu() - b.double().cpu()).norm() / b.double().norm().cpu()) for a, b in pairs]
    return Line(what, {"difference": max(parts) if all(map(math.isfinite, parts)) else math.inf}, limit)


# Checks


def machine(args) -> list[Line]:
    """Which machine this is; the rate of a large matrix product, in bfloat16 on CUDA."""
    import torch

    cuda = args.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=args.device).to(dtype) for _ in "ab")
    seconds = min(timed(args.device, lambda: a @ b) for _ in range(10))
    what = f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, matmul"
    return [Line(what, {"tflops": 2 * size**3 / seconds / 1e12})]


def attention(args) -> list[Line]:
    """Attention, plain and injected, with gradients, against float64 on the CPU."""
    import torch
    from test_attention import Case, equations

    import attention as method

    lines = []

    def injected(case, keep, dtype):
        inputs = [getattr(case, name).to(args.device, dtype).requires_grad_() for name in names]
        moved = copy.copy(case)
        vars(moved).update(zip(names, inputs, strict=True))
        with torch.device(args.device):
            out = torch.cat([own.flatten() for own in moved.injected(keep)])
        return [out, *torch.autograd.grad(out.sin().sum(), inputs)]

    def by_equations(case, keep):
        inputs, outs = [getattr(case, name).requires_grad_() for name in names], []
        for b, (first, length) in enumerate(zip(case.first_rows, case.lengths, strict=True)):
            weights = (case.scores[b, : len(case.spans[b])] / 0.3).softmax(-1)
            change = equations(weights, case.spans[b], first, case.heads, keep)
            own = (x[b : b + 1, :, :length] for x in inputs[:3])
            outs.append(change(None, *own, None, 0)[0, :, first:].flatten())
        out = torch.cat(outs)
        return [out, *torch.autograd.grad(out.sin().sum(), inputs)]

    names = ("q", "k", "v", "scores")
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        found, expected = [], []
        for seed, keep in product(range(3 if args.quick else 20), (True, False)):
            found += injected(Case(seed), keep, dtype)
            expected += by_equations(Case(seed), keep)
        lines.append(difference(f"injected, equations, {short(dtype)}", found, expected, limit))

    def plain(rows, dtype, device):
        """Causal attention, or that of `rows` rows over a cached prefix."""
        g = torch.Generator().manual_seed(0)
        shapes = ((2, 8, rows or 300, 64), (2, 2, 300, 64), (2, 2, 300, 64))
        inputs = [torch.randn(shape, generator=g).to(device, dtype).requires_grad_() for shape in shapes]
        own = torch.ones(rows or 300, 300, dtype=torch.bool, device=device).tril(300 - (rows or 300))
        out = method.attention(*inputs, own.expand(2, -1, -1) if rows else None)
        return [out, *torch.autograd.grad(out.float().sin().sum(), inputs)]

    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        for rows, what in (
            (None, "causal"),
            (17, "few rows over a prefix"),
            (200, "many rows over a prefix"),
        ):
            found = plain(rows, dtype, args.device)
            expected = plain(rows, torch.float64, torch.device("cpu"))
            lines.append(difference(f"{what}, {short(dtype)}", found, expected, limit))
    return lines


def bias(args) -> list[Line]:
    """The injected heads' attention at real shapes, with PyTorch's fused kernel, against float64.

    Where only the bias has a gradient (the first injected layer of a frozen judge), that kernel's backward
    reads memory that is not there, pytorch issue 148476; injected_attention works around it.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from attention import Injection, injected_attention, log_softmax_scores

    def gradients(dim, keys, alone, device, dtype):
        g = torch.Generator().manual_seed(keys)
        q, k, v = (torch.randn(2, 3, n, dim, generator=g).to(device, dtype) for n in (17, keys, keys))
        scores = torch.randn(2, 16, generator=g).to(device, dtype).requires_grad_()
        inputs = [scores] if alone else [scores, *(x.requires_grad_() for x in (q, k, v))]
        documents = (torch.arange(keys - 17, device=device) // 60).clamp(max=16).expand(2, -1)
        present = torch.ones(2, 16, dtype=torch.bool, device=device)
        visible = torch.ones(17, keys, dtype=torch.bool, device=device).tril(keys - 17).expand(2, -1, -1)
        injection = Injection(log_softmax_scores(scores, present, 0.3), documents, {})
        out = injected_attention(q, k, v, visible, injection)
        return [out, *torch.autograd.grad(out.sin().sum(), inputs)]

    lines = []
    kernels = {"the default kernel": nullcontext}
    if args.device.type == "cuda":
        kernels["the fused kernel"] = lambda: sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION])
    for (name, kernel), alone in product(kernels.items(), (True, False)):
        found, expected = [], []
        for dim, keys in product((64, 128), (1003, 1024)):
            with kernel():
                found += gradients(dim, keys, alone, args.device, torch.float32)
            expected += gradients(dim, keys, alone, torch.device("cpu"), torch.float64)
        what = f"{name}, gradient of {'the bias alone' if alone else 'everything'}"
        lines.append(difference(what, found, expected, 1e-4))
    return lines


def step(args) -> list[Line]:
    """The training step, chunked, over a cached prefix, against one plain graph in float64 on the CPU."""
    import torch
    from test_dream import HEADS, plain_step
    from test_dream import step as one_step
    from tiny import world

    from attention import head_tensors
    from dream import Dream
    from related.qrhead import Reader

    lines = []
    for rows_injected in ("target",) if args.quick else ("target", "suffix"):
        judge, retriever, builder, rows = world(args.folder / "world")
        sums, expected = plain_step(judge, retriever, builder, rows, rows_injected)
        for dtype, limit in ((torch.float64, 1e-7), (torch.float32, 1e-3)):  # a step's sums are float32
            judge, retriever = judge.to(args.device, dtype), retriever.to(args.device, dtype)
            retriever.dtype = dtype
            for again in (False, True):
                retriever.decoder.activation_checkpointing = judge.model.activation_checkpointing = again
                retriever.zero_grad()
                objective = Dream(Reader(judge, builder, args.device, 2, rows_injected))
                objective.heads = head_tensors(HEADS, args.device)
                found, gradients = one_step(retriever, objective, rows)
                what = f"{rows_injected} rows, {short(dtype)}" + ", activations again" * again
                own = [found["loss"], torch.cat([g.flatten() for g in gradients])]
                twin = [sums["loss"], torch.cat([g.flatten() for g in expected])]
                lines.append(difference(what, own, twin, limit))
    return lines


def half(args) -> list[Line]:
    """bfloat16 against float32, with the demo's trained network as judge and retriever."""
    import torch

    rows, heads, results = demo_rows(4 if args.quick else 16), None, {}
    for dtype, full in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        settings, models, objective = demo_models(args, dtype, full=full)
        heads = heads or objective.choose(rows)
        use(objective, heads, args.folder)
        losses = [
            float(trained(models, objective, settings, rows[i : i + 4])["loss"]) / 4
            for i in range(0, len(rows), 4)
        ]
        gradient = torch.cat([p.grad.flatten() for p in models.parameters().values() if p.grad is not None])
        with torch.no_grad():
            texts = [document.full_text for row in rows for document in row.documents]
            embeddings = models.retriever.embed(models.retriever.tokenize(texts, "document"))
        results[dtype, full] = torch.tensor(losses), embeddings, gradient
    losses, embeddings, gradient = results[torch.float32, False]
    lines = []
    for full in (False, True):
        own = results[torch.bfloat16, full]
        what = "all weights, autocast: " if full else "LoRA: "
        mean = float((own[0] - losses).abs().mean())
        least = float((own[1] * embeddings).sum(-1).min())
        lines.append(Line(what + "losses apart, nats", {"difference": mean}, 0.1))
        lines.append(Line(what + "embeddings, 1 - least cosine", {"difference": 1 - least}, 0.02))
    cosine = float(torch.cosine_similarity(results[torch.bfloat16, False][2], gradient, dim=0))
    return [*lines, Line("LoRA: gradients, 1 - cosine", {"difference": 1 - cosine}, 0.1)]


def search(args) -> list[Line]:
    """Encoding, exact search and NDCG@10 on the device are those of the CPU."""
    import torch

    import eval as yardstick
    from dream import DEMO
    from formats.catalogue import resolve_dataset
    from formats.embedders import load_embedder

    dataset = resolve_dataset(str(DEMO / "dev"), "dev")
    texts, cpu = list(dataset.queries.values()), torch.device("cpu")
    both = [load_embedder(DEMO / "checkpoint", device, torch.float32) for device in (args.device, cpu)]
    found, expected = ([own.encode(texts, "query")] for own in both)
    lines = [difference("embeddings, float32", found, expected, 1e-4)]
    found, expected = (yardstick.evaluate_embedder(own, dataset)["metrics"]["ndcg@10"] for own in both)
    lines.append(Line("NDCG@10", {"difference": abs(found - expected)}, 1e-3))
    g = torch.Generator().manual_seed(0)
    count = 2000 if args.quick else 100_000
    queries, documents = (
        torch.nn.functional.normalize(torch.randn(n, 256, generator=g)) for n in (64, count)
    )
    for dtype in (torch.float32, torch.float16):
        own = documents.to(dtype)
        (found, ids), (expected, _) = (
            yardstick.search(queries.to(device), own.to(device), 100) for device in (args.device, cpu)
        )
        lines.append(difference(f"search, scores, {short(dtype)}", [found], [expected], 1e-5))
        looked_up = (queries[:, None] * own[ids.cpu()].float()).sum(-1)  # the indices belong to the scores
        lines.append(difference(f"search, indices, {short(dtype)}", [looked_up], [expected], 1e-5))
    return lines


def waits(args) -> list[Line] | str:
    """How often the host waits for the GPU in a training step, by PyTorch's own count; it never should."""
    import torch

    if args.device.type != "cuda":
        return CUDA_ONLY
    import dream

    lines = []
    for name in dream.OBJECTIVES:
        settings, models, objective = demo_models(args, torch.bfloat16, objective=name, full=False)
        rows = demo_rows(16)
        use(objective, objective.choose(rows), args.folder)
        optimizer = dream.make_optimizer(models.parameters(), settings)
        for number in range(4):  # the first ones fill the caches
            batch = dream.prepare(models.retriever, objective, rows, (0, number))
            torch.cuda.synchronize()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn" if number == 3 else "default")
                dream.take_step(models.retriever, objective, optimizer, batch, settings, (0, number, 0))
                torch.cuda.set_sync_debug_mode("default")
        places = [
            f"{Path(w.filename).name}:{w.lineno}"
            for w in caught
            if "called a synchronizing" in str(w.message)
        ]
        told = f" ({', '.join(sorted(set(places)))})" if places else ""
        lines.append(Line(f"{name}: waits of one step{told}", {"count": len(places)}, 0))
    return lines


def memory(args) -> list[Line] | str:
    """With too little memory, encoding halves its batches, and training names the flag to lower."""
    import torch

    if args.device.type != "cuda":
        return CUDA_ONLY

    import dream
    from model import Embedder
    from related.infonce import InfoNCE
    from support.files import InputError

    decoder = network({**QWEN, "num_hidden_layers": 4}, args, torch.float32).model
    embedder = Embedder(decoder, word_tokenizer(), 512)
    texts = words(512, 400)
    expected = embedder.encode(texts, "document", 8192)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(args.device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 3e9) / total)
    found = embedder.encode(texts, "document", 10**9)
    lines = [difference("a batch is halved: embeddings", [found], [expected], 1e-4)]
    decoder.requires_grad_()
    settings, objective = dream.Settings(temperature=0.05), InfoNCE()
    optimizer = dream.make_optimizer(dream.Models(embedder, None, None).parameters(), settings)
    batch = dream.prepare(embedder, objective, training_rows(32, 400), (0, 0))
    try:
        dream.take_step(embedder, objective, optimizer, batch, settings, (0, 0, 0))
        told = False
    except InputError as error:
        told = "--retriever-batch" in str(error)
    return [*lines, Line("training out of memory: untold", {"count": 0 if told else 1}, 0)]


def processes(args) -> list[Line]:
    """torchrun, one process a GPU: train two steps, evaluate. Then nccl itself, in a group of one."""
    import torch

    import dream
    import eval as yardstick
    from related import infonce
    from support import launch, runs

    count = max(torch.cuda.device_count(), 1) if args.device.type == "cuda" else 1
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    run, scores = args.folder / "run", args.folder / "scores.json"
    short_run = f"train --steps 2 --batch 8 --head-examples 8 --device {args.device.type}".split()
    commands = [["dream.py", *short_run, "--out", run]]
    commands += [["eval.py", "--dataset", "demo", "--model", run, "--json", scores]]
    commands[1] += ["--device", args.device.type]
    for command in commands:
        subprocess.run([*runner, *map(str, command)], cwd=ROOT, check=True)
    results = json.loads((run / "results.json").read_text())["after"][0]["metrics"]
    again = json.loads(scores.read_text())["results"][0]["metrics"]
    apart = abs(results["ndcg@10"] - again["ndcg@10"])
    lines = [Line(f"torchrun, {count}: NDCG@10 after training, by eval.py", {"difference": apart}, 1e-3)]

    # join_processes leaves one process alone without a group; nccl's calls are the same in a group of one.
    backend = "cpu:gloo,cuda:nccl" if args.device.type == "cuda" else "gloo"
    store = torch.distributed.FileStore(str(args.folder / "store"), 1)
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    _, models, _ = demo_models(args, torch.float32, objective="infonce", full=False)
    parameters = list(models.parameters().values())
    for parameter in parameters:
        torch.distributed.broadcast(parameter.data, src=0)
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in parameters]
    sums = launch.add_up({"loss": torch.ones((), device=args.device)}, parameters)
    found = [parameter.grad for parameter in parameters] + [sums["loss"]]
    lines.append(difference(f"{backend}: add_up", found, [*before, torch.ones(())], 0))
    rows = torch.randn(6, 4, device=args.device, requires_grad=True)
    gathered = infonce._GatherRows.apply(rows)
    gathered.square().sum().backward()
    lines.append(difference("gather_rows", [gathered, rows.grad], [rows, 2 * rows], 0))
    scores, indices = yardstick.search(rows.detach(), rows.detach(), 6)
    merged = launch.merge_hits(scores, indices, 6, 1)
    lines.append(difference("hits of all processes", merged, [scores, indices], 0))
    assert runs.Interrupt().agreed() is None
    torch.distributed.barrier()
    launch.leave_processes()
    assert dream.launch.join_processes() == (0, 1)
    return lines


# Timings


def timed(device, work) -> float:
    import torch

    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def qwen(args) -> list[Line]:
    return speed(args, QWEN)


def llama(args) -> list[Line]:
    return speed(args, LLAMA)


def speed(args, figures) -> list[Line]:
    """Random weights at a real size: training steps of 16 rows x 4 x 128 tokens, LoRA r=16; encoding."""
    import torch

    import dream
    import eval as yardstick
    from attention import head_tensors
    from data import PromptBuilder
    from model import Embedder, add_lora
    from related.infonce import InfoNCE
    from related.qrhead import Reader
    from support import launch

    cuda, count = args.device.type == "cuda", 2 if args.quick else 16
    dtype = torch.bfloat16 if cuda else torch.float32
    decoder = network(figures, args, dtype).model
    add_lora(decoder, 16, 32)
    retriever = Embedder(decoder, word_tokenizer(), 512)
    shape = decoder.config.num_hidden_layers, decoder.config.num_attention_heads
    middle = list(product(range(shape[0] // 3, 2 * shape[0] // 3), range(shape[1])))
    heads = random.Random(0).sample(middle, min(16, len(middle)))
    rows = training_rows(count * (2 if args.quick else 8), 16 if args.quick else 128)
    lines = []

    def steps(what, objective, number, **sizes):
        settings = dream.Settings(temperature=0.05, **sizes)
        parameters = dream.Models(retriever, None, None).parameters()
        optimizer = dream.make_optimizer(parameters, settings)

        def batches(first, number):  # tokenised in the background, as in a training
            some = (
                [rows[(i * count + j) % len(rows)] for j in range(count)]
                for i in range(first, first + number)
            )
            own = (dream.prepare(retriever, objective, own, (0, i)) for i, own in enumerate(some))
            return launch.one_ahead(own)

        def work(first, number):
            tokens = [
                dream.take_step(retriever, objective, optimizer, batch, settings, (0, 0, 0))["tokens"]
                for batch in batches(first, number)
            ]
            totals.append(sum(map(float, tokens)))

        totals: list[float] = []
        work(0, 1 if args.quick else 4)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = timed(args.device, lambda: work(4, number))
        found = {"seconds_per_step": seconds / number, "tokens_per_s": totals[-1] / seconds}
        if cuda:
            found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        lines.append(Line(what, found))

    number, whole = 2 if args.quick else 16, dict(judge_batch=16, retriever_batch=128)

    steps("InfoNCE step, default batches", InfoNCE(), number)
    steps("InfoNCE step, one batch", InfoNCE(), number, **whole)
    judge = network(figures, args, dtype)
    builder = PromptBuilder(word_tokenizer(), 4096, 16, "Read: {documents} {query} {target}")

    def dreaming(together):
        objective = dream.Dream(Reader(judge, builder, args.device, together))
        objective.heads = head_tensors(heads, args.device)
        return objective

    steps("DREAM step, default batches", dreaming(4), number)
    steps("DREAM step, one batch", dreaming(16), number, **whole)
    if cuda:  # its kernels are made anew for every new shape
        torch.backends.cuda.enable_cudnn_sdp(False)
        steps("DREAM step, one batch, no cuDNN attention", dreaming(16), number, **whole)
        torch.backends.cuda.enable_cudnn_sdp(True)
    embedder = Embedder(judge.model, word_tokenizer(), 512)
    texts = words(40 if args.quick else 8000, 250, 6)
    for budget in (None, 131_072):
        embedder.encode(texts[: len(texts) // 4], "document", budget)
        seconds = timed(args.device, lambda own=budget: embedder.encode(texts, "document", own))
        tokens = sum(len(text.split()) for text in texts)
        size = budget or yardstick.BATCH_TOKENS[args.device.type]
        lines.append(Line(f"encoding, batches of {size:,} tokens", {"tokens_per_s": tokens / seconds}))
    return lines


def million(args) -> list[Line]:
    """Exact search: 1M x 896 in float16, 256 queries, k = 100."""
    import torch

    import eval as yardstick

    count = 20_000 if args.quick else 1_000_000
    parts = [torch.randn(20_000, 896, device=args.device) for _ in range(count // 20_000)]
    documents = torch.cat([torch.nn.functional.normalize(part).half() for part in parts])
    queries = torch.nn.functional.normalize(torch.randn(256, 896, device=args.device))
    lines = []
    for where, own in (("on the device", documents), ("in the host's memory", documents.cpu())):
        repeats = [timed(args.device, lambda d=own: yardstick.search(queries, d, 100)) for _ in range(4)]
        lines.append(Line(f"search of {count:,} x 896, {where}", {"seconds": sorted(repeats[1:])[1]}))
    return lines


def learn(args) -> list[Line]:
    """200 DREAM steps, and NDCG@10 before and after: of --model on --rows and --dev, or of the demo."""
    import torch

    import dream
    from eval import evaluate_embedder
    from formats.catalogue import resolve_dataset
    from formats.embedders import load_embedder
    from support.launch import pick_dtype

    run, number = args.folder / "learnt", 4 if args.quick else 200
    flags = ["--steps", str(number), "--out", str(run), "--device", args.device.type]
    if args.model:
        start, dev, split = args.model, args.dev, args.dev_split
        flags += ["--train", args.rows, "--judge", start, "--retriever", start]
        flags += ["--dev", dev, "--dev-split", split, "--eval-every", str(number)]
    else:
        start, dev, split = str(dream.DEMO / "checkpoint"), str(dream.DEMO / "dev"), "dev"
    flags += ["--batch", "8", "--head-examples", "8"] if args.quick else []
    dtype, _ = pick_dtype(None, args.device)
    dataset = resolve_dataset(dev, split)

    def ndcg(name):
        return evaluate_embedder(load_embedder(name, args.device, dtype), dataset)["metrics"]["ndcg@10"]

    figures = {"before": ndcg(start)}
    if status := dream.main(["train", *flags]):
        raise RuntimeError(f"dream.py train ended with status {status}")
    figures["after"] = ndcg(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line][number // 10 :]
    seconds = sum(line["time"]["seconds"] for line in steps)
    figures["seconds_per_step"] = seconds / len(steps)
    figures["tokens_per_s"] = sum(line["tokens"] for line in steps) / seconds
    if args.device.type == "cuda":
        figures["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    name = Path(args.model).name if args.model else "the demo"
    return [Line(f"{number} DREAM steps on {name}, dev NDCG@10", figures)]


# What several of them need


def short(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def network(figures, args, dtype):
    """A frozen network of random weights; with --quick a tiny one of the same family."""
    import torch

    from formats.checkpoints import read_config
    from model import CausalLM

    figures = {**figures, **(TINY if args.quick else {}), "tie_word_embeddings": True, "eos_token_id": 0}
    (args.folder / "config.json").write_text(json.dumps({**figures, "max_position_embeddings": 8192}))
    torch.manual_seed(0)
    with torch.device(args.device):
        made = CausalLM(read_config(args.folder / "config.json"))
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return made.requires_grad_(False).eval().to(dtype)


def word_tokenizer():
    """One token a word: w1 to w5999."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, 6000)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def words(count, most, least=None) -> list[str]:
    """Texts of words that are tokens."""
    draw = random.Random(0)
    sizes = (draw.randint(least or most, most) for _ in range(count))
    return [" ".join(f"w{draw.randrange(1, 6000)}" for _ in range(size)) for size in sizes]


def training_rows(count, size):
    """Rows of four documents of about `size` tokens."""
    from data import Document, Row

    texts = iter(words(count * 4, size + size // 8, size - size // 8))
    asked = iter(words(count * 2, 16))
    return [
        Row(i, next(asked), next(asked), [Document("", next(texts)) for _ in range(4)], 0)
        for i in range(count)
    ]


def demo_rows(count):
    from data import Rows
    from dream import DEMO

    rows = Rows(DEMO / "dev.jsonl", 8)
    return [rows[i] for i in range(count)]


def demo_models(args, dtype, **changes):
    """The demo's network as judge and retriever, as `dream.py train` builds them."""
    import dream

    settings = dream.Settings(**{**dream.demo_settings(), "max_length": 512, "judge_batch": 4, **changes})
    settings = dream.complete(settings, sys.exit)
    models = dream.build_models(settings, args.device, dtype, None)
    return settings, models, dream.build_objective(settings, models, args.device)


def use(objective, chosen, folder) -> None:
    (folder / "heads.json").write_text(json.dumps(chosen))
    objective.use(folder / "heads.json")


def trained(models, objective, settings, rows):
    """A training step's sums; the gradients are added to what is there."""
    import dream

    batch = dream.prepare(models.retriever, objective, rows, (0, 0))
    return dream.training_step(models.retriever, objective, batch, settings.temperature)


# Running them


@dataclass
class Part:
    """One check or timing. seconds: its limit; status: ok, failed, out of time, not run, only on CUDA."""

    name: str
    seconds: int
    status: str = "not run"
    took: float = 0.0
    lines: list[dict] = field(default_factory=list)
    log: str = ""  # the end of what it printed, where it failed

    @property
    def fine(self) -> bool:
        return self.status in ("ok", CUDA_ONLY)


CHECKS = {f.__name__: f for f in (machine, attention, bias, step, half, search, waits, memory, processes)}
TIMINGS = {f.__name__: f for f in (qwen, llama, million, learn)}
PARTS = CHECKS | TIMINGS
LIMITS = {"processes": 150, "qwen": 100, "llama": 120, "learn": 200}  # seconds; the others have 90


def run_one(args) -> None:
    """In its own process: the part's lines, into a file."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # tests import one another by their bare names
    from support.launch import pick_device

    args.device = pick_device(args.device)
    lines = PARTS[args.one](args)
    told = lines if isinstance(lines, str) else [asdict(line) | {"ok": line.ok} for line in lines]
    (args.folder / "result.json").write_text(json.dumps(told))


def run_part(part: Part, argv: list[str], folder: Path, left: float) -> None:
    """Run a part in a process group of its own, which ends with it or at the time limit."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        *argv,
        "--folder",
        str(folder),
        "--one",
        part.name,
    ]
    began = time.perf_counter()
    with open(folder / "log", "w+", errors="replace") as log:
        options = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, cwd=ROOT, **options)
        try:
            part.status = "failed" if process.wait(min(part.seconds, left)) else "ok"
        except subprocess.TimeoutExpired:
            part.status = "out of time"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        log.seek(0)
        printed = log.read()
    part.took = round(time.perf_counter() - began, 1)
    if part.status == "ok":
        told = json.loads((folder / "result.json").read_text())
        part.status, part.lines = (told, []) if isinstance(told, str) else ("ok", told)
        if not all(line["ok"] for line in part.lines):
            part.status = "failed"
    if not part.fine:
        part.log = printed[-4000:]
    shutil.rmtree(folder, ignore_errors=True)


def table(parts: list[Part]) -> str:
    """All parts, aligned; a line each for what they found."""
    rows = [["part", "what", "found", "limit", "result"]]
    for part in parts:
        if not part.lines:
            last = part.log.strip().splitlines()[-1:] or [""]
            rows.append([part.name, last[0][:60], "", "", part.status])
        for line in part.lines:
            found = "  ".join(SHOWN[name].format(value) for name, value in line["figures"].items())
            limit = "" if line["limit"] is None else f"{line['limit']:g}"
            result = ("ok" if line["ok"] else "FAILED") if limit else ""
            rows.append([part.name, line["what"], found, limit, result])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        "tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rewritten after each part")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of all parts (default: {SECONDS})")
    parser.add_argument("--model", metavar="DIR", help="a real checkpoint, for `learn`; judge and retriever")
    parser.add_argument("--rows", metavar="FILE", help="its training rows")
    parser.add_argument("--dev", metavar="DIR", help="its dataset")
    parser.add_argument("--dev-split", default="dev", help="of --dev (default: dev)")
    parser.add_argument("--folder", type=Path, help="for temporary files")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.model and not (args.rows and args.dev):
        parser.error("--model needs --rows and --dev")
    if args.one:
        run_one(args)
        return 0
    if args.quick:  # tiny tensors: threads cost more than they give
        os.environ["OMP_NUM_THREADS"] = "1"
    argv = ["--device", args.device] + ["--quick"] * args.quick
    for name in ("model", "rows", "dev"):
        if value := getattr(args, name):
            argv += [f"--{name}", str(Path(value).resolve())]
    argv += ["--dev-split", args.dev_split]
    parts = [Part(name, LIMITS.get(name, 90)) for name in args.only]
    end = time.perf_counter() + args.seconds

    def write() -> None:
        if args.json:
            record = {"device": args.device, "quick": args.quick, "parts": list(map(asdict, parts))}
            args.json.write_text(json.dumps(record, indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix="gpu-", dir=args.folder) as folder:
        for part in parts:
            write()
            if (left := end - time.perf_counter()) < 5:
                continue
            run_part(part, argv, Path(folder) / part.name, left)
            print(f"{part.name}: {part.status}, {part.took} s", flush=True)
            if part.log:
                print(part.log, flush=True)
    write()
    print("", table(parts), sep="\n", flush=True)
    return 0 if all(part.fine for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
