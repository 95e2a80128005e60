"""Coverage-guided fuzzing of the readers with atheris, by hand: tests/fuzz.py TARGET [libFuzzer's flags].

    python tests/fuzz.py config -max_total_time=600 -rss_limit_mb=4000
    python tests/fuzz.py qrels FILE                             one saved input again, with its traceback

TARGET: adapter, card, config, index, qrels, rows, safetensors, settings. A reader may return, or raise
InputError with one line that names its file; everything else is a finding. A finding does not end the run:
each kind (exception, file, line) is printed once, and its smallest input so far is kept in
$FUZZ_FINDINGS/TARGET (dream-fuzz), with its traceback and files beside it as text, and the corpus. An
input's last bytes say how it is read: as the file itself, or as changes to a good file, which gets further
than broken JSON.
"""

import copy
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

import atheris
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
with atheris.instrument_imports(include=["data", "model", "formats", "support"]):
    import data
    import formats.checkpoints
    import formats.datasets
    import formats.embedders
    import model
    import support.files
    import support.runs
from tiny import BASE, byte_tokenizer, config_file, random_lm  # noqa: E402

import eval as yardstick  # noqa: E402

CPU = torch.device("cpu")
SMALL = {**BASE, "vocab_size": 8, "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1}
SMALL |= {"model_type": "qwen2", "num_attention_heads": 2, "num_key_value_heads": 1}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64, "rope_theta": 1e4}
CONFIG = {
    **SMALL,
    "rope_parameters": LLAMA3,
    "sliding_window": 64,
    "use_sliding_window": False,
    "head_dim": 4,
}
ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "base",
    "revision": None,
    "r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "use_rslora": False,
    "modules_to_save": None,
}
MODULES = [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
SETTINGS = {
    "modules.json": [*MODULES, {"path": "2_Normalize", "type": "x.Normalize"}],
    "1_Pooling/config.json": {"pooling_mode_lasttoken": True},
    "tokenizer_config.json": {"model_max_length": 32, "eos_token": "<|endoftext|>", "add_eos_token": True},
    "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": False},
    "config_sentence_transformers.json": {"prompts": {"query": "q: "}, "similarity_fn_name": "cosine"},
    "checkpoints.json": {"best": "step-1", "last": "step-2"},
}
ROW = {"query": "q", "target": "t", "documents": ["one", {"title": "T", "text": "two"}], "positive": 1}
CARD = (
    "---\nconfigs:\n- config_name: corpus\n  data_files: corpus.jsonl\n- config_name: queries\n"
    "  data_files:\n  - split: test\n    path: [queries.jsonl]\n- config_name: default\n"
    "  data_files:\n  - split: test\n"
    "    path: qrels/*.tsv\n---\nText\n"
)
# Odd values of every kind that JSON can hold.
ODD = [None, True, False, 0, 1, -1, 3, 10**30, 10**400, 0.5, 4.0, -0.0, 1e300, float("inf"), float("-inf")]
ODD += [float("nan"), "", "a", "a\nb", "\0", "\ud800", "é", "..", "/", "1", "x" * 300, [], [0], ["a"], [[]]]
ODD += [[{}], {}, {"a": 1}, {"rope_type": "llama3"}, ["q_proj", 1], "llama3", "llama", "qwen3", "default"]


def value(fdp: atheris.FuzzedDataProvider):
    """Any JSON value: an odd one, a number or a text."""
    kind = fdp.ConsumeIntInRange(0, 5)
    if kind == 0:
        return fdp.ConsumeInt(8)
    if kind == 1:
        return fdp.ConsumeFloat()
    if kind == 2:
        return fdp.ConsumeUnicode(8)
    return copy.deepcopy(ODD[fdp.ConsumeIntInRange(0, len(ODD) - 1)])


def changed(fdp: atheris.FuzzedDataProvider, good):
    """A copy of a JSON value in which some places, at any depth, hold others, are gone or are new."""
    good = copy.deepcopy(good)
    for _ in range(fdp.ConsumeIntInRange(1, 4)):
        places = [(good, key) for key in (good if isinstance(good, dict) else range(len(good)))]
        for place, key in places:  # grows while it is read
            inner = place[key]
            if isinstance(inner, dict | list):
                places += [(inner, key) for key in (inner if isinstance(inner, dict) else range(len(inner)))]
        if not places:
            return good
        place, key = places[fdp.ConsumeIntInRange(0, len(places) - 1)]
        action = fdp.ConsumeIntInRange(0, 7)
        if action == 0:
            del place[key]
        elif action == 1 and isinstance(place, dict):
            place[fdp.ConsumeUnicode(6)] = value(fdp)
        else:
            place[key] = value(fdp)
    return good


def content(fdp: atheris.FuzzedDataProvider, good) -> bytes:
    """A file: the rest of the input as it is, or the good JSON value with changes."""
    if fdp.ConsumeIntInRange(0, 1):
        return json.dumps(changed(fdp, good)).encode()
    return fdp.ConsumeBytes(fdp.remaining_bytes())


def put(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # a new inode: the old one may be mapped into memory
    path.write_bytes(content)


def network(config: model.Config) -> None:
    """What follows a config: the network on the meta device, and its RoPE. Absurd sizes only cost time."""
    if not config.num_hidden_layers <= 8:
        return
    with torch.device("meta"):
        decoder = model.Decoder(config)
    if config.head_dim <= 64 and config.hidden_size * config.num_attention_heads <= 4096:
        model.rope_frequencies(decoder.config, CPU)
    json.dumps(formats.checkpoints.config_json(config, "Qwen2Model", torch.float32))


def fuzz_config(fdp, folder: Path) -> None:
    put(folder / "config.json", content(fdp, CONFIG))
    network(formats.checkpoints.read_config(folder / "config.json"))


def fuzz_safetensors(fdp, folder: Path) -> None:
    if fdp.ConsumeIntInRange(0, 1):
        body = (GOOD / "model.safetensors").read_bytes()
        size = int.from_bytes(body[:8], "little")
        header = json.dumps(changed(fdp, json.loads(body[8 : 8 + size]))).encode()
        body = len(header).to_bytes(8, "little") + header + body[8 + size :]
    else:
        body = fdp.ConsumeBytes(fdp.remaining_bytes())
    put(folder / "config.json", json.dumps(SMALL).encode())
    put(folder / "model.safetensors", body)
    found = formats.checkpoints.Checkpoint(folder, CPU, torch.float32)
    found.decoder()
    found.causal_lm()


def fuzz_index(fdp, folder: Path) -> None:
    names = {name: "model-1-of-1.safetensors" for name in WEIGHTS}
    put(folder / "model.safetensors.index.json", content(fdp, {"metadata": {}, "weight_map": names}))
    put(folder / "model-1-of-1.safetensors", (GOOD / "model.safetensors").read_bytes())
    formats.checkpoints.read_tensors(folder, CPU, torch.float32)


def fuzz_qrels(fdp, folder: Path) -> None:
    name = "test.jsonl" if fdp.ConsumeIntInRange(0, 1) else "test.tsv"
    good = {"query-id": "q", "corpus-id": "d", "score": 1}
    put(folder / name, content(fdp, good))
    qrels = formats.datasets._read_qrels([(folder / name, None)])
    yardstick.score_queries({query: dict.fromkeys(judged, 1.0) for query, judged in qrels.items()}, qrels)


def fuzz_adapter(fdp, folder: Path) -> None:
    config, weights = json.dumps(ADAPTER).encode(), (GOOD / "adapter_model.safetensors").read_bytes()
    if fdp.ConsumeIntInRange(0, 1):
        config = content(fdp, ADAPTER)
    else:
        weights = fdp.ConsumeBytes(fdp.remaining_bytes())
    put(folder / "adapter_config.json", config)
    put(folder / "adapter_model.safetensors", weights)
    rank = known["r"] if isinstance(known := loads(config), dict) and "r" in known else 0
    if isinstance(rank, int) and 1000 < rank < 1 << 48:
        return  # a known finding: so large an adapter is made before the weights are looked at
    formats.embedders.adapter_base(folder)
    formats.embedders.load_adapter(copy.deepcopy(DECODER), folder)


def loads(text: bytes):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def fuzz_rows(fdp, folder: Path) -> None:
    put(folder / "rows.jsonl", content(fdp, ROW))
    for row in data.Rows(folder / "rows.jsonl"):
        for text in (row.query, row.target, *(document.full_text for document in row.documents)):
            text.encode()  # what a tokenizer takes


def fuzz_card(fdp, folder: Path) -> None:
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "x"}\n')
    (folder / "corpus.jsonl").write_text('{"_id": "d", "text": "x"}\n')
    if fdp.ConsumeIntInRange(0, 1):
        import yaml

        header = yaml.safe_load(CARD.split("---\n")[1])
        card = b"---\n" + json.dumps(changed(fdp, header)).encode() + b"\n---\n"
    else:
        card = fdp.ConsumeBytes(fdp.remaining_bytes())
    put(folder / "README.md", card)
    formats.datasets.load_dataset(folder)


def fuzz_settings(fdp, folder: Path) -> None:
    for name, good in SETTINGS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        put(folder / name, json.dumps(good).encode())
    name = list(SETTINGS)[fdp.ConsumeIntInRange(0, len(SETTINGS) - 1)]
    put(folder / name, content(fdp, SETTINGS[name]))
    if name == "checkpoints.json":
        support.runs.resolve_run(folder).is_dir()
        return
    settings = formats.embedders.read_embedding_settings(folder)
    decoder = nn.Module()
    decoder.config, decoder.embed_tokens = (
        formats.checkpoints.read_config(GOOD / "config.json"),
        nn.Embedding(1, 1),
    )
    shutil.copyfile(GOOD / "tokenizer.json", folder / "tokenizer.json")
    tokenizer = formats.checkpoints.load_tokenizer(folder, replace(decoder.config, vocab_size=300))
    model.Embedder(decoder, tokenizer, settings["max_length"], settings["prompts"]).tokenize(["a"], "query")


def good_files(folder: Path) -> None:
    """A checkpoint, its adapter and its tokenizer, all good."""
    config = config_file(folder, **SMALL)
    lm = random_lm(config)
    formats.checkpoints.save_weights(lm, folder, torch.float32)
    model.add_lora(lm.model, 2, 4.0, targets=ADAPTER["target_modules"])
    formats.embedders.save_embedder(model.Embedder(lm.model, byte_tokenizer()), folder, "base")
    (folder / "adapter_config.json").unlink()


def seeds(target: str) -> list[bytes]:
    """Good inputs as they are, and some with changes. The provider takes its numbers from an input's end."""
    files = {
        "config": [json.dumps(CONFIG), json.dumps(SMALL)],
        "index": [json.dumps({"weight_map": {name: "model-1-of-1.safetensors" for name in WEIGHTS}})],
        "qrels": ["query-id\tcorpus-id\tscore\nq\td\t1\nq\te\t0\n", "q\td\t-1\r\n\r\n"],
        "adapter": [json.dumps(ADAPTER)],
        "rows": [
            json.dumps(ROW) + "\n\n" + json.dumps({"query": "q", "answer": ["a"], "pos": ["x"], "neg": ["y"]})
        ],
        "card": [CARD],
        "settings": [json.dumps(SETTINGS["tokenizer_config.json"])],
        "safetensors": [],
    }[target]
    ends = {"qrels": b"\x00\x00", "adapter": b"\x00\x01", "settings": b"\x00\x02"}
    found = [text.encode() + ends.get(target, b"\x00") for text in files]
    if target == "qrels":
        found.append(b'{"query-id": "q", "corpus-id": "d", "score": 1.0}\n\x00\x01')
    if target in ("adapter", "safetensors"):
        name = "adapter_model.safetensors" if target == "adapter" else "model.safetensors"
        found.append((GOOD / name).read_bytes() + b"\x00")
    generator = random.Random(0)
    return found + [generator.randbytes(24) + b"\x01\x01\x01" for _ in range(40)]


def main() -> None:
    target = sys.argv[1]
    reader = globals()[f"fuzz_{target}"]
    kept = Path(os.environ.get("FUZZ_FINDINGS", "dream-fuzz")) / target
    smallest: dict[str, int] = {}

    def signature(error: BaseException) -> str:
        """The exception and the line of ours that it comes from."""
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if f.filename.startswith(f"{ROOT}/") and __file__ != f.filename] or frames
        return f"{type(error).__name__} {Path(ours[-1].filename).name}:{ours[-1].lineno}"

    def once(raw: bytes) -> None:
        try:
            reader(atheris.FuzzedDataProvider(raw), folder)
        except support.files.InputError as error:
            text = str(error)
            if "\n" in text or "\r" in text:
                note(raw, f"message of several lines, {signature(error)}", error)
            elif str(folder) not in text:
                note(raw, f"message without its file, {signature(error)}", error)
        except Exception as error:
            note(raw, signature(error), error)

    def note(raw: bytes, kind: str, error: BaseException) -> None:
        if len(raw) >= smallest.get(kind, sys.maxsize):
            return
        new = kind not in smallest
        smallest[kind] = len(raw)
        name = "".join(c if c.isalnum() else "-" for c in kind)
        (kept / name).write_bytes(raw)
        files = {str(f.relative_to(folder)): f.read_bytes()[:2000] for f in folder.rglob("*.json*")}
        files |= {f.name: f.read_bytes()[:2000] for f in folder.glob("*.[tm][sd]*")}
        (kept / f"{name}.txt").write_text(
            f"{''.join(traceback.format_exception(error))}\n{files}\n", errors="replace"
        )
        if new:
            print(f"FINDING {kind}: {' '.join(str(error).split())[:200]}", file=sys.stderr, flush=True)

    shm = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{target}-", dir=shm))
    kept.mkdir(parents=True, exist_ok=True)
    replay = len(sys.argv) == 3 and Path(sys.argv[2]).is_file()
    if replay:
        reader(atheris.FuzzedDataProvider(Path(sys.argv[2]).read_bytes()), folder)
        return
    corpus = kept / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds(target)):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup(
        [
            sys.argv[0],
            "-max_len=6000",
            "-reduce_inputs=0",
            "-print_final_stats=1",
            *sys.argv[2:],
            str(corpus),
        ],
        once,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOOD = Path(tempfile.mkdtemp(prefix="fuzz-good-"))
    good_files(GOOD)
    DECODER = formats.checkpoints.Checkpoint(GOOD, CPU, torch.float32).decoder()
    WEIGHTS = list(formats.checkpoints.read_tensors(GOOD, CPU, torch.float32))
    main()
