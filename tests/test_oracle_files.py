"""Our checkpoints in PEFT and sentence-transformers, and PEFT's in ours: equal embeddings."""

import pytest
import torch
import torch.nn.functional as F
from tiny import byte_tokenizer, tiny_checkpoint

from data import pad
from model import Checkpoint, Embedder, add_lora, load_embedder, lora_layers, save_embedder

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")

CPU = torch.device("cpu")
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
    [{}, {"lora": False}, {"append_eos": True, "prompts": {"query": "find: ", "document": "text: "}}],
)
def test_our_run_in_sentence_transformers(tmp_path, options):
    _, embedder = saved_run(tmp_path, **options)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "run"), device="cpu")
    for kind in ("query", "document"):
        ours = embedder.embed(embedder.tokenize(TEXTS, kind)).detach()
        encoded = torch.from_numpy(theirs.encode(TEXTS, prompt_name=kind, batch_size=2))
        torch.testing.assert_close(ours, encoded, rtol=0, atol=1e-5)
