"""The networks, LoRA, the embedder and the judge's functions: what they compute and what must not change."""

import pytest
import torch
import torch.nn.functional as F
from tiny import byte_tokenizer, config_file, learning, random_lm, tiny_checkpoint, world
from tokenizers import processors

from data import collate
from formats.checkpoints import Checkpoint
from model import Embedder, add_lora, learns, read_prefix, target_loss
from support.files import InputError
from support.launch import CPU

TEXTS = ["a", "some longer text", "", "東京 🙂", "x" * 300]


FAMILIES = {
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 6},
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_over_prefixes_read_before_are_the_whole_text(tmp_path, family):
    """Whatever the prefixes' lengths, and whatever stands in their padding."""
    decoder = random_lm(config_file(tmp_path, **FAMILIES[family]), dtype=torch.float64).model
    ids = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))
    whole, lengths, rows = decoder(ids), torch.tensor([9, 4, 12]), 8
    prefix = decoder.read(ids[:, :12], lengths)
    suffix = torch.stack([own[start : start + rows] for own, start in zip(ids, lengths, strict=True)])
    for number, (own, start) in enumerate(zip(decoder(suffix, prefix), lengths, strict=True)):
        torch.testing.assert_close(own, whole[number, start : start + rows], rtol=0, atol=1e-10)
    assert sorted(prefix.keys) == sorted(prefix.values) == [0, 1, 2, 3]


def test_the_last_rows_alone_are_those_of_the_whole_network(tmp_path):
    """In output and gradient, also where activations are computed again."""
    decoder = learning(random_lm(config_file(tmp_path)).model).double()
    ids, lengths = torch.randint(0, 256, (3, 11)), torch.tensor([11, 1, 6])
    adapters = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    found = []
    for again in (False, True):
        decoder.activation_checkpointing = again
        found.append(decoder.last(ids, lengths))
    found.append(decoder(ids)[torch.arange(3), lengths - 1])
    gradients = [torch.autograd.grad(out.sin().sum(), adapters) for out in found]
    for out, own in zip(found[:2], gradients[:2], strict=True):
        torch.testing.assert_close(out, found[2], rtol=0, atol=1e-10)
        for mine, expected in zip(own, gradients[2], strict=True):
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rows", ["target", "suffix"])
def test_the_targets_loss_is_the_cross_entropy_of_its_tokens(tmp_path, rows):
    judge, _, builder, some = world(tmp_path)
    prompts = builder.build(some)
    batch = collate(prompts, CPU, rows)
    found = target_loss(judge, batch)
    for own, prompt in zip(found, prompts, strict=True):
        ids = torch.tensor(prompt.input_ids)
        logits = judge.lm_head(judge.model(ids[None]))[0, prompt.target_start - 1 : -1]
        expected = F.cross_entropy(logits, ids[prompt.target_start :])
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-10)
    assert torch.equal(target_loss(judge, batch, read_prefix(judge, batch)), found)


def test_a_prefix_has_a_graph_only_where_the_judge_learns(tmp_path):
    judge, _, builder, rows = world(tmp_path)
    batch = collate(builder.build(rows), CPU)
    assert not learns(judge) and not read_prefix(judge, batch).keys[3].requires_grad
    learning(judge)
    assert learns(judge) and read_prefix(judge, batch).keys[3].requires_grad


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
