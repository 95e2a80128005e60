"""Tiny random models, tokenizers and prompts for the tests."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data import Document, Row
from formats.checkpoints import read_config, save_weights
from model import CausalLM, Config

BASE = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "eos_token_id": 256,
}


def config_file(folder: Path, **changes) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **BASE, **changes}))
    return read_config(folder / "config.json")


def random_lm(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> CausalLM:
    """A frozen model with weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    model = CausalLM(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.15)
    return model.requires_grad_(False).eval().to(dtype)


def byte_tokenizer() -> Tokenizer:
    """One token a byte and an end-of-text token, id 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def tiny_checkpoint(folder: Path, seed: int = 0, **changes) -> Path:
    """A loadable folder: config.json, model.safetensors, tokenizer.json."""
    save_weights(random_lm(config_file(folder, **changes), seed), folder, torch.float32)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def make_rows(counts: list[int], lengths: range = range(3, 40)) -> list[Row]:
    """Rows with the given numbers of candidates and texts of unequal lengths."""
    generator = torch.Generator().manual_seed(len(counts))

    def words(size: int) -> str:
        return bytes(torch.randint(97, 123, (size,), generator=generator).tolist()).decode()

    def size() -> int:
        return int(torch.randint(lengths.start, lengths.stop, (1,), generator=generator))

    return [
        Row(i, words(size()), words(2 + i), [Document(words(3), words(size())) for _ in range(count)], 0)
        for i, count in enumerate(counts)
    ]
