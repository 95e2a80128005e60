"""Our decoder against transformers, on tiny random networks of each family and switch."""

import pytest
import torch
from tiny import byte_tokenizer, config_file, random_lm

from data import pad
from formats.checkpoints import Checkpoint, save_weights
from support.launch import CPU

transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
}
NETWORKS = {
    "qwen2": {"model_type": "qwen2"},
    "qwen2-untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen2-mha": {"model_type": "qwen2", "num_key_value_heads": 6},
    "qwen3": {"model_type": "qwen3", "head_dim": 20, "rope_theta": 1e6},
    "qwen3-bias": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True},
    "llama": {"model_type": "llama", "rope_theta": 5e5},
    "llama-untied-bias": {
        "model_type": "llama",
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama3-rope": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3},
    "llama3-rope-v5": {"model_type": "llama", "rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    "llama-head-dim": {"model_type": "llama", "head_dim": 12},
    "mistral": {"model_type": "mistral", "sliding_window": None},
}


def both(tmp_path, changes, dtype=torch.float32):
    """The same folder through our loader and through transformers'."""
    config = config_file(tmp_path / "made", **changes)
    save_weights(random_lm(config), tmp_path / "checkpoint", torch.float32)
    ours = Checkpoint(tmp_path / "checkpoint", CPU, dtype).causal_lm()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=dtype)
    return ours, theirs.eval()


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_hidden_states_and_logits(name, tmp_path):
    ours, theirs = both(tmp_path, NETWORKS[name])
    ids = torch.randint(0, 300, (3, 70), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids, output_hidden_states=True)
    hidden = ours.model(ids)
    scale = expected.hidden_states[-1].abs().max()
    torch.testing.assert_close(hidden / scale, expected.hidden_states[-1] / scale, rtol=0, atol=1e-5)
    scale = expected.logits.abs().max()
    torch.testing.assert_close(ours.lm_head(hidden) / scale, expected.logits / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama3-rope"])
@torch.no_grad()
def test_bfloat16(name, tmp_path):
    """As close to transformers in bfloat16 as bfloat16 is to float32."""
    ours, theirs = both(tmp_path, NETWORKS[name], torch.bfloat16)
    exact = theirs.float()
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    reference = exact.model(ids).last_hidden_state
    rounded = exact.bfloat16().model(ids).last_hidden_state.float()
    error = (ours.model(ids).float() - reference).norm() / reference.norm()
    assert error <= 1.2 * (rounded - reference).norm() / reference.norm() + 1e-3


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama3-rope"])
@torch.no_grad()
def test_greedy_continuation(name, tmp_path):
    ours, theirs = both(tmp_path, NETWORKS[name])
    prompt = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(1))
    expected = theirs.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids = prompt
    for _ in range(20):
        ids = torch.cat((ids, ours.lm_head(ours.model(ids)[:, -1:]).argmax(-1)), 1)
    assert ids.tolist() == expected.tolist()


@torch.no_grad()
def test_suffix_over_padded_prefixes(tmp_path):
    """Rows of unequal prefix lengths, read through the cache, equal transformers on each row alone."""
    ours, theirs = both(tmp_path, NETWORKS["qwen2"])
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in (9, 25, 17)]
    prefix, lengths = pad([row[:-4] for row in rows], CPU)
    cache = ours.model.read(prefix, lengths)
    hidden = ours.model(torch.tensor([row[-4:] for row in rows]), prefix=cache)
    for row, own in zip(rows, hidden, strict=True):
        expected = theirs.model(torch.tensor([row])).last_hidden_state[0, -4:]
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


def test_tokens_equal(tmp_path):
    """Our tokenizer handling gives what transformers' fast tokenizer gives."""
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    text = "Tromsø, 東京 and e\u0301 🙂"
    assert byte_tokenizer().encode(text).ids == fast(text)["input_ids"]
