"""REPLUG's judge scores against transformers, one prompt after another."""

import pytest
import torch
from tiny import byte_tokenizer, make_rows, tiny_checkpoint

from data import Piece, PromptBuilder
from formats.checkpoints import Checkpoint
from related.replug import Replug
from support.launch import CPU

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("likelihood", ["mean", "sum"])
@torch.no_grad()
def test_judge_likelihoods_equal_a_loop_over_single_prompts(tmp_path, likelihood):
    folder = tiny_checkpoint(tmp_path / "judge")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    judge = Checkpoint(folder, CPU, torch.float32).causal_lm()
    builder = PromptBuilder(byte_tokenizer(), 1000, max_target=6)
    rows = make_rows([3, 5, 2])
    objective = Replug(judge, builder, likelihood=likelihood)
    present = torch.arange(5) < torch.tensor([[3], [5], [2]])
    read = [prompts for prompts, _ in objective.prepare(rows, (0,))]
    found = objective.likelihoods(Piece(rows, read, None, None, present, None), ~present)  # (3, 5)
    assert torch.equal(found.isfinite(), present)
    instruction, middle = builder.template.split("{documents}")
    for row, own in zip(rows, found, strict=True):
        for document, log_p in zip(row.documents, own, strict=False):
            block = f"Document: {document.title}\n{document.text}\n\n"
            question = middle.replace(" {target}", "").format(query=row.query)
            context = list((instruction + block + question).encode())
            target = list(f" {row.target}".encode())[:6]
            alphabet = byte_tokenizer()
            ids = torch.tensor([alphabet.encode(bytes(context + target).decode()).ids])
            log_probs = theirs(ids).logits[0].log_softmax(-1)
            tokens = torch.arange(len(context), len(context) + len(target))
            expected = log_probs[tokens - 1, ids[0, tokens]]
            expected = expected.mean() if likelihood == "mean" else expected.sum()
            torch.testing.assert_close(log_p, expected, rtol=1e-4, atol=1e-4)
