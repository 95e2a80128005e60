"""Turn a trained retriever into a folder to publish: weights, tokenizer, embedding settings, a model card.

    python -m tools.export runs/mine --to exports/mine --format sentence-transformers
    python -m tools.export runs/mine --to exports/merged --format merged --dtype bfloat16
    python -m tools.export runs/mine/step-000100 --to exports/adapter --format adapter --name owner/mine

Run it from the project's root. The adapter is merged in float32 and rounded once, when it is written. The
card tells what the run's files tell and nothing else; of local paths only the last part.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

import model
from formats.embedders import adapter_base, load_embedder, read_embedding_settings, save_embedder
from model import Decoder, lora_layers
from support.files import InputError, write_atomic
from support.hub import HUB_NAME
from support.launch import ArgumentParser, run_command
from support.runs import locate, read_run, resolve_run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LIBRARIES = {"merged": "transformers", "adapter": "peft", "sentence-transformers": "sentence-transformers"}
SHOWN = (  # dream.py's settings that decide what was learnt, beside those of the objectives
    "full lora_rank lora_alpha lora_targets candidates temperature steps batch lr max_length query_prompt "
    "document_prompt append_eos seed"
).split()

DREAM = "DREAM ([arXiv 2606.24667](https://arxiv.org/abs/2606.24667))"
TRAINED = """A dense retriever trained with {}, by an implementation that is not the authors':
{}."""
JUDGES = "a frozen language model, the judge", "a language model, the judge, whose adapters learnt too"
OBJECTIVES = {  # what it is, how it teaches, and the settings that are its own
    "dream": (
        DREAM,
        "without labels, through the attention and the next-token loss of {}",
        "judge_lora document_mass inject_rows in_batch_negatives",
    ),
    "infonce": (
        "InfoNCE ([arXiv 1807.03748](https://arxiv.org/abs/1807.03748))",
        "by labels, to tell each query's relevant document from others, without a judge",
        "in_batch_negatives",
    ),
    "replug": (
        "REPLUG-LSR ([arXiv 2301.12652](https://arxiv.org/abs/2301.12652))",
        "without labels, towards the documents that make the target likely to {}",
        "judge_temperature target_likelihood kl",
    ),
    "revela": (
        "Revela ([arXiv 2506.16552](https://arxiv.org/abs/2506.16552))",
        "without labels, on texts that help one another to be predicted by {}",
        "group_size normalise_values",
    ),
}
LICENCE = """The weights derive from the base checkpoint, whose licence applies. The licence of the training
data has to be checked by who publishes them. No licence is claimed here."""
SENTENCE_TRANSFORMERS = """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(NAME)
queries = model.encode(["a question"], prompt_name="query")
documents = model.encode(["a title and a text", "another text"], prompt_name="document")
print(queries @ documents.T)
```"""
TRANSFORMERS = """```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(NAME, padding_side="right")
LOAD

@torch.no_grad()
def embed(texts):
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    last = hidden[torch.arange(len(texts)), mask.sum(1) - 1]
    return torch.nn.functional.normalize(last.float(), dim=-1)

queries = embed([QUERY + "a question"])
documents = embed([DOCUMENT + text for text in ("a title and a text", "another text")])
print(queries @ documents.T)
```"""
PLAIN = "model = AutoModel.from_pretrained(NAME).eval()"
PEFT = """from peft import PeftConfig, PeftModel

config = PeftConfig.from_pretrained(NAME)
base = AutoModel.from_pretrained(config.base_model_name_or_path, revision=config.revision)
model = PeftModel.from_pretrained(base, NAME).eval()"""


def public_name(name: str) -> str:
    """A hub repository's name as it is; of a path, which is nobody's business, the last part."""
    if HUB_NAME.fullmatch(name) and not name.startswith(".") and not Path(name).exists():
        return name
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", name)
    return f"{cached[1]}/{cached[2]}" if cached else Path(name).name


def run_of(checkpoint: Path) -> tuple[dict, dict, dict]:
    """The settings, heads and results of the run that a checkpoint belongs to; empty where unknown."""
    run = checkpoint.parent
    if not (run / "checkpoints.json").exists() or not checkpoint.name.startswith("step-"):
        return {}, {}, {}
    settings, heads, results = read_run(run, "settings", "heads", "results")
    return settings, heads, results if resolve_run(run) == checkpoint else {}  # those of the best one


@contextmanager
def as_written(path: Path) -> Iterator[None]:
    """A run's file is trusted; what then fails is told as the file's fault. Raises InputError."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not as `train` writes it ({error!r})") from error


def table(rows: list[list[str]], left: int) -> str:
    """A Markdown table that is aligned as text too: `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    pads = [str.ljust if i < left else str.rjust for i in range(len(widths))]
    padded = ([p(c, w) for p, c, w in zip(pads, r, widths, strict=True)] for r in (rows[0], rule, *rows[1:]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def shown(value: object) -> str:
    """A setting in a table's cell."""
    if isinstance(value, bool) or value == "":
        return "yes" if value else "no"
    text = ", ".join(value) if isinstance(value, list) else str(value)
    text = json.dumps(text, ensure_ascii=False) if text != text.strip() or "\n" in text else text
    return text.replace("|", "\\|")


def model_card(embedder: model.Embedder, checkpoint: Path, base: str, kind: str, name: str) -> str:
    """README.md: the hub's front matter, then how the retriever is used and what is known of its training."""
    (settings, heads, results), run = run_of(checkpoint), checkpoint.parent
    task = "feature-extraction" if kind == "merged" else "sentence-similarity"
    front = ["---", f"library_name: {LIBRARIES[kind]}", f"pipeline_tag: {task}", "tags:", "- dense-retrieval"]
    with as_written(run / "settings.json"):
        objective = settings.get("objective", "dream")
        paper, teaching, own = OBJECTIVES[objective]
        learns = objective == "revela" or bool(settings.get("judge_lora"))
        base = public_name(base or settings.get("retriever") or "")
        facts = {"Base checkpoint": base}
        facts |= {"Judge": public_name(settings.get("judge") or "") if objective != "infonce" else ""}
        facts |= {"Training data": public_name(settings.get("train") or "")}
        facts |= {"Training rows": f"{settings['rows']:,}" if "rows" in settings else ""}
        names = [n for n in SHOWN if learns or not (settings.get("full") and n.startswith("lora"))]
        names = [n for n in ("objective", *own.split(), *names) if n in settings]
        training = [["setting", "value"], *([f"`{n}`", shown(settings[n])] for n in names)]
    front += ["- dream"] * (bool(settings) and objective == "dream")
    front += [f"base_model: {base.partition('@')[0]}"] * bool(HUB_NAME.fullmatch(base))
    facts |= {"Checkpoint": checkpoint.name if settings else ""}
    facts |= {"Weights": str(embedder.decoder.embed_tokens.weight.dtype).removeprefix("torch.")}
    parts = ["\n".join([*front, "---"]), f"# {name}"]
    trained = TRAINED.format(paper, teaching.format(JUDGES[learns]))
    parts += [trained if settings else f"A dense retriever, exported by an implementation of {DREAM}."]
    parts += ["\n".join(f"* {what}: `{fact}`" for what, fact in facts.items() if fact), "## How to use it"]

    how = embedder.describe()
    quoted = {who: json.dumps(text, ensure_ascii=False) for who, text in how["prompts"].items()}
    fields = {"NAME": json.dumps(name), "LENGTH": str(how["max_length"])}
    fields |= {"QUERY": quoted["query"], "DOCUMENT": quoted["document"]}
    plain = TRANSFORMERS.replace("LOAD", PEFT if kind == "adapter" else PLAIN)
    for snippet in [plain] if kind == "merged" else [SENTENCE_TRANSFORMERS, plain]:
        parts.append(re.sub(r"\b(NAME|LENGTH|QUERY|DOCUMENT)\b", lambda found: fields[found[0]], snippet))
    command = f"python eval.py --model {shlex.quote(name)} --dataset scifact"
    parts += [f"```console\n$ {command}\n```", "## Embeddings"]
    lines = [f"The last token's hidden state, L2-normalised: {how['dim']} dimensions, compared by cosine"]
    lines += [f"At most {how['max_length']} tokens of a text; a document is its title, a space, its text"]
    lines += [f"Before a {who}: `{quoted[who]}`" for who, text in how["prompts"].items() if text]
    lines += [] if any(how["prompts"].values()) else ["No prompts"]
    lines += ["The EOS follows every text, inside that length" if how["append_eos"] else "No EOS is added"]
    parts += ["\n".join(f"* {line}" for line in lines)]

    parts += ["## Training", "By `dream.py train`:", table(training, left=2)] if names else []
    with as_written(run / "heads.json"):
        injected = [f"{layer}.{head}" for layer, head in sorted(heads.get("selected", []))]
    if injected and objective == "dream":
        text = ", ".join(injected)
        parts += [f"Injected: {len(injected)} attention heads of the judge, layer.head from 0: {text}."]
    if results.get("after"):
        rows = [["dataset", "split", "queries", "BM25", "before", "after"]]
        with as_written(run / "results.json"):
            for triple in zip(results["bm25"], results["before"], results["after"], strict=True):
                figures = [f"{result['metrics']['ndcg@10']:.4f}" for result in triple]
                rows.append([triple[2]["dataset"], triple[2]["split"], f"{triple[2]['queries']:,}", *figures])
        parts += ["## Results", "NDCG@10 before and after training:", table(rows, left=2)]
        parts += ["Measured by `eval.py` of this implementation at the end of the run, before the export."]
    return "\n\n".join(part for part in [*parts, "## Licence", LICENCE] if part) + "\n"


@torch.no_grad()
def merge_lora(decoder: Decoder) -> None:
    """Replace every adapter by a plain linear layer that holds the base's weight plus the adapter."""
    for name, layer in lora_layers(decoder).items():
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        delta = layer.lora_B.weight @ layer.lora_A.weight * layer.scaling  # (out, in) float32
        merged = (layer.weight.float() + delta).to(layer.weight.dtype)
        plain.weight, plain.bias = nn.Parameter(merged, requires_grad=False), layer.bias
        decoder.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], plain)


def export(args: argparse.Namespace) -> None:
    """Everything `main` does, InputError not caught: load, merge, write beside DIR, rename."""
    source, to = locate(args.run).resolve(), Path(args.to).resolve()
    weights = read_embedding_settings(source)["transformer"]
    base = adapter_base(weights) if (weights / "adapter_config.json").exists() else ""
    if args.format == "adapter" and not base:
        raise InputError(f"{source}: has no adapter; export it with --format merged or sentence-transformers")
    if to.is_dir() and any(to.iterdir()):
        if not args.overwrite:
            raise InputError(f"{to}: is not empty; --overwrite replaces it")
        if any(path.resolve().is_relative_to(to) for path in (source, Path(base or source))):
            raise InputError(f"{to}: holds the checkpoint that is exported, or its base; choose another --to")
        if not any((to / name).exists() for name in ("config.json", "adapter_config.json")):
            raise InputError(f"{to}: holds no checkpoint; --overwrite replaces nothing else")
    embedder = load_embedder(source, torch.device("cpu"), torch.float32)
    config, dtype = embedder.decoder.config.raw, "float32"
    if args.format != "adapter":
        merge_lora(embedder.decoder)
        stated = config.get("dtype") or config.get("torch_dtype")
        dtype = stated if stated in DTYPES else "float32"
    dtype = dtype if args.dtype == "auto" else args.dtype
    embedder.decoder.to(DTYPES[dtype])
    base = args.base or base
    card = model_card(embedder, source, base, args.format, args.name or to.name)
    temporary = to.with_name(f".{to.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        save_embedder(embedder, temporary, base)
        write_atomic(temporary / "README.md", card)
        if to.is_dir():
            shutil.rmtree(to)
        os.replace(temporary, to)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{to}: could not be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(file.stat().st_size for file in to.rglob("*") if file.is_file()) / 1e6
    print(f"written: {args.to}  {args.format}, {dtype}, {size:,.1f} MB")
    if Path(base).is_dir() and args.format == "adapter":
        print("note: adapter_config.json names the base by a local path; to publish, add --base OWNER/NAME")
    print(f"next: python eval.py --model {shlex.quote(args.to)} --dataset scifact")


def main(argv: list[str] | None = None) -> int:
    """The exit status, as `run_command` says."""
    parser = ArgumentParser("export", description=__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's folder (its best checkpoint), a checkpoint, or a PEFT adapter")
    add("--to", required=True, metavar="DIR", help="the folder to write")
    add("--format", required=True, choices=list(LIBRARIES), help="what it is to be loaded by")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: the base's, of an adapter float32")
    add("--base", metavar="NAME", help="its base as it is to be published (default: as it was loaded)")
    add("--name", help="the retriever's name in its card, as owner/name (default: DIR's name)")
    add("--overwrite", action="store_true", help="replace the checkpoint that DIR holds")
    args = parser.parse_args(argv)
    return run_command("export", lambda: export(args))


if __name__ == "__main__":
    sys.exit(main())
