"""Our checkpoints in PEFT and sentence-transformers, and PEFT's in ours: equal embeddings."""

import json

import pytest
import torch
import torch.nn.functional as F
from tiny import byte_tokenizer, tiny_checkpoint
from tokenizers.processors import TemplateProcessing

from data import pad
from formats.checkpoints import Checkpoint
from formats.embedders import load_embedder, save_embedder
from model import Embedder, add_lora, lora_layers
from support.files import InputError
from support.launch import CPU

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")

TEXTS = ["a", "some longer text", "東京 🙂", "x" * 90]


def saved_run(tmp_path, lora=True, **options):
    base = tiny_checkpoint(tmp_path / "base")
    decoder = Checkpoint(base, CPU, torch.float32).decoder()
    torch.manual_seed(0)
    if lora:
        add_lora(decoder, 4, 8)
    for layer in lora_layers(decoder).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    embedder = Embedder(decoder, byte_tokenizer(), 64, **options).eval()
    save_embedder(embedder, tmp_path / "run", str(base))
    return base, embedder


@torch.no_grad()
def by_transformers(model, token_ids):
    ids, lengths = pad(token_ids, CPU)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return F.normalize(hidden[torch.arange(len(ids)), lengths - 1], dim=-1)


def test_our_adapter_in_peft(tmp_path):
    base, embedder = saved_run(tmp_path)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModel.from_pretrained(base), tmp_path / "run"
    ).eval()
    ids = embedder.tokenize(TEXTS, "document")
    torch.testing.assert_close(embedder.embed(ids), by_transformers(theirs, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_adapter_in_ours(tmp_path, causal, rslora):
    """Both name forms, base-model and CausalLM, and both scalings."""
    base = tiny_checkpoint(tmp_path / "base")
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        use_rslora=rslora,
        init_lora_weights=False,
    )
    theirs = peft.get_peft_model(kind.from_pretrained(base), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    embedder = load_embedder(tmp_path / "adapter", CPU, torch.float32)
    ids = embedder.tokenize(TEXTS, "document")
    inner = theirs.base_model.model.model if causal else theirs
    torch.testing.assert_close(embedder.embed(ids), by_transformers(inner, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora": False},
        {"append_eos": True, "prompts": {"query": "find: ", "document": "text: "}},
        {"prompts": dict.fromkeys(("query", "document"), "<|endoftext|>")},
    ],
)
def test_our_run_in_sentence_transformers(tmp_path, options):
    _, embedder = saved_run(tmp_path, **options)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "run"), device="cpu")
    for kind in ("query", "document"):
        ours = embedder.embed(embedder.tokenize(TEXTS, kind)).detach()
        encoded = torch.from_numpy(theirs.encode(TEXTS, prompt_name=kind, batch_size=2))
        torch.testing.assert_close(ours, encoded, rtol=0, atol=1e-5)
    if embedder.prompts["query"] == embedder.prompts["document"]:  # then nobody has to say which
        encoded = torch.from_numpy(theirs.encode(TEXTS, batch_size=2))
        torch.testing.assert_close(ours, encoded, rtol=0, atol=1e-5)


def their_folder(tmp_path, layout, pooling="lasttoken", normalize=True, similarity="cosine", **settings):
    """A folder that sentence-transformers itself wrote (6.x), or one in the layout of 5.x and before."""
    base = tiny_checkpoint(tmp_path / "base")
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "model_max_length": 48}
    (base / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special})
    )
    modules = sentence_transformers.models
    parts = [modules.Transformer(str(base)), modules.Pooling(48, pooling_mode=pooling)]
    model = sentence_transformers.SentenceTransformer(
        modules=parts + [modules.Normalize()] * normalize,
        prompts={"query": "find: ", "document": "text: ", "other": "x"},
        similarity_fn_name=similarity,
        device="cpu",
    )
    folder = tmp_path / "theirs"
    model.save_pretrained(str(folder))
    if layout == "legacy":
        names = ["Transformer", "Pooling", "Normalize"][: 2 + normalize]
        paths = ["", "1_Pooling", "2_Normalize"]
        listed = [
            {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{name}"}
            for i, name in enumerate(names)
        ]
        old = {
            f"pooling_mode_{name}": False for name in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
        }
        old[f"pooling_mode_{pooling}" + ("_tokens" if pooling == "mean" else "")] = True
        (folder / "modules.json").write_text(json.dumps(listed))
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 48, **old}))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 48, **settings}))
    return folder


@pytest.mark.parametrize("layout", ["6.x", "legacy"])
@pytest.mark.parametrize("normalize", [True, False])
def test_sentence_transformers_folders_in_ours(tmp_path, layout, normalize):
    """Their prompts and length; without Normalize, cosine gives the same ranking."""
    folder = their_folder(tmp_path, layout, normalize=normalize)
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    ours = load_embedder(folder, CPU, torch.float32)
    assert ours.max_length == theirs.max_seq_length == 48
    assert (ours.prompts["query"], ours.prompts["document"]) == ("find: ", "text: ")
    for kind, encode in (("query", theirs.encode_query), ("document", theirs.encode_document)):
        expected = torch.from_numpy(encode(TEXTS, normalize_embeddings=True))
        embedded = ours.embed(ours.tokenize(TEXTS, kind))
        torch.testing.assert_close(embedded, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["6.x", "legacy"])
@pytest.mark.parametrize(
    "options, message",
    [
        ({"pooling": "mean"}, "1_Pooling/config.json: the pooling is .*mean.*, only lasttoken"),
        ({"normalize": False, "similarity": "dot"}, "modules.json: no Normalize, and similarity 'dot'"),
    ],
)
def test_other_poolings_are_refused_by_name(tmp_path, layout, options, message):
    with pytest.raises(InputError, match=message):
        load_embedder(their_folder(tmp_path, layout, **options), CPU, torch.float32)


def test_other_modules_are_refused_by_name(tmp_path):
    folder = their_folder(tmp_path, "legacy", do_lower_case=True)
    with pytest.raises(InputError, match="do_lower_case"):
        load_embedder(folder, CPU, torch.float32)
    listed = json.loads((folder / "modules.json").read_text())
    listed.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(InputError, match="modules Transformer, Pooling, Normalize, Dense; supported"):
        load_embedder(folder, CPU, torch.float32)
    (folder / "modules.json").write_text("[1]")
    with pytest.raises(InputError, match="modules.json: expected a list"):
        load_embedder(folder, CPU, torch.float32)


@pytest.mark.parametrize("processor", [False, True])
def test_the_eos_that_tokenizer_config_asks_for(tmp_path, processor):
    """E5-mistral's files: the flags ask for BOS and EOS, tokenizer.json adds at most the BOS. transformers 5
    follows tokenizer.json; with both flags given to its loader it agrees with us."""
    base = tiny_checkpoint(tmp_path / "base", model_type="mistral")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if processor:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    tokenizer.save(str(base / "tokenizer.json"))
    special = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "add_bos_token": True,
        "add_eos_token": True,
    }
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **special}))
    embedder = load_embedder(base, CPU, torch.float32, max_length=16)
    theirs = transformers.AutoTokenizer.from_pretrained(base, add_bos_token=True, add_eos_token=True)
    for text in ["short", "x" * 40]:
        (ids,) = embedder.tokenize([text], "query")
        assert (ids[0], ids[-1], len(ids)) == (257, 258, min(len(text), 14) + 2)
        assert ids == theirs(text, truncation=True, max_length=16)["input_ids"]


def test_a_chat_templates_folder_is_refused(tmp_path):
    """sentence-transformers 6 renders each text through a chat template where the base has one."""
    base = tiny_checkpoint(tmp_path / "base")
    turns = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    path = base / "tokenizer_config.json"
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>"}
    path.write_text(json.dumps(known | {"chat_template": turns}))
    modules = sentence_transformers.models
    network = modules.Transformer(str(base))
    parts = [network, modules.Pooling(48, pooling_mode="lasttoken"), modules.Normalize()]
    folder = tmp_path / "saved"
    sentence_transformers.SentenceTransformer(modules=parts, device="cpu").save(str(folder))
    with pytest.raises(InputError, match="sentence_bert_config.json: its texts go through a chat template"):
        load_embedder(folder)
    settings = json.loads((folder / "sentence_bert_config.json").read_text())
    del settings["modality_config"]["message"]  # as the message says
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    expected = torch.from_numpy(theirs.encode(["red cats", "a"]))
    ours = load_embedder(folder, dtype="float32")
    embedded = ours.embed(ours.tokenize(["red cats", "a"], "query")).detach()
    torch.testing.assert_close(embedded, expected, rtol=0, atol=1e-5)
