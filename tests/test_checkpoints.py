"""Checkpoint folders: tensors, configurations and tokenizers, what loads and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, config_file, make_rows, random_lm, tiny_checkpoint
from tokenizers import processors

from data import TEMPLATE
from formats.checkpoints import Checkpoint, load_tokenizer, make_builder
from formats.embedders import load_embedder
from model import Config, Embedder
from support.files import InputError
from support.launch import CPU


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


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    """A network of its own code may be bidirectional: refused. Nor is a pickle read: only safetensors."""
    trap = tmp_path / "ran"
    folder = tiny_checkpoint(tmp_path / "own")
    (folder / "modeling.py").write_text(f"open({str(trap)!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling.Own"}}))
    with pytest.raises(InputError, match="never run and may not be causal; if it is plain qwen2, remove"):
        load(folder)
    folder = tiny_checkpoint(tmp_path / "tiny", auto_map={"AutoTokenizer": ["modeling.Own", None]})
    (folder / "modeling.py").write_text(f"open({str(trap)!r}, 'w')")
    load(folder)
    assert not trap.exists()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="neither model.safetensors nor"):
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


def test_both_config_dialects_are_read_alike(tmp_path):
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 32
    old = config_file(tmp_path / "old", model_type="llama", rope_theta=5e5, rope_scaling=llama3)
    new = config_file(
        tmp_path / "new", model_type="llama", rope_theta=None, rope_parameters={**llama3, "rope_theta": 5e5}
    )
    new.rope_scaling.pop("rope_theta")
    assert old == new and isinstance(old, Config)


def test_large_rope_bases_are_read(tmp_path):
    assert config_file(tmp_path, rope_theta=3580165449.0).rope_theta == 3580165449.0


def test_tokenizer_larger_than_the_embedding_table(tmp_path):
    folder = tiny_checkpoint(tmp_path / "c", vocab_size=200)
    with pytest.raises(InputError, match="token id 256, config.json has vocab_size 200"):
        load_embedder(folder, CPU, torch.float32)


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


def test_the_judges_bos_is_what_its_tokenizer_puts_there(tmp_path):
    """Whatever config.json calls it."""
    folder = tiny_checkpoint(tmp_path / "judge", bos_token_id=5)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<s>"])
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    for post_processor, first in ((None, []), (template, [257])):
        if post_processor:
            tokenizer.post_processor = post_processor
        tokenizer.save(str(folder / "tokenizer.json"))
        builder = make_builder(folder, TEMPLATE, 300, 8)
        input_ids = builder.build(make_rows([2]))[0].input_ids
        assert [number for number in input_ids if number == 257] == first == input_ids[: len(first)]
