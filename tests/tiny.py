"""Tiny random models, tokenizers and prompts for the tests."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data import Document, PromptBuilder, Row
from formats.checkpoints import read_config, save_weights
from model import CausalLM, Config, Embedder, add_lora

HEADS = [(0, 1), (0, 4), (1, 0), (1, 2), (2, 3), (2, 5)]  # two in each of three consecutive layers

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


def learning(network: torch.nn.Module, dropout: float = 0.0) -> torch.nn.Module:
    """The network with adapters that change something: their B is not zero."""
    add_lora(network, 4, 8, dropout)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def world(folder: Path, dropout: float = 0.0) -> tuple[CausalLM, Embedder, PromptBuilder, list[Row]]:
    """A judge, a retriever with LoRA, prompts, and rows with 2 to 5 candidates; all in float64."""
    config = config_file(folder)
    decoder = random_lm(config, 1).model
    torch.manual_seed(2)
    retriever = Embedder(learning(decoder, dropout).double(), byte_tokenizer(), 64).train()
    builder = PromptBuilder(byte_tokenizer(), 1000, max_target=6)
    return random_lm(config, 0, torch.float64), retriever, builder, make_rows([3, 5, 2, 4, 3])


def write_rows(path: Path, rows: list[Row]) -> Path:
    """Training rows as a JSON-lines file."""
    lines = [
        {
            "query": row.query,
            "target": row.target,
            "documents": [{"title": d.title, "text": d.text} for d in row.documents],
            "positive": row.positive,
        }
        for row in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def beir_folder(folder: Path, num_documents: int = 12) -> Path:
    """A dataset in BEIR's layout: one query, one relevant document, judged in "dev" and in "test"."""
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{i}", "title": "", "text": f"text {i} " + "ab " * i} for i in range(num_documents)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(d) + "\n" for d in corpus))
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "text 3"}\n')
    for split in ("dev", "test"):
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\nq\td3\t1\n")
    return folder
