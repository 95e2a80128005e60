"""Embedders on disk: adapters and saved settings, in and out."""

import json

import pytest
import torch
from tiny import byte_tokenizer, config_file, learning, random_lm, tiny_checkpoint

from formats.checkpoints import Checkpoint
from formats.embedders import load_embedder, save_embedder
from model import Embedder
from support.files import InputError
from support.launch import CPU

TEXTS = ["a", "some longer text", "", "東京 🙂", "x" * 300]


def lora_embedder(tmp_path, **options):
    decoder = Checkpoint(tiny_checkpoint(tmp_path / "base"), CPU, torch.float32).decoder()
    torch.manual_seed(0)
    return Embedder(learning(decoder), byte_tokenizer(), 64, **options).eval()


def test_saved_embedder_loads_with_its_settings(tmp_path):
    embedder = lora_embedder(tmp_path, prompts={"query": "find: "}, append_eos=True)
    save_embedder(embedder, tmp_path / "run", str(tmp_path / "base"))
    loaded = load_embedder(tmp_path / "run", CPU, torch.float32)
    assert loaded.describe() == embedder.describe()
    for kind in ("query", "document"):
        assert loaded.tokenize(TEXTS, kind) == embedder.tokenize(TEXTS, kind)
        ids = embedder.tokenize(TEXTS, kind)
        assert torch.equal(loaded.embed(ids), embedder.embed(ids))
    assert load_embedder(tmp_path / "run", CPU, torch.float32, max_length=5).max_length == 5


def test_whole_weights_are_wanted_where_an_adapter_lies(tmp_path):
    embedder = lora_embedder(tmp_path)
    save_embedder(embedder, tmp_path / "run", str(tmp_path / "base"))
    with pytest.raises(InputError, match="run: holds an adapter, whole weights are needed; merge it first"):
        Checkpoint(tmp_path / "run", CPU, torch.float32)


def test_an_adapter_for_another_base_is_refused(tmp_path):
    embedder = lora_embedder(tmp_path)
    other = tiny_checkpoint(tmp_path / "other", hidden_size=36)
    save_embedder(embedder, tmp_path / "run", str(other))
    with pytest.raises(InputError, match="is this an adapter for another base"):
        load_embedder(tmp_path / "run", CPU, torch.float32)


@pytest.mark.parametrize(
    "key, value",
    [
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 2}),
        ("bias", "all"),
        ("peft_type", "IA3"),
        ("r", 0),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("alora_invocation_tokens", [1]),
    ],
)
def test_adapters_that_ask_for_more_are_refused(tmp_path, key, value):
    embedder = lora_embedder(tmp_path)
    save_embedder(embedder, tmp_path / "run", str(tmp_path / "base"))
    path = tmp_path / "run" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(InputError, match=key):
        load_embedder(tmp_path / "run", CPU, torch.float32)


def test_padding_is_no_ordinary_token(tmp_path):
    """Without an EOS in config.json, too: transformers cuts texts wherever the padding token stands."""
    embedder = Embedder(random_lm(config_file(tmp_path, eos_token_id=None)).model, byte_tokenizer(), 10)
    save_embedder(embedder, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert saved["pad_token"] == "<|endoftext|>"


def test_limits_are_read_beside_the_weights(tmp_path):
    """sentence-transformers keeps them in the folder of its first module."""
    embedder = Embedder(random_lm(config_file(tmp_path)).model, byte_tokenizer(), 10)
    save_embedder(embedder, tmp_path / "out")
    inner = tmp_path / "out" / "0_Transformer"
    inner.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / "out" / name).rename(inner / name)
    modules = json.loads((tmp_path / "out" / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (tmp_path / "out" / "modules.json").write_text(json.dumps(modules))
    assert load_embedder(tmp_path / "out", CPU, torch.float32).max_length == 10
    (inner / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 7}))
    assert load_embedder(tmp_path / "out", CPU, torch.float32).max_length == 7
