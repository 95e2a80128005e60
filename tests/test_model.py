"""Checkpoints, LoRA and the embedder: what loads, what is refused, and what must not change."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, config_file, random_lm, tiny_checkpoint
from tokenizers import processors

from formats.checkpoints import Checkpoint, load_tokenizer
from formats.embedders import load_embedder, save_embedder
from model import PROJECTIONS, Config, Embedder, add_lora, lora_layers
from support.files import InputError
from support.launch import pick_device, pick_dtype

CPU = torch.device("cpu")
TEXTS = ["a", "some longer text", "", "東京 🙂", "x" * 300]


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def load(folder):
    return Checkpoint(folder, CPU, torch.float32).causal_lm()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.layers.2.mlp.up_proj.weight"), "layers.2.mlp.up_proj.weight .* is missing"),
        (
            lambda t: t.update({"model.layers.9.x.weight": torch.ones(1)}),
            "unexpected tensor .*layers.9.x.weight",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), r"norm.weight has shape \(7,\)"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    folder = tiny_checkpoint(tmp_path / "c")
    edit(folder, change)
    with pytest.raises(InputError, match=message):
        load(folder)


def test_shards_base_exports_and_constants(tmp_path):
    """Two shards, no leading "model.", RoPE's constants of old checkpoints: the same network."""
    folder = tiny_checkpoint(tmp_path / "c")
    ids = torch.arange(20)[None]
    expected = load(folder).model(ids)
    tensors = {k.removeprefix("model."): v for k, v in load_file(folder / "model.safetensors").items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, own in shards.items():
        save_file({name: tensors[name] for name in own}, folder / shard)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: shard for shard, own in shards.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load(folder).model(ids), expected)

    (folder / "model-00002-of-00002.safetensors").rename(folder / "gone")
    with pytest.raises(InputError, match="model-00002-of-00002.safetensors, which is not in"):
        load(folder)
    (folder / "model-00002-of-00002.safetensors").write_bytes((folder / "gone").read_bytes()[:-100])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load(folder)


def test_loading_is_memory_mapped_and_shared(tmp_path):
    """Judge and retriever of one Checkpoint hold the same tensors, frozen."""
    checkpoint = Checkpoint(tiny_checkpoint(tmp_path / "c"), CPU, torch.float32)
    judge, retriever = checkpoint.causal_lm(), checkpoint.decoder()
    for name, parameter in retriever.named_parameters():
        assert (
            parameter.data_ptr() == judge.model.get_parameter(name).data_ptr() and not parameter.requires_grad
        )
    assert judge.lm_head.weight is judge.model.embed_tokens.weight


def test_a_judge_needs_its_output_projection(tmp_path):
    folder = tiny_checkpoint(tmp_path / "c", tie_word_embeddings=False)
    edit(folder, lambda t: t.pop("lm_head.weight"))
    Checkpoint(folder, CPU, torch.float32).decoder()  # an embedder does not
    with pytest.raises(InputError, match="lm_head.weight is missing"):
        load(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "yarn"}, "rope_parameters": {"rope_theta": 5.0}}, "rope_type is 'yarn'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "a quantised checkpoint"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_key_value_heads": 4}, "not a multiple"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_configs_that_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        config_file(tmp_path, **changes)


def test_sliding_windows_limit_the_context_only_where_used(tmp_path):
    assert config_file(tmp_path / "a", sliding_window=64).context == 2048
    assert config_file(tmp_path / "b", sliding_window=64, use_sliding_window=True).context == 64
    assert config_file(tmp_path / "c", model_type="mistral", sliding_window=64).context == 64
    long = {"model_type": "mistral", "max_position_embeddings": 32768}
    assert config_file(tmp_path / "d", sliding_window=64, use_sliding_window=False, **long).context == 64
    assert config_file(tmp_path / "e", **long).context == 4096  # what transformers takes for absent
    assert config_file(tmp_path / "f", sliding_window=None, **long).context == 32768


def test_tokenizer_larger_than_the_embedding_table(tmp_path):
    folder = tiny_checkpoint(tmp_path / "c", vocab_size=200)
    with pytest.raises(InputError, match="token id 256, config.json has vocab_size 200"):
        load_embedder(folder, CPU, torch.float32)


def lora_embedder(tmp_path, targets=PROJECTIONS, **options):
    checkpoint = Checkpoint(tiny_checkpoint(tmp_path / "base"), CPU, torch.float32)
    decoder = checkpoint.decoder()
    torch.manual_seed(0)
    add_lora(decoder, 4, 8, targets=targets)
    for layer in lora_layers(decoder).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    return checkpoint, Embedder(decoder, byte_tokenizer(), 64, **options).eval()


def test_lora_trains_only_its_targets_and_starts_as_the_base(tmp_path):
    checkpoint = Checkpoint(tiny_checkpoint(tmp_path / "c"), CPU, torch.float32)
    plain, decoder = checkpoint.decoder(), checkpoint.decoder()
    add_lora(decoder, 4, 8, targets=["q_proj", "down_proj"])
    ids = torch.arange(30)[None]
    assert torch.equal(plain(ids), decoder(ids))
    names = {n for n, p in decoder.named_parameters() if p.requires_grad}
    assert len(names) == 4 * 2 * 2 and all(
        ".lora_" in n and ("q_proj" in n or "down_proj" in n) for n in names
    )
    with pytest.raises(InputError, match="unknown LoRA target 'c_attn'"):
        add_lora(checkpoint.decoder(), 4, 8, targets=["q_proj", "c_attn"])


def test_merge_equals_the_adapter_and_unmerge_restores_every_bit(tmp_path):
    checkpoint, embedder = lora_embedder(tmp_path)
    judge = checkpoint.causal_lm()
    before = {name: p.clone() for name, p in judge.named_parameters()}
    ids = torch.arange(30)[None]
    expected = embedder.decoder(ids)
    for layer in lora_layers(embedder.decoder).values():
        layer.merge()
        layer.merge()  # a second time changes nothing
    torch.testing.assert_close(embedder.decoder(ids), expected, rtol=1e-4, atol=1e-4)
    for name, parameter in judge.named_parameters():  # the judge that shares the base is untouched
        assert torch.equal(parameter, before[name])
    for layer in lora_layers(embedder.decoder).values():
        layer.unmerge()
    assert torch.equal(embedder.decoder(ids), expected)


def test_saved_embedder_loads_with_its_settings(tmp_path):
    _, embedder = lora_embedder(tmp_path, prompts={"query": "find: "}, append_eos=True)
    save_embedder(embedder, tmp_path / "run", str(tmp_path / "base"))
    loaded = load_embedder(tmp_path / "run", CPU, torch.float32)
    assert loaded.describe() == embedder.describe()
    for kind in ("query", "document"):
        assert loaded.tokenize(TEXTS, kind) == embedder.tokenize(TEXTS, kind)
        ids = embedder.tokenize(TEXTS, kind)
        assert torch.equal(loaded.embed(ids), embedder.embed(ids))
    assert load_embedder(tmp_path / "run", CPU, torch.float32, max_length=5).max_length == 5


def test_an_adapter_for_another_base_is_refused(tmp_path):
    _, embedder = lora_embedder(tmp_path)
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
    _, embedder = lora_embedder(tmp_path)
    save_embedder(embedder, tmp_path / "run", str(tmp_path / "base"))
    path = tmp_path / "run" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(InputError, match=key):
        load_embedder(tmp_path / "run", CPU, torch.float32)


def test_embeddings_depend_on_the_text_alone(tmp_path):
    """A batch of one, a batch of all, another order: the same unit vectors."""
    embedder = Embedder(random_lm(config_file(tmp_path)).model, byte_tokenizer(), 64)
    ids = embedder.tokenize(TEXTS, "document")
    assert max(map(len, ids)) == 64 and min(map(len, ids)) == 1
    together = embedder.embed(ids)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(torch.cat([embedder.embed([i]) for i in ids]), together, rtol=0, atol=1e-5)
    torch.testing.assert_close(embedder.embed(ids[::-1]).flip(0), together, rtol=0, atol=1e-5)


def test_eos_survives_truncation_and_prompts_go_in_front(tmp_path):
    decoder = random_lm(config_file(tmp_path)).model
    embedder = Embedder(decoder, byte_tokenizer(), 10, {"query": "Q: "}, append_eos=True)
    short, long = embedder.tokenize(["ab", "x" * 50], "document")
    assert short == byte_tokenizer().encode("ab").ids + [256]
    assert len(long) == 10 and long[-1] == 256
    assert embedder.tokenize(["ab"], "query")[0] == byte_tokenizer().encode("Q: ab").ids + [256]


def test_an_eos_that_the_tokenizer_adds_is_not_added_twice(tmp_path):
    tokenizer = byte_tokenizer()
    template = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 256)]
    )
    tokenizer.post_processor = template
    embedder = Embedder(random_lm(config_file(tmp_path)).model, tokenizer, 10, append_eos=True)
    assert [ids.count(256) for ids in embedder.tokenize(["ab", "x" * 50], "query")] == [1, 1]


def test_padding_is_no_ordinary_token(tmp_path):
    """Without an EOS in config.json, too: transformers cuts texts wherever the padding token stands."""
    embedder = Embedder(random_lm(config_file(tmp_path, eos_token_id=None)).model, byte_tokenizer(), 10)
    save_embedder(embedder, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert saved["pad_token"] == "<|endoftext|>"


def test_whole_weights_are_wanted_where_an_adapter_lies(tmp_path):
    _, embedder = lora_embedder(tmp_path)
    save_embedder(embedder, tmp_path / "run", str(tmp_path / "base"))
    with pytest.raises(InputError, match="run: holds an adapter, whole weights are needed; merge it first"):
        Checkpoint(tmp_path / "run", CPU, torch.float32)


def test_a_tied_head_that_differs_is_told(tmp_path):
    folder = tiny_checkpoint(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    Checkpoint(folder, CPU, torch.float32).causal_lm()
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match="ties lm_head and embed_tokens, and the weights hold two"):
        Checkpoint(folder, CPU, torch.float32).causal_lm()


def test_bos_and_eos_that_the_tokenizer_or_its_config_asks_for(tmp_path):
    """Llama's tokenizer.json adds a BOS by itself; an EOS, asked for by flag or by file, follows the text."""
    config = config_file(tmp_path)
    llama = byte_tokenizer()
    llama.add_special_tokens(["<s>"])
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    llama.post_processor = processors.Sequence([processors.ByteLevel(), template])
    llama.save(str(tmp_path / "tokenizer.json"))
    plain = byte_tokenizer().encode("ab").ids
    asked = {"bos_token": "<s>", "eos_token": {"content": "<|endoftext|>"}, "add_bos_token": True}
    for written, flag, expected in (
        (None, False, [257, *plain]),
        (None, True, [257, *plain, 256]),
        (asked, False, [257, *plain]),  # there already
        (asked | {"add_eos_token": True}, False, [257, *plain, 256]),
    ):
        if written:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(written))
        embedder = Embedder(random_lm(config).model, load_tokenizer(tmp_path, config), 10, append_eos=flag)
        short, long = embedder.tokenize(["ab", "x" * 50], "query")
        assert short == expected
        assert len(long) == 10 and (long[0], long[-1]) == (257, 256 if 256 in expected else long[1])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_eos_token": True, "eos_token": "</s>"}))
    with pytest.raises(InputError, match="tokenizer_config.json: eos_token '</s>' has no id"):
        load_tokenizer(tmp_path, config)


def test_pick_device_and_dtype():
    assert pick_device("cpu").type == "cpu"
    assert pick_dtype("auto", CPU)[0] is torch.float32 and pick_dtype("bfloat16", CPU)[0] is torch.bfloat16
    with pytest.raises(InputError, match="--dtype int8"):
        pick_dtype("int8", CPU)
    with pytest.raises(InputError, match="--device nonsense"):
        pick_device("nonsense")


def test_both_config_dialects_are_read_alike(tmp_path):
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 32
    old = config_file(tmp_path / "old", model_type="llama", rope_theta=5e5, rope_scaling=llama3)
    new = config_file(
        tmp_path / "new", model_type="llama", rope_theta=None, rope_parameters={**llama3, "rope_theta": 5e5}
    )
    new.rope_scaling.pop("rope_theta")
    assert old == new and isinstance(old, Config)


def test_code_in_a_checkpoint_is_told_and_never_run(tmp_path, capsys):
    """Nor is a pickle read: only safetensors count."""
    trap = tmp_path / "ran"
    folder = tiny_checkpoint(tmp_path / "tiny", auto_map={"AutoModel": "modeling.Own"})
    (folder / "modeling.py").write_text(f"open({str(trap)!r}, 'w')")
    load(folder)
    assert "never run" in capsys.readouterr().out and not trap.exists()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="neither model.safetensors nor"):
        load(folder)


def test_a_huge_text_costs_no_more_than_what_is_kept_of_it(tmp_path, monkeypatch):
    """Of 40 MB only as many characters are tokenised as the kept tokens can have."""
    embedder = Embedder(random_lm(config_file(tmp_path)).model, byte_tokenizer(), 16, {"query": "Q: "})
    seen = []

    class Watched:
        def encode_batch_fast(self, texts):
            seen.extend(map(len, texts))
            return byte_tokenizer().encode_batch_fast(texts)

    short = embedder.tokenize(["ab c " * 100], "query")
    assert embedder.tokenize(["ab c " * 8_000_000], "query") == short
    embedder.tokenizer = Watched()
    embedder.tokenize(["ab c " * 8_000_000], "query")
    assert max(seen) <= 17 * len("<|endoftext|>")


def test_large_rope_bases_are_read(tmp_path):
    assert config_file(tmp_path, rope_theta=3580165449.0).rope_theta == 3580165449.0


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
