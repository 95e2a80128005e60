"""Speed and memory against opponents that do the same work, interleaved in one process, medians of repeats.

    python -m tests.bench                             every row, on the GPU where there is one
    python -m tests.bench --only judge step           some rows
    python -m tests.bench --quick --device cpu        a tenth of the work: does it run?
    python -m tests.bench --json bench.json

Rows: judge, step, injection, encode, scaling, search, metrics, load, startup. A row whose opponent needs a
library that is not installed says so (sentence-transformers, faiss-cpu, pytrec_eval-terrier). Random weights:
on a CPU a small network in float32, on a GPU two real sizes in bfloat16. The ratio is ours / theirs; targets
are upper bounds of it.
"""

import argparse
import importlib.util
import json
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

import eval as yardstick
import model
from attention import Injection, attention, document_bias, head_tensors, log_softmax_scores
from data import Document, Prompt, PromptBuilder, Row, collate, pad, token_batches
from dream import GROUP_TOKENS, Dream, prepare, training_step
from formats.checkpoints import Checkpoint, read_config, save_weights
from formats.datasets import load_dataset
from formats.embedders import load_embedder, save_embedder
from related.qrhead import Reader
from support.launch import pick_device

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
FIGURES += ("num_key_value_heads", "vocab_size")
SIZES = {  # the FIGURES of each network
    "small": (256, 704, 8, 8, 2, 6144),
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151936),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128256),
    "1 GB": (1024, 2816, 12, 16, 4, 100_000),
}
REAL_TOKENIZER = ROOT.parent / "shared" / "data" / "tokenizer" / "qwen2" / "tokenizer.json"
H200_PEAK = 989e12  # dense bfloat16, per second
CANDIDATES, DOCUMENT_TOKENS, QUERY_TOKENS, TARGET_TOKENS, HEADS = 16, 128, 17, 16, 16
BATCH_SIZES = (16, 32, 64, 128)  # of sentence-transformers; its best counts
Works = dict[str, Callable[[], object]]


@dataclass
class Line:
    """One comparison; unit: s, MB or %."""

    work: str
    opponent: str
    ours: float
    theirs: float | None = None  # None: not installed, or nothing to compare with
    target: str = "-"
    reached: bool | None = None
    unit: str = "s"
    tokens_per_s: float | None = None
    utilisation: float | None = None  # useful operations per second / the machine's
    network: str = ""


def compare(
    work: str, opponent: str, ours: float, theirs: float | None, limit: float, slack=0.0, floor=False, **more
) -> Line:
    """A line whose target is ours <= limit * theirs + slack seconds.

    floor: theirs is a part of our work, so less than it is an error of the measurement, and not a success.
    """
    target = f"<= {limit:.2f}x" + (f" + {slack} s" if slack else "")
    reached = None if theirs is None else ours <= limit * theirs + slack
    if floor and theirs is not None and ours < 0.97 * theirs:
        reached, target = None, f"{target} (below its floor: noise)"
    return Line(work, opponent, ours, theirs, target, reached, **more)


# Measuring


class World:
    """What all rows share: the device, a network's size, how often to repeat, a folder for files."""

    def __init__(self, args: argparse.Namespace, network: str, folder: Path):
        self.args, self.network, self.folder = args, network, folder
        self.device = pick_device(args.device)
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.peak = H200_PEAK if self.cuda else 0.0

    def size(self, full: int) -> int:
        return max(full // 10, 1) if self.args.quick else full

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def medians(self, works: Works, repeats: int | None = None) -> dict[str, float]:
        """Median seconds of each work: all once as a warm-up, then in turns."""
        times = {name: [] for name in works}
        for turn in range((repeats or self.args.repeats) + 1):
            for name, work in works.items():
                self.synchronize()
                start = time.perf_counter()
                work()
                self.synchronize()
                if turn:
                    times[name].append(time.perf_counter() - start)
        return {name: statistics.median(own) for name, own in times.items()}

    def peaks(self, row: str, works: Works) -> dict[str, float]:
        """Megabytes each work adds at most: by CUDA's allocator, or on a CPU in a process of its own."""
        peaks = {}
        for name, work in works.items():
            if self.cuda:
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                work()
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
                continue
            command = [sys.executable, "-m", "tests.bench", "--peak", row, name, "--device", "cpu"]
            command += ["--folder", str(self.folder), "--quick" if self.args.quick else "--no-quick"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
            peaks[name] = float(done.stdout.split()[-1])
        return peaks

    def utilisation(self, operations: float, seconds: float) -> float:
        if not self.peak:  # of this machine: a large matrix product, best of five
            a = torch.randn(2048, 2048)
            self.peak = 2 * 2048**3 / min(self.medians({str(i): lambda: a @ a for i in range(5)}).values())
        return operations / seconds / self.peak


def added_memory(work: Callable[[], object]) -> float:
    """Megabytes of resident memory that one call adds at most, in this process."""

    def resident(name: str) -> float:
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6

    torch.randn(512, 512) @ torch.randn(512, 512)  # the libraries' own buffers
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = resident("VmRSS")
        work()
        return resident("VmHWM") - before
    except OSError:  # no Linux: what building took counts too
        work()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# Networks, texts and prompts


def random_model(world: World, name: str, **changes) -> model.CausalLM:
    """A frozen network of random weights."""
    figures = {**dict(zip(FIGURES, SIZES[name], strict=True)), "model_type": "qwen2", "eos_token_id": 0}
    figures |= {"rope_theta": 1e6, "max_position_embeddings": 8192, "tie_word_embeddings": True, **changes}
    path = world.folder / "config.json"
    path.write_text(json.dumps(figures))
    torch.manual_seed(0)
    with torch.device(world.device):
        network = model.CausalLM(read_config(path))
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return network.requires_grad_(False).eval().to(world.dtype)


def word_tokenizer() -> Tokenizer:
    """One token a word: w1 to w5999."""
    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, 6000)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def make_rows(count: int, spread: int = 0) -> list[Row]:
    """Rows of CANDIDATES documents, DOCUMENT_TOKENS long, give or take `spread`."""
    draw = random.Random(0)

    def words(size: int) -> str:
        return " ".join(f"w{draw.randrange(1, 6000)}" for _ in range(size))

    def document() -> Document:
        return Document("", words(DOCUMENT_TOKENS - 1 + draw.randint(-spread, spread)))  # and its marker

    return [
        Row(i, words(QUERY_TOKENS), words(TARGET_TOKENS), [document() for _ in range(CANDIDATES)], 0)
        for i in range(count)
    ]


def forward_operations(config: model.Config, lengths: list[int], start: int = 0, layers: int | None = None):
    """Multiplications and additions of a decoder over texts, from row `start` on; causal attention halved."""
    layers = config.num_hidden_layers if layers is None else layers
    q_size, size = config.num_attention_heads * config.head_dim, config.hidden_size
    kv_size = config.num_key_value_heads * config.head_dim
    weights = 2 * size * (q_size + kv_size) + 3 * size * config.intermediate_size
    linear = 2 * weights * sum(n - start for n in lengths)
    return layers * (linear + 2 * q_size * sum(n * n - start * start for n in lengths))


class Bench:
    """A judge, its heads (16 in the middle third of the layers), prompts; a retriever with adapters."""

    def __init__(self, world: World, num_rows: int, spread: int = 0):
        self.world, self.device = world, world.device
        self.judge = random_model(world, world.network)
        self.config = self.judge.config
        layers, heads = self.config.num_hidden_layers, self.config.num_attention_heads
        middle = [(layer, head) for layer in range(layers // 3, 2 * layers // 3) for head in range(heads)]
        self.first_layer = layers // 3
        self.heads = head_tensors(random.Random(0).sample(middle, HEADS), self.device)
        self.builder = PromptBuilder(
            word_tokenizer(), 8192, TARGET_TOKENS, "Read: {documents} {query} {target}"
        )
        self.rows = make_rows(num_rows, spread)
        self.prompts = self.builder.build(self.rows)
        decoder = random_model(world, world.network).model
        model.add_lora(decoder, 16, 32)
        self.retriever = model.Embedder(decoder, word_tokenizer(), 512).train()

    def whole(self, prompts: list[Prompt]) -> torch.Tensor:
        return pad([prompt.input_ids[:-1] for prompt in prompts], self.device)[0]

    def injection(self, log_weights: torch.Tensor, prompts: list[Prompt]) -> tuple[Injection, int]:
        """For prompts that are read in one go, all of one length: what is injected, and from which row on."""
        (start,) = {prompt.question_start for prompt in prompts}
        documents = collate(prompts, self.device, "suffix").documents
        return Injection(log_weights, documents, self.heads), start

    def whole_loss(self, hidden: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
        logits = self.judge.lm_head(hidden)  # (B, T, V) everywhere
        own = [range(p.target_start - 1, len(p.input_ids) - 1) for p in prompts]
        rows = torch.cat([logits[b, list(rows)] for b, rows in enumerate(own)])
        ids = torch.tensor([i for p in prompts for i in p.input_ids[p.target_start :]], device=self.device)
        return F.cross_entropy(rows.float(), ids)


def after_documents(injection: Injection, start: int) -> model.Change:
    """The injection, of the rows from `start` on, in a prompt that is read in one go."""

    def change(out, q, k, v, visible, layer):
        rows = torch.arange(start, q.shape[2], device=q.device)
        visible = (torch.arange(q.shape[2], device=q.device) <= rows[:, None]).expand(len(q), -1, -1)
        injected = injection(out[:, :, start:], q[:, :, start:], k, v, visible, layer)
        return torch.cat([out[:, :, :start], injected], dim=2)

    return change


def naive(injection: Injection, start: int) -> model.Change:
    """The same by full matrices of logits, bias and softmax, for all heads of an injected layer."""

    def change(out, q, k, v, visible, layer):
        if layer not in injection.heads:
            return attention(q, k, v, visible)
        group, rows = q.shape[1] // k.shape[1], torch.arange(q.shape[2], device=q.device)
        k, v = (x.repeat_interleave(group, 1).float() for x in (k, v))
        logits = q.float() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, Hq, T, T)
        heads = injection.heads[layer]
        documents = F.pad(injection.documents, (0, q.shape[2] - start), value=CANDIDATES)
        own = document_bias(logits[:, heads], documents, injection.log_weights)
        index = documents[:, None, None].expand(-1, len(heads), q.shape[2], -1)
        own = F.pad(own, (0, 1)).gather(-1, index)  # (B, H, T, T)
        own = own.masked_fill((rows < start)[:, None], 0.0)
        bias = torch.zeros_like(logits).index_copy(1, heads, own)
        bias = bias.masked_fill(rows[:, None] < rows, -torch.inf)
        return ((logits + bias).softmax(-1) @ v).to(q.dtype)

    return change


# Rows: judge, step, injection


def judge_works(world: World) -> Works:
    """From embeddings to their gradient, through the judge."""
    count = 8 if world.cuda else 2
    bench = Bench(world, world.size(count))
    generator = torch.Generator().manual_seed(0)
    shape = (len(bench.rows), 1 + CANDIDATES, bench.config.hidden_size)
    embeddings = F.normalize(torch.randn(shape, generator=generator), dim=-1).to(world.device)
    batch = collate(bench.prompts, world.device, "suffix")

    def gradient(objective) -> torch.Tensor:
        leaf = embeddings.clone().requires_grad_()
        scores = torch.einsum("bc,bnc->bn", leaf[:, 0], leaf[:, 1:])
        objective(log_softmax_scores(scores, batch.present, 0.05)).backward()
        return leaf.grad

    def ours() -> torch.Tensor:
        def loss(weights: torch.Tensor) -> torch.Tensor:
            injection = Injection(weights, batch.documents, bench.heads)
            return model.target_loss(bench.judge, batch, change=injection).mean()

        return gradient(loss)

    def theirs() -> torch.Tensor:
        def loss(weights: torch.Tensor) -> torch.Tensor:
            change = naive(*bench.injection(weights, bench.prompts))
            return bench.whole_loss(
                bench.judge.model(bench.whole(bench.prompts), None, change), bench.prompts
            )

        model.attention = lambda q, k, v, visible=None: q  # the change does all of it, nothing is done twice
        try:
            return gradient(loss)
        finally:
            model.attention = attention

    world.bench = bench
    return {"ours": ours, "theirs": theirs}


def judge_row(world: World) -> list[Line]:
    works = judge_works(world)
    bench, ours, theirs = world.bench, works["ours"](), works["theirs"]()
    difference = float((ours - theirs).norm() / theirs.norm())
    assert difference < (0.2 if world.cuda else 1e-3), f"the gradients differ by {difference:.2g}"
    times = world.medians(works)
    lengths = [len(prompt.input_ids) - 1 for prompt in bench.prompts]
    start, layers = bench.prompts[0].question_start, bench.config.num_hidden_layers - bench.first_layer
    operations = forward_operations(bench.config, lengths)
    operations += forward_operations(bench.config, lengths, start, layers)  # back to the first injected layer
    more = {"tokens_per_s": sum(lengths) / times["ours"]}
    more["utilisation"] = world.utilisation(operations, times["ours"])
    peaks = world.peaks("judge", works)
    return [
        compare("judge: scores' gradient", "one plain graph", times["ours"], times["theirs"], 0.5, **more),
        compare("judge: memory", "one plain graph", peaks["ours"], peaks["theirs"], 0.25, unit="MB"),
    ]


def step_works(world: World) -> Works:
    """A training step in one chunk and in four, and the parts of its floor."""
    bench = Bench(world, world.size(16 if world.cuda else 4), spread=DOCUMENT_TOKENS // 4)
    judge_batch = 8 if world.cuda else 2
    retriever, rows = bench.retriever, bench.rows
    texts = [row.query for row in rows] + [d.text for row in rows for d in row.documents]
    ids = retriever.tokenize(texts, "document")
    objective = Dream(Reader(bench.judge, bench.builder, bench.device, judge_batch))
    objective.heads = bench.heads

    def step(retriever_batch: int) -> Callable[[], object]:
        def work() -> float:
            batch = prepare(retriever, objective, rows, (0, 1))
            stats = training_step(retriever, objective, batch, 0.05, retriever_batch)
            retriever.zero_grad()
            return float(stats["loss"])

        return work

    @torch.no_grad()
    def judge() -> None:
        prompts = sorted(bench.prompts, key=lambda prompt: -len(prompt.input_ids))
        for first in range(0, len(prompts), judge_batch):
            bench.judge.model(bench.whole(prompts[first : first + judge_batch]))

    def embed(budget: int, graph: bool) -> Callable[[], None]:
        groups = token_batches(list(map(len, ids)), budget)

        def work() -> None:
            with torch.set_grad_enabled(graph):
                for group in groups:
                    out = retriever.embed([ids[i] for i in group])
                    if graph:
                        out.sum().backward()
            retriever.zero_grad()

        return work

    if world.args.peak:  # memory: in the step's own groups
        fastest = dict.fromkeys((True, False), GROUP_TOKENS[world.device.type])
    else:  # a floor is one only in its best batches: little padding on a CPU, full ones on a GPU
        budgets = (512, 1024, 2048, 4096) if not world.cuda else (4096, 8192, 16_384)
        fastest = {}
        for graph in (True, False):
            tried = world.medians({str(size): embed(size, graph) for size in budgets}, 2)
            fastest[graph] = int(min(tried, key=tried.get))
    world.bench, world.lengths = bench, list(map(len, ids))
    chunked = step(-(-len(ids) // 4))
    works = {"one": step(10**6), "chunked": chunked, "judge": judge}
    return works | {"embed": embed(fastest[True], True), "again": embed(fastest[False], False)}


def step_row(world: World) -> list[Line]:
    works = step_works(world)
    times, bench = world.medians(works), world.bench
    lengths = [len(prompt.input_ids) - 1 for prompt in bench.prompts]
    forward = forward_operations(bench.config, world.lengths)
    judge = forward_operations(bench.config, lengths)
    tokens = sum(lengths) + sum(world.lengths)
    floor = times["judge"] + times["embed"]
    peaks = world.peaks("step", {name: works[name] for name in ("one", "chunked", "embed")})

    def line(work: str, opponent: str, name: str, floor: float, limit: float, passes: int) -> Line:
        seconds = times[name]
        used = world.utilisation(judge + passes * forward, seconds)
        more = {"tokens_per_s": tokens / seconds, "utilisation": used}
        return compare(work, opponent, seconds, floor, limit, floor=True, **more)

    return [
        line("step, one chunk", "floor: judge fw + retriever fw, bw", "one", floor, 1.25, 2),
        line("step, four chunks", "floor + retriever fw", "chunked", floor + times["again"], 1.15, 3),
        Line("step, one chunk: memory", "retriever, group by group", peaks["one"], peaks["embed"], unit="MB"),
        Line("step, four: memory", "retriever, group by group", peaks["chunked"], peaks["embed"], unit="MB"),
    ]


def injection_row(world: World) -> list[Line]:
    """The judge over whole prompts, forward and backward, a graph in every layer; injected and not."""
    bench = Bench(world, world.size(4 if world.cuda else 1))
    prompts, ids = bench.prompts, bench.whole(bench.prompts)
    scores = torch.randn(len(prompts), CANDIDATES, device=world.device)

    def run(inject: bool) -> None:
        own = bench.injection(scores.clone().requires_grad_().log_softmax(-1), prompts)
        leaf = bench.judge.model.embed_tokens.register_forward_hook(lambda m, i, out: out.requires_grad_())
        hidden = bench.judge.model(ids, change=after_documents(*own) if inject else None)
        leaf.remove()
        bench.whole_loss(hidden, prompts).backward()

    times = world.medians({"ours": lambda: run(True), "theirs": lambda: run(False)})
    tokens = ids.numel() / times["ours"]
    args = ("injection, whole prompt fw, bw", "the same, not injected", times["ours"], times["theirs"])
    return [compare(*args, 1.05, tokens_per_s=tokens)]


# Rows: encode, scaling


def encoder(world: World) -> tuple[Path, list[str]]:
    """A folder with an embedder of random weights, and passages of 6 to 250 words, most of them short; the
    words are made of syllables, the same for ever."""
    folder = world.folder / f"encoder-{world.network}"
    real = REAL_TOKENIZER if REAL_TOKENIZER.exists() else ROOT / "demo" / "checkpoint" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(real))
    if not folder.exists():
        network = random_model(world, world.network, vocab_size=max(tokenizer.get_vocab_size(), 151_936))
        save_embedder(model.Embedder(network.model, tokenizer, 512), folder)
    draw = random.Random(0)
    syllables = [consonant + vowel for consonant in "bcdfglmnprst" for vowel in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(1500)]
    sizes = [min(max(round(draw.lognormvariate(3.3, 0.8)), 6), 250) for _ in range(world.size(5000))]
    return folder, [" ".join(draw.choices(words, k=size)) for size in sizes]


def encode_row(world: World) -> list[Line]:
    folder, texts = encoder(world)
    ours = load_embedder(folder, world.device, world.dtype)
    budget = 131_072 if world.cuda else yardstick.BATCH_TOKENS["cpu"]
    lengths = list(map(len, ours.tokenize(texts, "document")))
    works: Works = {"ours": lambda: ours.encode(texts, "document", budget)}
    opponent = "sentence-transformers"
    if installed("sentence_transformers"):
        from sentence_transformers import SentenceTransformer

        options = {"device": str(world.device), "model_kwargs": {"dtype": world.dtype}}
        theirs = SentenceTransformer(str(folder), **options)

        def encode(some: list[str], size: int) -> torch.Tensor:
            return theirs.encode(some, batch_size=size, convert_to_tensor=True, show_progress_bar=False)

        some = texts[: max(len(texts) // 8, 256)]
        tried = world.medians({str(size): lambda s=size: encode(some, s) for size in BATCH_SIZES}, 1)
        best = int(min(tried, key=tried.get))
        opponent += f", batch {best}"
        works["theirs"] = lambda: encode(texts, best)
        difference = float((encode(some, best) - ours.encode(some, "document", budget)).abs().max())
        assert difference < (0.05 if world.cuda else 1e-4), f"the embeddings differ by {difference:.2g}"
    times = world.medians(works, min(world.args.repeats, 3))
    more = {"tokens_per_s": sum(lengths) / times["ours"]}
    more["utilisation"] = world.utilisation(forward_operations(ours.decoder.config, lengths), times["ours"])
    limit = 1 / (1.3 if world.cuda else 1.15)
    batches = token_batches(lengths, budget)
    computed = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    share = 100 * sum(lengths) / computed
    work = f"encode {len(texts):,} passages"
    return [
        compare(work, opponent, times["ours"], times.get("theirs"), limit, **more),
        Line("encode: real tokens of computed", "-", share, None, ">= 97%", share >= 97, "%"),
    ]


def scaling_works(world: World) -> Works:
    """Streamed corpora of one, two and four blocks."""
    folder, texts = encoder(world)
    ours = load_embedder(folder, world.device, world.dtype)
    block = len(texts) // 4

    def work(times: int) -> Callable[[], object]:
        corpus = world.folder / f"corpus-{times}"
        (corpus / "qrels").mkdir(parents=True, exist_ok=True)
        numbered = enumerate(texts[:block] * times)  # a block is encoded by itself: nothing is saved
        documents = (json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i, text in numbered)
        (corpus / "corpus.jsonl").write_text("".join(documents))
        (corpus / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": texts[0]}) + "\n")
        (corpus / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td0\t1\n")
        dataset = load_dataset(corpus, "test")
        return lambda: yardstick.dense_hits(ours, dataset, 100, document_block=block, quiet=True)

    return {"1": work(1), "2": work(2), "4": work(4)}


def scaling_row(world: World) -> list[Line]:
    works = scaling_works(world)
    times = world.medians(works, min(world.args.repeats, 3))
    peaks = world.peaks("scaling", works)
    return [
        compare("2x the passages, time / 2", "1x", times["2"] / 2, times["1"], 1.1),
        compare("4x the passages, time / 4", "1x", times["4"] / 4, times["1"], 1.1),
        compare("4x the passages: memory", "1x", peaks["4"], peaks["1"], 1.1, unit="MB"),
    ]


# Rows: search, metrics, load, startup


def search_row(world: World) -> list[Line]:
    count, k = world.size(200_000), 100
    torch.manual_seed(0)
    documents = F.normalize(torch.randn(count, 1024), dim=-1)
    queries = F.normalize(torch.randn(256, 1024), dim=-1)
    there = queries.to(world.device), documents.to(world.device)
    q, d = queries.numpy(), documents.numpy()

    def by_numpy() -> None:
        products = q @ d.T
        top = np.argpartition(products, -k, axis=1)[:, -k:]
        scores = np.take_along_axis(products, top, 1)
        np.take_along_axis(top, np.argsort(-scores, axis=1), 1)

    works: Works = {
        "ours": lambda: yardstick.search(*there, k),
        "numpy": by_numpy,
        "matmul": lambda: there[0] @ there[1].T,
    }
    if installed("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatIP(1024)
        index.add(d)
        works["faiss"] = lambda: index.search(q, k)
    times = world.medians(works)
    work = f"search {count // 1000}k x 1024, 256 queries"
    return [
        compare(work, "faiss IndexFlatIP (CPU)", times["ours"], times.get("faiss"), 1.0),
        compare(work, "numpy (CPU)", times["ours"], times["numpy"], 1.0),
        compare(work, "torch's bare matmul", times["ours"], times["matmul"], 1.3, floor=True),
    ]


def metrics_row(world: World) -> list[Line]:
    draw, count = random.Random(0), world.size(7000)
    ids = [f"doc-{i}" for i in range(50_000)]
    run, shuffled, qrels = {}, {}, {}
    for number in range(count):
        hits = draw.sample(ids, 1000)
        scores = sorted((draw.random() for _ in hits), reverse=True)  # best first, as make_run leaves them
        pairs = list(zip(hits, scores, strict=True))
        run[f"q{number}"] = dict(pairs)
        draw.shuffle(pairs)
        shuffled[f"q{number}"] = dict(pairs)  # a sort that gains nothing from the order
        judged = draw.sample(hits, draw.randint(1, 20)) + draw.sample(ids, 5)
        qrels[f"q{number}"] = {doc_id: draw.randint(0, 2) for doc_id in judged}
    works: Works = {
        "ours": lambda: yardstick.score_queries(run, qrels),
        "shuffled": lambda: yardstick.evaluate(shuffled, qrels),
    }
    if installed("pytrec_eval"):
        import pytrec_eval

        cut = ",".join(map(str, yardstick.CUTOFFS))
        measures = {f"{name}.{cut}" for name in ("ndcg_cut", "map_cut", "recall", "P")} | {
            "map",
            "recip_rank",
        }
        evaluator = pytrec_eval.RelevanceEvaluator
        works["theirs"] = lambda: evaluator(qrels, measures).evaluate(run)
        works["theirs shuffled"] = lambda: evaluator(qrels, measures).evaluate(shuffled)
    times = world.medians(works, min(world.args.repeats, 3))
    work = f"metrics, {count:,} x 1,000 hits"
    return [
        compare(f"{work}, best first", "pytrec_eval", times["ours"], times.get("theirs"), 2.0),
        compare(f"{work}, shuffled", "pytrec_eval", times["shuffled"], times.get("theirs shuffled"), 2.0),
    ]


def load_works(world: World) -> Works:
    """Read a checkpoint and touch every page."""
    folder = world.folder / "1 GB"
    if not folder.exists():
        network = random_model(SimpleNamespace(**{**vars(world), "dtype": torch.float32}), "1 GB")
        save_weights(network, folder, torch.float32)

    def ours() -> None:
        checkpoint = Checkpoint(folder, world.device, torch.float32)
        sum(float(tensor.sum()) for tensor in checkpoint.tensors.values())

    def theirs() -> None:
        tensors = load_file(folder / "model.safetensors", device=str(world.device))
        sum(float(tensor.sum()) for tensor in tensors.values())

    return {"ours": ours, "theirs": theirs}


def load_row(world: World) -> list[Line]:
    works = load_works(world)
    times, peaks = world.medians(works), world.peaks("load", works)
    size = (world.folder / "1 GB" / "model.safetensors").stat().st_size / 1e6
    return [
        compare("load 1 GB, touch it", "safetensors load_file", times["ours"], times["theirs"], 1.2, 0.3),
        compare("load: memory", "the file's size", peaks["ours"], size, 1.1, unit="MB"),
    ]


def startup_row(world: World) -> list[Line]:
    commands = {"dream.py --help": ["dream.py", "--help"], "import eval": ["-c", "import eval"]}
    commands["import torch"] = ["-c", "import torch"]
    works = {
        name: lambda own=own: subprocess.run(
            [sys.executable, *own], cwd=ROOT, capture_output=True, check=True
        )
        for name, own in commands.items()
    }
    times = world.medians(works, max(world.args.repeats, 9))
    torch_alone = times.pop("import torch")
    return [
        compare(name, "import torch", own, torch_alone, 1.0, 0.3, floor=True) for name, own in times.items()
    ]


NETWORK_ROWS = {
    "judge": judge_row,
    "step": step_row,
    "injection": injection_row,
    "encode": encode_row,
    "scaling": scaling_row,
}
OTHER_ROWS = {"search": search_row, "metrics": metrics_row, "load": load_row, "startup": startup_row}
WORKS = {"judge": judge_works, "step": step_works, "scaling": scaling_works, "load": load_works}


# The command line


def cells(line: Line) -> list[str]:
    def value(x: float | None) -> str:
        if x is None:
            return "-" if line.opponent == "-" else "not installed"
        return {"s": f"{x:.3f} s", "MB": f"{x:,.0f} MB", "%": f"{x:.1f}%"}[line.unit]

    ratio = "-" if line.theirs is None else f"{line.ours / line.theirs:.2f}"
    reached = {True: "yes", False: "no", None: "-"}[line.reached]
    tokens = "-" if line.tokens_per_s is None else f"{line.tokens_per_s / 1000:,.1f}k"
    used = "-" if line.utilisation is None else f"{line.utilisation:.0%}"
    values = value(line.ours), value(line.theirs)
    return [line.work, line.opponent, *values, ratio, line.target, reached, tokens, used]


def print_table(lines: list[Line]) -> None:
    head = ["work", "opponent", "ours", "theirs", "ratio", "target", "met", "tok/s", "util"]
    table = [head, *map(cells, lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = (2, 3, 4, 7, 8)  # the columns of numbers
    for row in table:
        padded = [
            cell.rjust(w) if i in right else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print(" ".join(padded).rstrip())


def main() -> None:
    every = NETWORK_ROWS | OTHER_ROWS
    parser = argparse.ArgumentParser(
        "tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--only", nargs="+", choices=every, default=list(every), metavar="ROW")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # row, work: in a process of its own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        row, name = args.peak
        print(added_memory(WORKS[row](World(args, "small", args.folder))[name]))
        return
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        device = World(args, "", Path(folder)).device
        machine = (
            torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        )
        print(f"torch {torch.__version__}, {device}, {machine}", flush=True)
        networks = ["Qwen2.5-0.5B", "Llama-3.2-1B"] if device.type == "cuda" else ["small"]
        for network, rows in [*((network, NETWORK_ROWS) for network in networks), ("", OTHER_ROWS)]:
            some = []
            for name in (name for name in rows if name in args.only):
                print(f"{network} {name} ...".strip(), file=sys.stderr, flush=True)
                some += rows[name](World(args, network, Path(folder)))
            for line in some:
                line.network = network
            if some:
                figures = dict(zip(FIGURES, SIZES[network], strict=True)) if network else {}
                print("", f"{network} {figures or 'no network'}".strip(), sep="\n")
                print_table(some)
            lines += some
    if args.json:
        record = {"torch": torch.__version__, "device": str(device), "machine": machine, "quick": args.quick}
        args.json.write_text(json.dumps({**record, "lines": list(map(asdict, lines))}, indent=1) + "\n")


if __name__ == "__main__":
    main()
