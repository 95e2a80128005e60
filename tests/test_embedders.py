"""Embedders on disk: adapters and saved settings, in and out."""

import json

import pytest
import torch
from tiny import byte_tokenizer, config_file, learning, make_rows, random_lm, tiny_checkpoint, write_rows
from tokenizers import processors

import dream
from eval import search
from formats.checkpoints import Checkpoint
from formats.embedders import as_saved, load_embedder, save_embedder
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


def test_shortened_embeddings_are_refused(tmp_path):
    folder = tiny_checkpoint(tmp_path / "tiny")
    save_embedder(load_embedder(folder), tmp_path / "saved")
    path = tmp_path / "saved" / "config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncate_dim": 16}))
    with pytest.raises(InputError, match="truncate_dim is 16, and shortened embeddings are not supported"):
        load_embedder(tmp_path / "saved")


def test_a_training_embeds_as_its_retriever_was_saved_to(tmp_path, capsys):
    """Length, prompts and EOS are taken over and printed; a flag overrides; what was resumed stays."""
    folder = tiny_checkpoint(tmp_path / "tiny")
    prompts = {"query": "find: ", "document": ""}
    decoder = Checkpoint(folder, CPU, torch.float32).decoder()
    save_embedder(Embedder(decoder, byte_tokenizer(), 40, prompts, append_eos=True), tmp_path / "saved")
    open_ = {"max_length": 0, "query_prompt": None, "document_prompt": None, "append_eos": False}
    taken = as_saved(tmp_path / "saved", open_)
    assert taken == {"max_length": 40, "query_prompt": "find: ", "document_prompt": "", "append_eos": True}
    assert "was saved: max_length=40, query_prompt='find: ', append_eos=True" in capsys.readouterr().out
    given = open_ | {"max_length": 20, "query_prompt": ""}
    assert as_saved(tmp_path / "saved", given) == {"document_prompt": "", "append_eos": True}
    plain = as_saved(folder, open_)
    assert plain == {"max_length": 512, "query_prompt": "", "document_prompt": "", "append_eos": False}

    write_rows(tmp_path / "rows.jsonl", make_rows([3] * 12))
    start = ["--train", str(tmp_path / "rows.jsonl"), "--judge", str(folder), "--steps", "1", "--batch", "2"]
    out = ["--retriever", str(tmp_path / "saved"), "--out", str(tmp_path / "run"), "--lora-rank", "2"]
    capsys.readouterr()
    assert dream.main(["train", *start, *out, "--max-length", "30"]) == 0
    embedder = load_embedder(tmp_path / "run")
    assert (embedder.max_length, embedder.prompts["query"]) == (30, "find: ")
    assert embedder.tokenize(["ab"], "query")[0][-1] == 256
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["query_prompt"] == "find: " and settings["append_eos"] is True


def test_the_texts_of_a_bare_language_model_begin_with_its_bos(tmp_path, capsys):
    """Where its tokenizer does not add it; a flag, the empty one too, and what was saved decide otherwise."""
    open_ = {"max_length": 0, "query_prompt": None, "document_prompt": None, "append_eos": False}
    folder = tiny_checkpoint(tmp_path / "tiny", bos_token_id=256)
    taken = as_saved(folder, open_)
    assert taken["query_prompt"] == taken["document_prompt"] == "<|endoftext|>"
    assert "begins all texts" in capsys.readouterr().out
    assert "query_prompt" not in as_saved(folder, open_ | {"query_prompt": ""})

    embedder = load_embedder(folder, CPU, torch.float32)
    assert embedder.prompts["query"] == ""  # only a training begins them so
    save_embedder(embedder, tmp_path / "saved")
    assert as_saved(tmp_path / "saved", open_)["query_prompt"] == ""

    def prompt(change: dict, template: str | None = None) -> str:
        (folder / "config.json").write_text(json.dumps(config | change))
        tokenizer = byte_tokenizer()
        if template:
            special = [("<|endoftext|>", 256)]
            tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
        tokenizer.save(str(folder / "tokenizer.json"))
        return as_saved(folder, open_)["document_prompt"]

    config = json.loads((folder / "config.json").read_text())
    assert prompt({}) == "<|endoftext|>"
    assert prompt({}, "<|endoftext|> $A") == ""  # Llama's adds it
    assert [prompt({"bos_token_id": bos}) for bos in (None, 10**9, "x", -1)] == [""] * 4


def test_a_kind_that_is_none_and_a_single_text(tmp_path):
    embedder = load_embedder(tiny_checkpoint(tmp_path / "tiny"))
    with pytest.raises(InputError, match="'passage' is no kind of text here; use 'query', 'document'"):
        embedder.encode(["red"], "passage")
    one = embedder.encode("red cats", "query")
    assert one.shape == (1, embedder.dim) and torch.equal(one, embedder.encode(["red cats"], "query"))
    assert embedder.encode([], "document").shape == (0, embedder.dim)
    scores, found = search(one, one, k=5)
    assert scores.shape == found.shape == (1, 1) and found.item() == 0
