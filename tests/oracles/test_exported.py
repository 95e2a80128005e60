"""Exported folders in transformers, PEFT and sentence-transformers, also by the card's own snippets."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from test_export import OPTIONS, PROMPTS, TEXTS, make_run
from tiny import tiny_checkpoint

from formats.embedders import load_embedder
from support.launch import CPU
from tools.export import main

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")

TEXTS = [text for text in TEXTS if text]  # of an empty one the others have no last token


def exported(tmp_path, kind, run):
    assert main([str(run), "--to", str(tmp_path / "mine"), "--format", kind]) == 0
    return tmp_path / "mine"


def ours(run, kind):
    embedder = load_embedder(run, CPU, torch.float32)
    ids = embedder.tokenize(TEXTS, kind)
    return ids, embedder.embed(ids).detach()


@torch.no_grad()
def check(model, folder, run):
    """Token ids and embeddings of a transformers model with the folder's tokenizer, against the run's."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for kind in PROMPTS:
        prompt = load_embedder(run, CPU, torch.float32).prompts[kind]
        inputs = tokenizer([prompt + t for t in TEXTS], padding=True, truncation=True, return_tensors="pt")
        mask = inputs["attention_mask"]
        ids, expected = ours(run, kind)
        assert [row[:n].tolist() for row, n in zip(inputs["input_ids"], mask.sum(1), strict=True)] == ids
        hidden = model(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
        actual = F.normalize(hidden[torch.arange(len(ids)), mask.sum(1) - 1], dim=-1)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


FAMILIES = [
    {"model_type": "qwen2"},
    {"model_type": "qwen3", "head_dim": 8},
    {
        "model_type": "llama",
        "tie_word_embeddings": False,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
]


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config["model_type"])
@pytest.mark.parametrize("options", [OPTIONS, {}], ids=["options", "plain"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_merged_in_transformers(tmp_path, config, options, full):
    run = make_run(tmp_path, full, options, **config)
    folder = exported(tmp_path, "merged", run)
    model, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    check(model.eval(), folder, run)
    saved = json.loads((folder / "config.json").read_text())
    theta = config.get("rope_theta", 10000.0)
    assert saved["rope_theta"] == saved["rope_parameters"]["rope_theta"] == theta
    kinds = {"llama3" if "rope_scaling" in config else "default"}
    assert {
        saved["rope_parameters"]["rope_type"],
        (saved["rope_scaling"] or {}).get("rope_type", "default"),
    } == kinds
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == saved["eos_token_id"] == 256
    assert tokenizer.model_max_length == 64


@pytest.mark.parametrize("options", [OPTIONS, {}], ids=["options", "plain"])
def test_adapter_in_peft(tmp_path, options):
    run = make_run(tmp_path, options=options)
    folder = exported(tmp_path, "adapter", run)
    base = transformers.AutoModel.from_pretrained(tmp_path / "somebody" / "base-model")
    check(peft.PeftModel.from_pretrained(base, folder).eval(), folder, run)


@pytest.mark.parametrize("kind", ["sentence-transformers", "merged", "adapter"])
@pytest.mark.parametrize("options", [OPTIONS, {}], ids=["options", "plain"])
@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config["model_type"])
def test_in_sentence_transformers(tmp_path, kind, options, config):
    run = make_run(tmp_path, options=options, **config)
    theirs = sentence_transformers.SentenceTransformer(str(exported(tmp_path, kind, run)), device="cpu")
    for kind in PROMPTS:
        encoded = torch.from_numpy(theirs.encode(TEXTS, prompt_name=kind, batch_size=2))
        torch.testing.assert_close(encoded, ours(run, kind)[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["merged", "adapter", "sentence-transformers"])
def test_from_pefts_causal_adapter(tmp_path, kind, rslora):
    """An adapter that PEFT saved from a CausalLM, its names and its scaling: the same in every format."""
    base = tiny_checkpoint(tmp_path / "somebody" / "base-model")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], use_rslora=rslora, init_lora_weights=False
    )
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    folder = exported(tmp_path, kind, tmp_path / "adapter")
    check(theirs.base_model.model.model, folder, tmp_path / "adapter")
    if kind == "adapter":
        model = transformers.AutoModel.from_pretrained(base)
        check(peft.PeftModel.from_pretrained(model, folder).eval(), folder, tmp_path / "adapter")
    elif kind == "merged":
        check(transformers.AutoModel.from_pretrained(folder).eval(), folder, tmp_path / "adapter")
    else:
        model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
        encoded = torch.from_numpy(model.encode(TEXTS, prompt_name="query"))
        torch.testing.assert_close(encoded, ours(tmp_path / "adapter", "query")[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["merged", "adapter", "sentence-transformers"])
def test_the_cards_snippets_run(tmp_path, kind, monkeypatch):
    """Each Python block of the card, run as it stands, embeds as the run does."""
    run = make_run(tmp_path)
    card = (exported(tmp_path, kind, run) / "README.md").read_text()
    monkeypatch.chdir(tmp_path)  # where the card's name for it is a folder
    embedder = load_embedder(run, CPU, torch.float32)
    texts = {"queries": ["a question"], "documents": ["a title and a text", "another text"]}
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == (1 if kind == "merged" else 2)
    for snippet in snippets:
        scope = {}
        exec(snippet, scope)
        for name, kind_of_text in (("queries", "query"), ("documents", "document")):
            expected = embedder.embed(embedder.tokenize(texts[name], kind_of_text)).detach()
            torch.testing.assert_close(torch.as_tensor(scope[name]), expected, rtol=0, atol=1e-5)
