"""Properties under random input, with hypothesis: readers on bad files, prompts, metrics, search, batches.

Every reader either returns or raises InputError with one line that names its file. MENDED: inputs that once
did neither. tests/fuzz.py looks for more of them, guided by coverage.
"""

import copy
import gzip
import json
import math
import shutil
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny import BASE, byte_tokenizer, config_file, random_lm

from attention import head_tensors
from data import Document, PromptBuilder, Row, Rows, document_block, fit_longest_first, token_batches
from dream import Settings
from eval import Hits, evaluate, make_run, score_queries, search
from formats.checkpoints import Checkpoint, load_tokenizer, read_config, read_tensors, save_weights
from formats.datasets import load_dataset
from formats.embedders import adapter_base, load_adapter, read_embedding_settings, save_embedder
from formats.templates import TEMPLATES
from model import Decoder, Embedder, add_lora, rope_frequencies
from related.qrhead import read_heads
from support.files import InputError
from support.flags import read_settings
from support.launch import CPU
from support.runs import resolve_run

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, configuration, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # not the working tree
PHASES = [Phase.explicit, Phase.generate, Phase.shrink]


def steady(examples):
    """The same examples on every machine and in every run."""
    checks = list(HealthCheck)
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=PHASES,
        suppress_health_check=checks,
    )


# readers

ROW = {"query": "q", "target": "t", "documents": ["one", {"title": "T", "text": "two"}], "positive": 1}
PASSAGES = {"query": "q", "answer": ["t"], "positive_passages": [{"text": "a"}], "negative_passages": ["b"]}
SMALL = {**BASE, "vocab_size": 8, "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1}
SMALL |= {"model_type": "qwen2", "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64, "rope_theta": 1e4}
CONFIG = {**SMALL, "rope_parameters": LLAMA3, "sliding_window": 64, "use_sliding_window": True}
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 2, "lora_alpha": 4, "bias": "none"}
ADAPTER |= {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, "use_rslora": False}
SHARDS = {"metadata": {}, "weight_map": {"model.norm.weight": "shard.safetensors"}}
MODULES = [
    {"path": path, "type": f"sentence_transformers.models.{kind}"}
    for path, kind in (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
]
TOKENIZER = {"model_max_length": 32, "eos_token": {"content": "<|endoftext|>"}, "add_eos_token": True}
RUN = {"train": "rows.jsonl", "test": ["demo"], "lora_targets": ["q_proj"], "full": False, "steps": 2}
RUN |= {"lr": 0.1, "objective": "dream", "rows": 3, "judge_context": None}
LAYOUT = [
    {"config_name": "corpus", "data_files": "corpus.jsonl"},
    {"config_name": "queries", "data_files": [{"split": "test", "path": ["queries.jsonl"]}]},
    {"config_name": "default", "data_files": [{"split": "test", "path": "qrels/*.tsv"}]},
]

HUGE = [10**30, 10**400, 1e300, math.inf, -math.inf, math.nan]
ODD = [
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    4.0,
    "",
    "a",
    "a\nb",
    "\0",
    "\ud800",
    "é",
    "..",
    "1",
    "x" * 300,
    *HUGE,
]
ODD += [[], [0], ["a"], [[]], [{}], ["q_proj", 1], {}, {"a": 1}, {"rope_type": "llama3"}, "llama3", "llama"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.sampled_from(ODD) | st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


def places(value):
    """Every (container, key) inside a JSON value."""
    if isinstance(value, dict | list):
        for key in list(value if isinstance(value, dict) else range(len(value))):
            yield value, key
            yield from places(value[key])


@st.composite
def changed(draw, good):
    """The good value with one to three places that hold something else, or are gone."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        if not (found := list(places(value))):
            break
        container, key = found[draw(st.integers(0, len(found) - 1))]
        if draw(st.integers(0, 4)) == 0:
            del container[key]
        else:
            container[key] = copy.deepcopy(draw(VALUES))
    return json.dumps(value).encode()


@st.composite
def cut_bytes(draw, good):
    """The bytes of the good file with a piece that is random, or gone."""
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(good))] * 2)))
    return good[:start] + draw(st.binary(max_size=8)) + good[end:]


def contents(good):
    """What may stand in a file that should hold this JSON value (or these bytes)."""
    if isinstance(good, bytes):
        return st.binary(max_size=60) | cut_bytes(good)
    others = st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode())
    return st.one_of(changed(good), changed(good), others, cut_bytes(json.dumps(good).encode()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Good files of every kind: a dataset, a checkpoint, an adapter of it, sentence-transformers' files."""
    folder = tmp_path_factory.mktemp("files")
    lm = random_lm(config_file(folder / "base", **SMALL))
    save_weights(lm, folder / "base", torch.float32)
    add_lora(lm.model, 2, 4.0, targets=ADAPTER["target_modules"])
    tokenizer = byte_tokenizer()
    save_embedder(Embedder(lm.model, tokenizer), folder / "adapter", "base")
    for name, text in DATASET.items():
        (folder / "dataset" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "dataset" / name).write_bytes(text)
    (folder / "st" / "1_Pooling").mkdir(parents=True)
    (folder / "st" / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    (folder / "st" / "modules.json").write_text(json.dumps(MODULES))
    tokenizer.save(str(folder / "st" / "tokenizer.json"))
    (folder / "sharded").mkdir()
    shutil.copyfile(folder / "base" / "model.safetensors", folder / "sharded" / "shard.safetensors")
    return folder


DATASET = {
    "corpus.jsonl": b'{"_id": "d", "title": "T", "text": "x"}\n',
    "queries.jsonl": b'{"_id": "q", "text": "x", "metadata": {"entity": "e"}}\n',
    "qrels/test.tsv": b"query-id\tcorpus-id\tscore\nq\td\t1\n",
}


def read_rows(folder):
    for row in Rows(folder / "rows.jsonl"):
        for text in (row.query, row.target, *(document.full_text for document in row.documents)):
            text.encode()  # what a tokenizer takes


def read_dataset(folder):
    dataset = load_dataset(folder / "dataset")
    "".join([*dataset.queries.values(), *(text for _, text in dataset.corpus())]).encode()
    evaluate({query: dict.fromkeys(judged, 1.0) for query, judged in dataset.qrels.items()}, dataset.qrels)


def read_network(folder):
    config = read_config(folder / "config.json")
    if config.num_hidden_layers <= 2:
        with torch.device("meta"):
            Decoder(config)
        if config.head_dim <= 64:
            rope_frequencies(config, CPU)


def read_adapter(folder):
    shutil.copyfile(folder / "adapter" / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    adapter_base(folder)
    load_adapter(Checkpoint(folder / "base", CPU, torch.float32).decoder(), folder)


def read_embedding(folder):
    folder = folder / "st"
    found = read_embedding_settings(folder)
    config = replace(read_config(folder.parent / "base" / "config.json"), vocab_size=300)
    decoder = torch.nn.Module()
    decoder.config, decoder.embed_tokens = config, torch.nn.Embedding(1, 1)
    tokenizer = load_tokenizer(folder, config)
    embedder = Embedder(decoder, tokenizer, found["max_length"], found["prompts"])
    embedder.tokenize(["a"], "query")


def read_run_settings(folder):
    found = Settings(**read_settings(folder / "settings.json", Settings))
    assert all(isinstance(name, str) for name in (*found.test, *found.lora_targets))


def read_chosen_heads(folder):
    heads, _ = read_heads(folder / "heads.json", read_config(folder / "base" / "config.json"))
    assert all(numbers.dtype == torch.int64 for numbers in head_tensors(heads, CPU).values())


def read_shards(folder):
    read_tensors(folder / "sharded", CPU, torch.float32)


# name: (the file that is changed, its good content, who reads it)
READERS = {
    "rows": ("rows.jsonl", ROW, read_rows),
    "passages": ("rows.jsonl", PASSAGES, read_rows),
    "corpus": ("dataset/corpus.jsonl", {"_id": "d", "title": "T", "text": "x"}, read_dataset),
    "queries": (
        "dataset/queries.jsonl",
        {"_id": "q", "text": "x", "metadata": {"entity": "e"}},
        read_dataset,
    ),
    "qrels tsv": ("dataset/qrels/test.tsv", DATASET["qrels/test.tsv"], read_dataset),
    "qrels jsonl": (
        "dataset/qrels/test.jsonl",
        {"query-id": "q", "corpus-id": "d", "score": 1},
        read_dataset,
    ),
    "card": ("dataset/README.md", LAYOUT, read_dataset),
    "config": ("config.json", CONFIG, read_network),
    "adapter": ("adapter_config.json", ADAPTER, read_adapter),
    "modules": ("st/modules.json", MODULES, read_embedding),
    "pooling": ("st/1_Pooling/config.json", {"pooling_mode": "lasttoken"}, read_embedding),
    "tokenizer": ("st/tokenizer_config.json", TOKENIZER, read_embedding),
    "lengths": (
        "st/sentence_bert_config.json",
        {"max_seq_length": 32, "do_lower_case": False},
        read_embedding,
    ),
    "prompts": ("st/config_sentence_transformers.json", {"prompts": {"query": "q: "}}, read_embedding),
    "index": ("sharded/model.safetensors.index.json", SHARDS, read_shards),
    "settings": ("settings.json", RUN, read_run_settings),
    "heads": ("heads.json", {"judge": "j", "selected": [[0, 0], [0, 1]]}, read_chosen_heads),
    "checkpoints": ("checkpoints.json", {"best": "step-1", "last": "step-2"}, resolve_run),
}


def finding(folder, name, content):
    """What is wrong with how a reader takes this file, None if nothing: "exception, where"."""
    file, _, reader = READERS[name]
    if name == "card":
        content = b'---\n{"configs": ' + content + b"}\n---\n"
    path, moved = folder / file, None
    before = path.read_bytes() if path.exists() else None
    if name == "qrels jsonl":  # the table of tab-separated values would go first
        moved = (folder / "dataset" / "qrels" / "test.tsv").rename(folder / "moved.tsv")
    path.write_bytes(content)
    try:
        reader(folder)
    except InputError as error:
        message = str(error)
        wrong = "several lines" if len(message.splitlines()) > 1 else ""
        wrong = wrong or ("file not named" if str(folder) not in message else "")
        return f"{wrong}, {innermost(error)}" if wrong else None
    except Exception as error:
        return f"{type(error).__name__}, {innermost(error)}"
    finally:
        path.unlink()
        if before is not None:
            path.write_bytes(before)
        if moved is not None:
            moved.rename(folder / "dataset" / "qrels" / "test.tsv")
    return None


def innermost(error):
    """The function of ours that raised it, or called what did."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_ours(Path(f.filename))]
    return f"{Path(frames[-1].filename).name} {frames[-1].name}" if frames else "this test"


def is_ours(path):
    return path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests")


def but(good, *path_and_value):
    """The good JSON value as a file, with another value at a path of keys."""
    good = copy.deepcopy(good)
    *path, last, value = path_and_value
    place = good
    for key in path:
        place = place[key]
    place[last] = value
    return json.dumps(good).encode()


ROPE = "rope_parameters"
DEEP = b'{"a":' * 100_000
JUDGED = READERS["qrels jsonl"][1]
# What did not hold once: (finding, reader, content).
MENDED = [
    ("KeyError", "qrels tsv", b"\td\t1"),
    ("IndexError", "card", but(LAYOUT, 0, "data_files", "absent.jsonl")),
    ("ValueError", "card", but(LAYOUT, 0, "data_files", "")),
    ("IndexError", "card", but(LAYOUT, 0, "data_files", ".")),
    ("OSError", "card", but(LAYOUT, 0, "data_files", "x" * 300)),
    ("TypeError", "card", but(LAYOUT, 0, "config_name", 0)),
    ("several lines", "card", but(LAYOUT, 0, "config_name", "a\nb")),
    ("file not named", "card", but(LAYOUT, 2, "data_files", 0, "path", [])),
    ("ValueError", "card", b"2024-99-99"),
    ("IndexError", "card", b'!!int ""'),
    ("several lines", "modules", but(MODULES, 1, "path", "a\nb")),
    ("several lines", "modules", but(MODULES, 0, "type", "a\nb")),
    ("OSError", "modules", but(MODULES, 0, "path", "x" * 300)),
    ("several lines", "index", but(SHARDS, "weight_map", "model.norm.weight", "a\nb")),
    ("RecursionError", "rows", DEEP),
    ("UnicodeEncodeError", "rows", but(ROW, "query", "\ud800")),
    ("UnicodeEncodeError", "queries", but(READERS["queries"][1], "text", "\ud800")),
    ("UnicodeEncodeError", "corpus", but(READERS["corpus"][1], "_id", "\ud800")),
    ("UnicodeEncodeError", "corpus", but(READERS["corpus"][1], "text", "\ud800")),
    ("OverflowError", "qrels tsv", b"q\td\t1" + b"0" * 400),
    ("OverflowError", "qrels jsonl", but(JUDGED, "score", 10**400)),
    ("OverflowError", "qrels jsonl", but(JUDGED, "score", math.inf)),
    ("ValueError", "qrels jsonl", but(JUDGED, "score", math.nan)),
    ("RecursionError", "card", b"[" * 3000),
    ("RecursionError", "config", DEEP),
    ("AttributeError", "config", but(CONFIG, ROPE, [1])),
    ("ValueError", "config", but(CONFIG, ROPE, "rope_theta", "a")),
    ("TypeError", "config", but(CONFIG, ROPE, "rope_theta", [1])),
    ("OverflowError", "config", but(CONFIG, ROPE, "rope_theta", 10**400)),
    ("KeyError", "config", but(CONFIG, ROPE, {"rope_type": "llama3"})),
    ("TypeError", "config", but(CONFIG, ROPE, "factor", "a")),
    ("OverflowError", "config", but(CONFIG, ROPE, "factor", 10**400)),
    ("RuntimeError", "config", but(CONFIG, ROPE, "low_freq_factor", True)),
    ("TypeError", "config", but(CONFIG, "hidden_size", 8.5)),
    ("TypeError", "config", but(CONFIG, "num_hidden_layers", 0.5)),
    ("TypeError", "config", but(CONFIG, "vocab_size", 10**30)),
    ("RuntimeError", "config", but(CONFIG, "vocab_size", 10**18)),
    ("RuntimeError", "adapter", but(ADAPTER, "r", 10**15)),
    ("TypeError", "adapter", but(ADAPTER, "r", True)),
    ("OverflowError", "adapter", but(ADAPTER, "lora_alpha", 10**400)),
    ("file not named", "adapter", but(ADAPTER, "target_modules", ["lm_head"])),
    ("TypeError", "adapter", but(ADAPTER, "target_modules", [{}])),
    ("TypeError", "modules", but(MODULES, 0, "path", None)),
    ("TypeError", "tokenizer", but(TOKENIZER, "model_max_length", "a")),
    (
        "ValueError",
        "tokenizer",
        but(TOKENIZER, "model_max_length", math.nan),
    ),
    (
        "OverflowError",
        "tokenizer",
        but(TOKENIZER, "model_max_length", -math.inf),
    ),
    ("OverflowError", "tokenizer", but(TOKENIZER, "model_max_length", -1)),
    ("TypeError", "tokenizer", but(TOKENIZER, "eos_token", 1)),
    ("UnicodeEncodeError", "tokenizer", but(TOKENIZER, "eos_token", "\ud800")),
    ("TypeError", "lengths", b'{"max_seq_length": 0.5}'),
    ("OverflowError", "lengths", b'{"max_seq_length": -1}'),
    ("AttributeError", "prompts", b'{"prompts": 1}'),
    ("TypeError", "prompts", b'{"prompts": {"query": "\\ud800"}}'),
    ("AttributeError", "index", but(SHARDS, "weight_map", "a")),
    ("TypeError", "index", but(SHARDS, "weight_map", "model.norm.weight", 1)),
    ("OSError", "index", but(SHARDS, "weight_map", "model.norm.weight", "..")),
    ("KeyError", "checkpoints", b"{}"),
    ("TypeError", "checkpoints", b'{"best": 1}'),
    ("AssertionError", "settings", but(RUN, "test", [5])),
    ("AssertionError", "heads", b'{"selected": [[0.0, 1.0]]}'),
]


@pytest.mark.parametrize("name", READERS)
def test_a_good_file_is_read(folder, name):
    good = READERS[name][1]
    assert finding(folder, name, good if isinstance(good, bytes) else json.dumps(good).encode()) is None


@pytest.mark.parametrize("name", READERS)
def test_any_file_is_read_or_refused_in_one_line(folder, name):
    @steady(60)
    @given(contents(READERS[name][1]))
    def holds(content):
        assert finding(folder, name, content) is None

    holds()


@pytest.mark.parametrize("kind, name, content", MENDED, ids=[f"{name}-{kind}" for kind, name, _ in MENDED])
def test_mended_findings(folder, kind, name, content):
    assert finding(folder, name, content) is None


# rows

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
PIECES = st.sampled_from(
    [
        *SPECIALS,
        "<|endoftext|>",
        "<|im",
        "_end|>",
        "🙂",
        "👩‍👩‍👧",
        "e\u0301",
        "\u2028",
        "\x85",
        "\ufeff",
        "\0",
        " ",
        "\n",
        "東京",
        "ﬁ",
        "{query}",
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=6), max_size=6).map("".join)
FILLED = TEXTS.map(str.strip).filter(bool)
DOCUMENTS = st.builds(Document, TEXTS.map(str.strip), TEXTS.map(str.strip)).filter(lambda d: d.full_text)


@st.composite
def rows(draw, texts=FILLED, at_least=2):
    documents = draw(st.lists(DOCUMENTS, min_size=at_least, max_size=5, unique=True))
    positive = draw(st.none() | st.integers(0, len(documents) - 1))
    return Row(0, draw(texts), draw(texts), documents, positive, "here")


def written(row, ascii_only):
    documents = [{"title": d.title, "text": d.text} if d.title else d.text for d in row.documents]
    value = {"query": row.query, "target": row.target, "documents": documents, "positive": row.positive}
    return json.dumps(value, ensure_ascii=ascii_only).encode() + b"\n"


@steady(25)
@given(st.lists(rows(), min_size=1, max_size=3), st.booleans(), st.booleans())
def test_rows_come_back_as_they_were_written(tmp_path_factory, given_rows, ascii_only, compressed):
    path = tmp_path_factory.getbasetemp() / f"back.jsonl{'.gz' if compressed else ''}"
    content = b"\n".join(written(row, ascii_only) for row in given_rows)
    path.write_bytes(gzip.compress(content) if compressed else content)
    for number, (read, row) in enumerate(zip(Rows(path), given_rows, strict=True)):
        assert read == replace(row, index=number, where=f"{path}, line {2 * number + 1}")


# prompts


@pytest.fixture(scope="module")
def tokenizer():
    """The tests' byte tokenizer with the special tokens of the chat templates."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def bytes_of(tokenizer, ids):
    """The bytes that token ids stand for, special tokens by their names: the byte tokenizer backwards."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 writes these bytes as themselves
    others = [byte for byte in range(256) if byte not in visible]
    letters = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}
    tokens = [tokenizer.id_to_token(number) for number in ids]
    return b"".join(bytes([letters[t]]) if t in letters else t.encode() for t in tokens)


def test_bytes_of_is_the_tokenizer_backwards(tokenizer):
    text = "".join(map(chr, range(300))) + "🙂" + SPECIALS[0]
    assert bytes_of(tokenizer, tokenizer.encode(text).ids) == text.encode()


@pytest.mark.parametrize("name", ["plain", "qwen", "qwen3", "llama"])
def test_prompts_hold_each_document_in_its_span_and_else_the_template(tokenizer, name):
    template = TEMPLATES[name]
    least = len(tokenizer.encode(template).ids)

    @steady(40)
    @given(
        st.lists(rows(at_least=1), min_size=1, max_size=3),
        st.integers(0, 400),
        st.integers(1, 12),
        st.sampled_from([None, 256]),
        st.randoms(use_true_random=False),
    )
    def holds(given_rows, more, max_target, bos, random):
        context = least + more
        builder = PromptBuilder(tokenizer, context, max_target, template, bos)
        orders = [random.sample(range(len(row.documents)), len(row.documents)) for row in given_rows]
        try:
            prompts = builder.build(given_rows, orders)
        except InputError as error:
            assert str(error).startswith("here: the judge's context") and len(str(error).splitlines()) == 1
            assert any(too_long(row, context - max_target, template, bos) for row in given_rows)
            return
        assert builder.check(given_rows) == sum(prompt.target_cut for prompt in prompts)
        for row, order, prompt in zip(given_rows, orders, prompts, strict=True):
            ids, end = prompt.input_ids, prompt.spans[order[0]][0]
            assert len(ids) <= context
            head, tail = template.split("{documents}")
            start = b"<|endoftext|>" * (bos is not None) + head.encode()
            assert bytes_of(tokenizer, ids[:end]) == start
            cut = 0
            for candidate in order:  # one after another, without a gap
                block = document_block(row.documents[candidate]).encode()
                first, last = prompt.spans[candidate]
                assert first == end and last > first and max(ids[first:last]) < 256  # no special token
                kept = block[: last - first - 2] + b"\n\n"
                assert bytes_of(tokenizer, ids[first:last]) == kept
                cut, end = cut + len(block) - (last - first), last
            limit = max(last - first for first, last in prompt.spans)
            lengths = [len(document_block(document).encode()) for document in row.documents]
            assert [last - first for first, last in prompt.spans] == [min(n, limit) for n in lengths]
            assert prompt.question_start == end and prompt.tokens_cut == cut
            question = tail.removesuffix("{target}").replace("{query}", row.query).encode()
            space = b" " if question.endswith(b" ") else b""
            question = question.removesuffix(space)
            assert bytes_of(tokenizer, ids[end : prompt.target_start]) == question
            target = space + row.target.encode()
            assert bytes_of(tokenizer, ids[prompt.target_start :]) == target[:max_target]
            assert prompt.target_cut == (len(target) > max_target)
            specials = sum(template.count(special) for special in SPECIALS) + (bos is not None)
            assert sum(number >= 256 for number in ids) == specials

    holds()


def too_long(row, room, template, bos):
    """Whether 16 tokens a document, or all of it, do not fit beside template and query."""
    text = template.replace("{documents}", "").replace("{target}", "")
    for special in SPECIALS:
        text = text.replace(special, "x")
    left = room - len(text.replace("{query}", row.query).encode()) - (bos is not None)
    lengths = [len(document_block(document).encode()) for document in row.documents]
    return sum(min(length, 17) for length in lengths) > left


# metrics

# 1 + 1e-10 is 1 as a float32, 1e-46 is 0, 1e39 is infinite.
SCORES = [
    1.0,
    1.0 + 1e-10,
    1.0 + 1e-6,
    0.5,
    -0.5,
    0.0,
    -0.0,
    1e-46,
    1e-40,
    -1e30,
    1e30,
    1e39,
    0.1,
    0.1 + 1e-9,
]
IDS = st.sampled_from(
    ["9", "10", "1", "01", "a", "A", "é", "e\u0301", "\uffff", "\U00010000", "ß", "doc-1", "doc-10"]
)
IDS |= st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=3)
FOUND = st.dictionaries(IDS, st.sampled_from(SCORES) | st.floats(-1, 1), min_size=1, max_size=14)
GRADES = st.sampled_from([-1, 0, 1, 1, 2, 3, 1000, 50_000])


@st.composite
def judged_runs(draw):
    run, qrels = {}, {}
    for query in draw(st.lists(IDS, min_size=1, max_size=4, unique=True)):
        found = draw(FOUND)
        documents = draw(st.lists(st.sampled_from(list(found)) | IDS, min_size=1, max_size=12, unique=True))
        qrels[query] = {document: draw(GRADES) for document in documents}
        if draw(st.integers(0, 5)):
            run[query] = found
    return run, qrels


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_metrics_equal_pytrec_eval():
    pytrec_eval = pytest.importorskip("pytrec_eval")
    cutoffs = (1, 2, 3, 5, 10, 100)
    names = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}
    measures = {f"{name}.{','.join(map(str, cutoffs))}" for name in names.values()} | {"map", "recip_rank"}

    @steady(150)
    @given(judged_runs())
    def holds(case):
        run, qrels = case
        ours = score_queries(run, qrels, cutoffs)
        theirs = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run) if run else {}
        assert set(theirs) == set(run)
        for row, query in enumerate(qrels):
            expected = theirs.get(query, {})
            for name, measure in names.items():
                for k in cutoffs:
                    assert abs(ours[f"{name}@{k}"][row] - expected.get(f"{measure}_{k}", 0.0)) < 1e-6
            assert abs(ours["map"][row] - expected.get("map", 0.0)) < 1e-6
            reciprocal = expected.get("recip_rank", 0.0)  # theirs has no cut
            assert abs(ours["mrr@10"][row] - (reciprocal if reciprocal > 0.0999 else 0.0)) < 1e-6

    holds()


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_the_order_of_a_run_is_pytrec_evals():
    pytrec_eval = pytest.importorskip("pytrec_eval")

    @steady(80)
    @given(FOUND, st.integers(1, 20), st.booleans())
    def holds(found, k, keep):
        documents = list(found)
        scores = np.fromiter(found.values(), np.float32)
        best = np.argsort(-scores, kind="stable")
        missing = [-1] * 3  # where a search found nothing
        hits = Hits(
            np.append(scores[best], np.full(3, -np.inf, np.float32))[None],
            np.append(best, missing)[None],
            documents,
        )
        query = documents[0]
        run = make_run([query], hits, k, keep)[0][query]
        # One query for each document, the only relevant one: its rank says where pytrec_eval put it.
        qrels = {f"q{i}": {document: 1} for i, document in enumerate(documents)}
        theirs = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(dict.fromkeys(qrels, found))
        ranks = [round(1 / theirs[f"q{i}"]["recip_rank"]) for i in range(len(documents))]
        order = [document for _, document in sorted(zip(ranks, documents, strict=True))]
        assert list(run) == [document for document in order if keep or document != query][:k]
        assert all(run[document] == np.float32(found[document]) for document in run)

    holds()


# search and batches


@steady(120)
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 40), st.integers(1, 5), st.integers(1, 12)),
    st.tuples(st.integers(1, 8), st.integers(1, 45), st.integers(0, 40)),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_search_is_a_full_sort_whatever_the_tiles(sizes, tiles, whole, seed):
    (num_queries, num_documents, dim, k), (query_tile, document_tile, split) = sizes, tiles
    generator = torch.Generator().manual_seed(seed)

    def vectors(count):
        if whole:  # exact products, many of them equal
            return torch.randint(-1, 2, (count, dim), generator=generator).float()
        return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=1)

    queries, documents = vectors(num_queries), vectors(num_documents)
    split = min(split, num_documents)  # two blocks, one after another
    best = search(queries, documents[:split], k, query_tile, document_tile, 7) if split else None
    scores, indices = search(queries, documents[split:], k, query_tile, document_tile, 7 + split, best)
    count, tolerance = min(k, num_documents), 0 if whole else 1e-6
    assert scores.shape == indices.shape == (num_queries, count)
    products = queries.double().numpy() @ documents.double().numpy().T  # (Q, N)
    expected = -np.sort(-products, axis=1)[:, :count]
    scores, indices = scores.double().numpy(), indices.numpy() - 7
    assert (np.diff(scores, axis=1) <= 0).all() and np.abs(scores - expected).max() <= tolerance
    assert np.abs(np.take_along_axis(products, indices, axis=1) - scores).max() <= tolerance
    assert all(len(set(row)) == count for row in indices.tolist())


@steady(150)
@given(st.lists(st.integers(0, 60), max_size=9), st.integers(-5, 300))
def test_fit_longest_first_is_the_largest_limit(lengths, room):
    limit = fit_longest_first(lengths, room)

    def taken(limit):
        return sum(min(length, limit) for length in lengths)

    assert 0 <= limit <= max(lengths, default=0) and taken(limit) <= max(room, 0)
    assert limit == max(lengths, default=0) or taken(limit + 1) > room


@steady(150)
@given(st.lists(st.integers(0, 60), max_size=40), st.integers(1, 200))
def test_token_batches_hold_every_text_once_in_batches_that_fit(lengths, max_tokens):
    batches = token_batches(lengths, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(lengths, reverse=True)
