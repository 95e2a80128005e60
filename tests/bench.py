"""Speed and memory against opponents that do the same work, interleaved in one process, medians of repeats.

    python -m tests.bench --model DIR --rows FILE              every row
    python -m tests.bench --only search metrics                some rows
    python -m tests.bench --quick --model DIR --rows FILE      tiny: does it run?
    python -m tests.bench --json bench.json

On a real checkpoint (--model, such as tools.import_gguf makes) and training rows (--rows), in bfloat16 where
the machine computes in it and in float32: train, encode, heads, scifact. Without: scaling, search, metrics,
load, startup. A row whose opponent needs a library that is not installed says so (transformers, peft and
sentence-transformers, faiss-cpu, pytrec_eval-terrier). The ratio is ours / theirs; targets are upper bounds
of it. What takes long is repeated less (--seconds).
"""

import argparse
import contextlib
import importlib.util
import io
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
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import dream
import eval as yardstick
import model
from attention import head_tensors
from data import Row, Rows, pad, shuffled
from formats.checkpoints import Checkpoint, read_config, save_weights
from formats.datasets import load_dataset
from formats.embedders import load_embedder, save_embedder
from formats.kept import EmbeddingStore
from related.infonce import InfoNCE
from related.qrhead import choose_heads, score_heads, select_heads
from support.launch import pick_device

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
SHARED = ROOT.parent / "shared" / "data"
ONE_GB = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16}
ONE_GB |= {"num_key_value_heads": 4, "vocab_size": 100_000, "model_type": "qwen2", "eos_token_id": 0}
ONE_GB |= {"rope_theta": 1e6, "max_position_embeddings": 8192, "tie_word_embeddings": True}
BATCH_SIZES = (16, 32, 64)  # of sentence-transformers; its best counts
# On a real checkpoint: rows of a step, of its naive twin and of tools.heads; passages to encode.
STEP_ROWS, NAIVE_ROWS, HEAD_ROWS, PASSAGES = 16, 4, 16, 250
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
    model: str = ""


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
    """What all rows share: device, type, how often to repeat, a folder for files."""

    def __init__(self, args: argparse.Namespace, folder: Path, dtype=torch.float32):
        self.args, self.folder, self.dtype = args, folder, dtype
        self.device = pick_device(args.device)
        self.cuda = self.device.type == "cuda"
        self.rate = 0.0

    def size(self, full: int) -> int:
        return max(full // 10, 1) if self.args.quick else full

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def medians(self, works: Works, repeats: int | None = None, warm: bool = False) -> dict[str, float]:
        """Median seconds of each work, in turns: all once as a warm-up, unless they are warm, then until the
        repeats or the seconds are used up."""
        times: dict[str, list[float]] = {name: [] for name in works}
        started = time.perf_counter()
        for turn in range((repeats or self.args.repeats) + 1):
            if turn > 1 and time.perf_counter() - started > self.args.seconds:
                break
            for name, work in works.items() if turn or not warm else ():
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
            command += ["--folder", str(self.folder), "--dtype", short(self.dtype)]
            command += ["--quick"] * self.args.quick
            if self.args.model:
                command += ["--model", str(self.args.model), "--rows", str(self.args.rows)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
            peaks[name] = float(done.stdout.split()[-1])
        return peaks

    def matmul_seconds(self, operations: float) -> float:
        """What so many operations take at the machine's rate: a large product, best of ten."""
        if not self.rate:
            a, b = (torch.randn(2048, 2048, device=self.device).to(self.dtype) for _ in "ab")
            times = [self.medians({"": lambda: a @ b}, 1).values() for _ in range(10)]
            self.rate = 2 * 2048**3 / min(map(min, times))
        return operations / self.rate


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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


# Rows on a real checkpoint: train, encode, heads, scifact


def matrix_weights(config: model.Config) -> int:
    """Those of a decoder's layers, each of which a token is multiplied with."""
    q_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    per_layer = 2 * (q_size + kv_size) + 3 * config.intermediate_size
    return config.num_hidden_layers * config.hidden_size * per_layer


class Real:
    """A judge and a retriever with LoRA from one checkpoint, its 16 top heads, and training rows."""

    def __init__(self, world: World):
        model, rows = (str(path) for path in (world.args.model, world.args.rows))
        flags = ["train", "--train", rows, "--judge", model, "--retriever", model, "--candidates", "4"]
        flags += ["--max-length", "128", "--retriever-batch", "128", "--out", str(world.folder / "run")]
        self.settings = dream.parse_arguments(flags)
        every = Rows(self.settings.train, self.settings.candidates)
        drawn = (every[i] for i in shuffled(len(every), 0))
        usable = (row for row in drawn if row.positive is not None and len(row.documents) == 4)
        self.rows = list(islice(usable, world.size(STEP_ROWS)))
        self.head_rows = list(islice(usable, world.size(HEAD_ROWS)))
        self.models = dream.build_models(self.settings, world.device, world.dtype, None)
        self.retriever, self.judge, self.builder = vars(self.models).values()
        self.dream = dream.build_objective(self.settings, self.models, world.device)
        self.infonce = InfoNCE()
        self.reader = self.dream.reader
        with contextlib.redirect_stderr(io.StringIO()):
            heads = choose_heads(score_heads(self.reader, self.head_rows[:8])[0], "top", 16, 0)
        self.dream.heads = head_tensors(heads, world.device)
        self.optimizer = dream.make_optimizer(self.models.parameters(), self.settings)
        self.optimizer.param_groups[0]["lr"] = 0.0  # all is computed, nothing moves: losses stay the same

    def step(self, objective, rows: list[Row]) -> float:
        batch = dream.prepare(self.retriever, objective, rows, (0,))
        stats = dream.take_step(self.retriever, objective, self.optimizer, batch, self.settings, (0,))
        return float(stats["loss"])

    def token_ids(self, rows: list[Row]) -> list[list[int]]:
        """Of the queries, then of each row's documents."""
        documents = [document.full_text for row in rows for document in row.documents]
        queries = self.retriever.tokenize([row.query for row in rows], "query")
        return queries + self.retriever.tokenize(documents, "document")

    def operations(self, rows: list[Row]) -> float:
        """The least of a DREAM step: 2 per weight and token forward, 2 more for the gradient of what a token
        becomes, where there is one."""
        config, prompts = self.judge.config, self.builder.shuffled(rows, 0)
        weights, injected = matrix_weights(config), 1 - min(self.dream.heads) / config.num_hidden_layers
        targets = sum(len(prompt.input_ids) - prompt.target_start for prompt in prompts)
        read = sum(len(prompt.input_ids) - 1 for prompt in prompts) + injected * targets
        embedded = 2 * sum(map(len, self.token_ids(rows)))
        return 2.0 * (weights * (read + embedded) + 2 * targets * config.hidden_size * config.vocab_size)


class Transformers:
    """The same steps in transformers and PEFT, as one would write them: right-padded batches, one graph."""

    def __init__(self, world: World, real: Real):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModel, AutoModelForCausalLM

        settings = real.settings
        load = {"dtype": world.dtype, "attn_implementation": "sdpa"}
        base = AutoModel.from_pretrained(world.args.model, **load)
        lora = LoraConfig(
            r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=settings.lora_targets
        )
        # Adapters in the model's type: faster than PEFT's default, which computes them in float32.
        self.retriever = get_peft_model(base, lora, autocast_adapter_dtype=False).to(world.device).train()
        self.device, self.real, self.tau = world.device, real, settings.temperature
        trained = [p for p in self.retriever.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)
        self.judge = AutoModelForCausalLM.from_pretrained(world.args.model, **load).to(world.device)
        self.judge.requires_grad_(False).config._attn_implementation = "naive"

    def embed(self, ids: list[list[int]], size: int) -> torch.Tensor:
        """Unit vectors of the last tokens, all texts at once, or `size` of similar length."""
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i])) if size < len(ids) else range(len(ids))
        parts = []
        for first in range(0, len(ids), size):
            inputs, lengths = pad([ids[i] for i in order[first : first + size]], self.device)
            mask = (torch.arange(inputs.shape[1], device=self.device) < lengths[:, None]).long()
            hidden = self.retriever(input_ids=inputs, attention_mask=mask).last_hidden_state
            parts.append(F.normalize(hidden[torch.arange(len(hidden)), lengths - 1].float(), dim=-1))
        return torch.cat(parts)[torch.tensor(list(order)).argsort()]

    def log_weights(self, rows: list[Row], size: int) -> torch.Tensor:
        embeddings = self.embed(self.real.token_ids(rows), size)
        queries, documents = (
            embeddings[: len(rows)],
            embeddings[len(rows) :].view(len(rows), -1, embeddings.shape[1]),
        )
        return (torch.einsum("bc,bnc->bn", queries, documents) / self.tau).log_softmax(-1)

    def update(self, loss: torch.Tensor) -> float:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def infonce(self, rows: list[Row], size: int) -> float:
        positives = torch.tensor([row.positive for row in rows], device=self.device)
        return self.update(F.nll_loss(self.log_weights(rows, size), positives))

    def dream(self, rows: list[Row], size: int) -> float:
        """Whole prompts in the graph, explicit attention in the injected layers, all logits."""
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        weights, prompts = self.log_weights(rows, size).exp(), self.real.builder.shuffled(rows, 0)
        ids, _ = pad(
            [prompt.input_ids[:-1] for prompt in prompts], self.device
        )  # pads come last: none is seen
        owner = torch.full(ids.shape, weights.shape[1])
        for number, prompt in enumerate(prompts):
            for document, (first, end) in enumerate(prompt.spans):
                owner[number, first:end] = document
        owner, position = owner.to(self.device), torch.arange(ids.shape[1], device=self.device)
        one_hot = F.one_hot(owner, weights.shape[1] + 1)[:, None, :, :-1].float()  # (B, 1, S, N)
        starts = torch.tensor([prompt.target_start - 1 for prompt in prompts], device=self.device)
        injected = (position >= starts[:, None])[:, None, :, None]  # (B, 1, T, 1)

        def naive(module, q, k, v, mask, scaling, dropout=0.0, **more):
            heads = self.real.dream.heads.get(module.layer_idx)
            if heads is None:
                return sdpa_attention_forward(module, q, k, v, None, scaling=scaling, is_causal=True)
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).float() for x in (k, v))
            logits = q.float() @ k.mT * scaling
            a = logits.masked_fill(position[:, None] < position, -torch.inf).softmax(-1)  # (B, Hq, T, S)
            mass = a[:, heads] @ one_hot  # (B, H, T, N)
            factor = F.pad(
                mass.sum(-1, keepdim=True) * weights[:, None, None] / mass.clamp(min=1e-30), (0, 1), value=1.0
            )
            factor = factor.gather(-1, owner[:, None, None].expand(-1, len(heads), len(position), -1))
            a = a.index_copy(1, heads, torch.where(injected, a[:, heads] * factor, a[:, heads]))
            return (a @ v).to(q.dtype).transpose(1, 2), None

        AttentionInterface.register("naive", naive)
        logits = self.judge(input_ids=ids, use_cache=False).logits  # (B, T, V) everywhere
        losses = []
        for own, prompt in zip(logits, prompts, strict=True):
            target = torch.tensor(prompt.input_ids[prompt.target_start :], device=self.device)
            rows_of_it = own[prompt.target_start - 1 : len(prompt.input_ids) - 1]
            losses.append(F.cross_entropy(rows_of_it.float(), target))
        return self.update(torch.stack(losses).mean())


def train_works(world: World) -> Works:
    """Steps of all rows, and of the naive twin's few."""
    real = world.real = Real(world)
    few = real.rows[:NAIVE_ROWS]
    works: Works = {
        "infonce": lambda: real.step(real.infonce, real.rows),
        "dream": lambda: real.step(real.dream, real.rows),
        "infonce few": lambda: real.step(real.infonce, few),
        "dream few": lambda: real.step(real.dream, few),
    }
    if installed("peft"):
        theirs = Transformers(world, real)
        for name, size in {"padded": 10**6, "sorted by length": 16}.items():
            works[name] = lambda size=size: theirs.infonce(real.rows, size)
            works[f"{name} few"] = lambda size=size: theirs.infonce(few, size)
        works["naive few"] = lambda: theirs.dream(few, 16)
    return works


def train_row(world: World) -> list[Line]:
    works = train_works(world)
    real, best = world.real, "padded"
    few = {name: work for name, work in works.items() if name.endswith(" few")}
    losses = {name: work() for name, work in few.items()}  # and a warm-up
    for name in few:
        ours = losses["dream few" if name == "naive few" else name if name == "dream few" else "infonce few"]
        limit = 0.2 if world.dtype == torch.bfloat16 else 1e-3
        assert abs(losses[name] - ours) <= limit * abs(ours), losses
    if "padded" in works:
        tried = world.medians(
            {name: few[f"{name} few"] for name in ("padded", "sorted by length")}, 1, warm=True
        )
        best = min(tried, key=tried.get)
    names = ("infonce", "dream", "dream few", best, "naive few")
    times = world.medians({name: works[name] for name in names if name in works}, warm=True)
    floor = world.matmul_seconds(real.operations(real.rows))
    step, own = times["dream"], f"{len(real.rows)} rows x 4"
    twin = f"{min(NAIVE_ROWS, len(real.rows))} rows x 4"
    lines = [
        compare(f"InfoNCE step, {own}", f"PEFT, SDPA, {best}", times["infonce"], times.get(best), 0.55),
        compare(
            f"DREAM step, {twin}", "naive transformers", times["dream few"], times.get("naive few"), 0.25
        ),
        compare(f"DREAM step, {own}", "floor: operations", step, floor, 1.6, floor=True),
        compare(f"DREAM step, {own}", "InfoNCE step", step, times["infonce"], 1.3),
    ]
    if world.dtype == dtypes(world.device)[0]:
        peaks = world.peaks("train", {name: few[name] for name in ("dream few", "naive few") if name in few})
        args = peaks["dream few"], peaks.get("naive few"), 0.3
        lines.append(compare(f"DREAM step, {twin}: memory", "naive transformers", *args, unit="MB"))
    return lines


def encode_row(world: World) -> list[Line]:
    ours = load_embedder(world.args.model, world.device, world.dtype)
    rows = Rows(str(world.args.rows), 4)
    texts = dict.fromkeys(d.full_text for i in shuffled(len(rows), 0)[:PASSAGES] for d in rows[i].documents)
    passages = list(texts)[: world.size(PASSAGES)]
    tokens = sum(map(len, ours.tokenize(passages, "document")))
    works: Works = {"ours": lambda: ours.encode(passages, "document")}
    opponent, some = "sentence-transformers", passages[:32]
    if installed("sentence_transformers"):
        from sentence_transformers import SentenceTransformer

        folder = world.folder / f"embedder-{short(world.dtype)}"
        save_embedder(ours, folder)
        options = {"device": str(world.device), "model_kwargs": {"dtype": world.dtype}}
        theirs = SentenceTransformer(str(folder), **options)

        def encode(some: list[str], size: int) -> torch.Tensor:
            return theirs.encode(some, batch_size=size, convert_to_tensor=True, show_progress_bar=False)

        tried = world.medians({str(size): lambda s=size: encode(some, s) for size in BATCH_SIZES}, 1)
        best = int(min(tried, key=tried.get))
        opponent += f", batch {best}"
        works["theirs"] = lambda: encode(passages, best)
        cosines = (encode(some, best).float() * ours.encode(some, "document")).sum(-1)
        assert cosines.min() > (0.95 if world.dtype == torch.bfloat16 else 0.9999), cosines.min()
    else:
        ours.encode(some, "document")
    times = world.medians(works, 3, warm=True)
    work, more = f"encode {len(passages):,} passages", {"tokens_per_s": tokens / times["ours"]}
    floor = world.matmul_seconds(2.0 * matrix_weights(ours.decoder.config) * tokens)
    return [
        compare(work, opponent, times["ours"], times.get("theirs"), 0.75, **more),
        compare(work, "floor: operations", times["ours"], floor, 1.4, floor=True, **more),
    ]


def heads_row(world: World) -> list[Line]:
    """What tools.heads computes: scores, budget, steering, context gain."""
    real = Real(world)
    prompts = real.builder.shuffled(real.head_rows, 0)

    def ours() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            select_heads(real.reader, real.head_rows, "top", 0, "")

    @torch.no_grad()
    def plain() -> None:
        for first in range(0, len(prompts), real.reader.batch):
            some = [prompt.input_ids for prompt in prompts[first : first + real.reader.batch]]
            real.judge.model(pad(some, world.device)[0])

    times = world.medians({"ours": ours, "plain": plain}, 3, warm=True)
    work = f"tools.heads, {len(prompts)} rows"
    return [compare(work, "one plain forward", times["ours"], times["plain"], 4.0)]


def scifact_row(world: World) -> list[Line]:
    """eval.py as a process, all embeddings of the corpus kept: random ones, as fast to search as any."""
    folder, kept = SHARED / "beir" / "scifact", world.folder / f"kept-{short(world.dtype)}"
    if not folder.exists():
        print(f"scifact: skipped, {folder} is missing")
        return []
    embedder, dataset = (
        load_embedder(world.args.model, world.device, world.dtype),
        load_dataset(folder, "test"),
    )
    store, count = EmbeddingStore(kept, embedder, dataset, torch.float32), dataset.num_documents
    store.write(0, count, F.normalize(torch.randn(count, embedder.dim), dim=-1))
    command = [
        "eval.py",
        "--dataset",
        str(folder),
        "--model",
        str(world.args.model),
        "--embeddings",
        str(kept),
    ]
    command += ["--dtype", short(world.dtype), "--device", world.device.type]
    search = f"import torch; q, d = torch.randn(300, {embedder.dim}), torch.randn({count}, {embedder.dim})"

    def run(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=True)

    works: Works = {
        "ours": lambda: run(*command),
        "theirs": lambda: run("-c", f"{search}; (q @ d.T).topk(1000)"),
    }
    times = world.medians(works, 3)
    assert len(list(kept.iterdir())) == 1, "the corpus was encoded anew"
    args = ("eval.py, SciFact, embeddings kept", "import torch, one search", times["ours"], times["theirs"])
    return [compare(*args, 1.0, 3.0, floor=True)]


# Row: scaling


def scaling_works(world: World) -> Works:
    """Streamed corpora of one, two and four blocks."""
    ours, rows = (
        load_embedder(DEMO / "checkpoint", world.device, world.dtype),
        Rows(str(DEMO / "train.jsonl"), 8),
    )
    texts = list(dict.fromkeys(d.full_text for i in range(len(rows)) for d in rows[i].documents))
    block = world.size(1250)

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
        (world.folder / "config.json").write_text(json.dumps(ONE_GB))
        save_weights(model.CausalLM(read_config(world.folder / "config.json")), folder, torch.float32)

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


REAL_ROWS = {"train": train_row, "encode": encode_row, "heads": heads_row, "scifact": scifact_row}
OTHER_ROWS = {
    "scaling": scaling_row,
    "search": search_row,
    "metrics": metrics_row,
    "load": load_row,
    "startup": startup_row,
}
WORKS = {"train": train_works, "scaling": scaling_works, "load": load_works}


# The command line


def cells(line: Line) -> list[str]:
    def value(x: float | None) -> str:
        if x is None:
            return "-" if line.opponent == "-" else "not installed"
        return {"s": f"{x:.3f} s", "MB": f"{x:,.0f} MB", "%": f"{x:.1f}%"}[line.unit]

    ratio = "-" if line.theirs is None else f"{line.ours / line.theirs:.2f}"
    reached = {True: "yes", False: "no", None: "-"}[line.reached]
    tokens = "-" if line.tokens_per_s is None else f"{line.tokens_per_s / 1000:,.1f}k"
    values = value(line.ours), value(line.theirs)
    return [line.work, line.opponent, *values, ratio, line.target, reached, tokens]


def print_table(lines: list[Line]) -> None:
    head = ["work", "opponent", "ours", "theirs", "ratio", "target", "met", "tok/s"]
    table = [head, *map(cells, lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = (2, 3, 4, 7)  # the columns of numbers
    for row in table:
        padded = [
            cell.rjust(w) if i in right else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print(" ".join(padded).rstrip())


def dtypes(device: torch.device) -> list[torch.dtype]:
    """Those that the machine computes in: bfloat16, where it has it, first."""
    cpu = Path("/proc/cpuinfo")
    half = device.type == "cuda" or cpu.exists() and "avx512_bf16" in cpu.read_text()
    return [torch.bfloat16, torch.float32] if half else [torch.float32]


def main() -> None:
    every = REAL_ROWS | OTHER_ROWS
    parser = argparse.ArgumentParser(
        "tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a real checkpoint")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="training rows with labels")
    parser.add_argument("--only", nargs="+", choices=every, default=list(every), metavar="ROW")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=90, help="of a comparison; at least once is measured"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # row, work: in a process of its own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        row, name = args.peak
        print(added_memory(WORKS[row](World(args, args.folder, getattr(torch, args.dtype)))[name]))
        return
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        device = World(args, Path(folder)).device
        cuda = device.type == "cuda"
        machine = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"
        print(f"torch {torch.__version__}, {device}, {machine}", flush=True)
        groups = []
        if args.model and args.rows:
            groups = [(f"{args.model.name}, {short(dtype)}", dtype, REAL_ROWS) for dtype in dtypes(device)]
        else:
            print(f"{', '.join(REAL_ROWS)}: skipped, they need --model and --rows")
        for title, dtype, rows in [*groups, ("", torch.float32, OTHER_ROWS)]:
            some = []
            for name in (name for name in rows if name in args.only):
                print(f"{title} {name} ...".strip(), file=sys.stderr, flush=True)
                some += rows[name](World(args, Path(folder), dtype))
            for line in some:
                line.model = title
            if some:
                print("", title or "without a real checkpoint", sep="\n")
                print_table(some)
            lines += some
    if args.json:
        record = {"torch": torch.__version__, "device": str(device), "machine": machine, "quick": args.quick}
        args.json.write_text(json.dumps({**record, "lines": list(map(asdict, lines))}, indent=1) + "\n")


if __name__ == "__main__":
    main()
