"""Which heads are chosen, and what is said of them."""

import json

import pytest
import torch
from test_attention import Case
from tiny import HEADS, make_rows, tiny_checkpoint, world, write_rows

import tools.heads
from attention import Injection, attention, head_tensors
from data import collate
from model import read_prefix, target_loss
from related.qrhead import (
    Reader,
    attention_on_prefix,
    attention_to_keys,
    choose_heads,
    document_shares,
    read,
    read_heads,
    score_heads,
    select_heads,
    steering,
)
from support.files import InputError
from support.launch import CPU
from support.show import verdict


def test_attention_to_keys_is_the_softmax():
    case = Case(2)
    q, k, v = case.q, case.k, case.v
    visible = torch.ones(q.shape[0], q.shape[2], k.shape[2], dtype=torch.bool).tril()
    weights = torch.full((q.shape[0], q.shape[2]), 1 / q.shape[2])
    v = torch.eye(k.shape[2], dtype=v.dtype).expand(*k.shape[:2], -1, -1)
    expected = attention(q, k, v).mean(2).float()
    torch.testing.assert_close(attention_to_keys(q, k, visible, weights), expected)


def test_steering_puts_the_whole_weight_on_one_candidate(tmp_path):
    judge, _, builder, rows = world(tmp_path)
    prompts, tensors = builder.build(rows), head_tensors(HEADS, CPU)
    reader = Reader(judge, builder, CPU)
    losses = steering(reader, *read(reader, prompts, "target"), tensors)
    assert losses.shape == (5, 5)
    for own, row in zip(losses, rows, strict=True):
        assert own.isfinite().sum() == len(row.documents)
    assert losses[1].amax() - losses[1].amin() > 1e-3
    batch = collate(prompts[1:2], CPU)
    alone = torch.full((1, 5), -torch.inf)
    alone[0, 2] = 0.0
    expected = target_loss(judge, batch, change=Injection(alone, batch.documents, tensors))
    torch.testing.assert_close(losses[1, 2], expected[0])


@pytest.mark.parametrize("rows", ["target", "query"])
def test_attention_on_the_prefix_is_that_of_the_whole_prompt(tmp_path, rows):
    """A mean over the rows that predict the target, or over the question's; calibration asks "N/A"."""
    judge, _, builder, some = world(tmp_path)
    prompts = builder.build(some)
    reader = Reader(judge, builder, CPU)
    batch, prefix = read(reader, prompts, "target" if rows == "target" else "suffix")
    found = attention_on_prefix(reader, batch, prefix, rows)
    for number, prompt in enumerate(prompts):
        maps = []

        def keep(out, q, k, v, visible, layer, maps=maps):
            logits = q[0] @ k[0].repeat_interleave(q.shape[1] // k.shape[1], 0).mT * q.shape[-1] ** -0.5
            causal = torch.ones(q.shape[2], q.shape[2]).bool().tril()
            maps.append(logits.masked_fill(~causal, -torch.inf).softmax(-1))
            return out

        judge.model(torch.tensor([prompt.input_ids]), change=keep)
        asked = slice(prompt.question_start, prompt.target_start)
        taken = slice(prompt.target_start - 1, -1) if rows == "target" else asked
        width = int(batch.prefix_lengths[number])
        expected = torch.stack(maps)[:, :, taken, :width].mean(2).float()
        torch.testing.assert_close(found[number, :, :, :width], expected, rtol=0, atol=1e-6)
        assert found[number, :, :, width:].sum() == 0


def test_document_shares_and_calibration(tmp_path):
    """Without a baseline shares are plain sums; a baseline equal to the attention leaves nothing."""
    judge, _, builder, rows = world(tmp_path)
    prompts = builder.build(rows)
    reader = Reader(judge.float(), builder, CPU)
    batch, prefix = read(reader, prompts, "target")
    found = attention_on_prefix(reader, batch, prefix, "target")
    shares = document_shares(found, batch)
    start, end = prompts[1].spans[3]
    torch.testing.assert_close(shares[1, :, :, 3], found[1, :, :, start:end].sum(-1))
    assert (shares.sum(-1) < 1).all()
    assert document_shares(found, batch, found).abs().max() == 0
    spiked = found.clone()
    spiked[1, 0, 0, start] = -5.0  # far below its document's mean: dropped, not summed
    dropped = document_shares(spiked, batch, torch.zeros_like(found))
    torch.testing.assert_close(dropped[1, 0, 0, 3], found[1, 0, 0, start + 1 : end].sum())


@pytest.mark.parametrize("calibrate", [False, True])
def test_scores_are_means_over_the_rows_whose_relevant_document_is_known(tmp_path, calibrate):
    """Whatever the batch; a row may tell it by its label, or by being the only one that holds the answer."""
    judge, _, builder, rows = world(tmp_path)
    rows[0].positive, rows[1].positive, rows[1].target = None, None, rows[1].documents[2].text
    reader = Reader(judge.float(), builder, CPU, batch=2, calibrate=calibrate)
    scores, kinds = score_heads(reader, rows)
    assert kinds == {"label": 3, "answer": 1, "none": 1}
    expected = torch.zeros(4, 6)
    for row, relevant in ((rows[1], 2), (rows[2], 0), (rows[3], 0), (rows[4], 0)):
        prompts = builder.shuffled([row], 0)
        batch, prefix = read(reader, prompts, "target")
        found, width = attention_on_prefix(reader, batch, prefix, "target"), prompts[0].question_start
        batch.documents, baseline = batch.documents[:, :width], None
        if calibrate:
            asked = read(reader, builder.with_query(prompts, "N/A"), "target")
            baseline = attention_on_prefix(reader, *asked, "target")[..., :width]
        found = found[..., :width]
        expected += document_shares(found, batch, baseline)[0, :, :, relevant] / 4
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("calibrate", [False, True])
def test_prompts_are_read_twice(tmp_path, monkeypatch, calibrate):
    """To score the heads, with calibration or without, and to describe the chosen ones; two more readings are
    those of the relevant and of a random document alone."""
    judge, _, builder, rows = world(tmp_path)
    lengths, decode = [], judge.model.read

    def watched(ids, own):
        lengths.extend(own.tolist())
        return decode(ids, own)

    monkeypatch.setattr(judge.model, "read", watched)
    reader = Reader(judge.float(), builder, CPU, batch=2, calibrate=calibrate)
    select_heads(reader, rows, "top", 3, "judge")
    assert len(lengths) == 4 * len(rows)


def test_choose_heads():
    scores = torch.tensor([[0.1, 0.9], [0.5, 0.3]])
    assert choose_heads(scores, "top", 2, 0) == [(0, 1), (1, 0)]
    assert choose_heads(scores, "worst", 1, 0) == [(0, 0)]
    assert len(choose_heads(scores, "all", 1, 0)) == 4
    draws = {tuple(choose_heads(scores, "random", 2, seed)) for seed in range(20)}
    assert len(draws) > 3 and choose_heads(scores, "random", 2, 7) == choose_heads(scores, "random", 2, 7)


def test_too_many_heads_is_an_input_error(tmp_path):
    judge, _, builder, rows = world(tmp_path)
    with pytest.raises(InputError, match="--num-heads 25: the judge has 24 heads"):
        select_heads(Reader(judge, builder, CPU), rows, "top", 25, "judge")


def test_heads_are_chosen_without_training_and_taken_from_the_file(tmp_path, capsys):
    checkpoint = tiny_checkpoint(tmp_path / "judge")
    rows, out = write_rows(tmp_path / "rows.jsonl", make_rows([3, 2] * 6)), tmp_path / "heads.json"
    command = ["--train", str(rows), "--judge", str(checkpoint), "--device", "cpu", "--out"]
    assert tools.heads.main([*command, str(out), "--num-heads", "3"]) == 0
    assert "3 of 24 heads, on 12 rows set aside" in capsys.readouterr().out
    saved = json.loads(out.read_text())
    assert saved["labels"] == {"label": 12, "answer": 0, "none": 0}
    top = torch.tensor(saved["scores"]).flatten().topk(3).indices.tolist()
    assert saved["selected"] == [[i // 6, i % 6] for i in top]
    again = tmp_path / "again.json"
    assert tools.heads.main([*command, str(again), "--heads", str(out)]) == 0
    assert json.loads(again.read_text()) == saved
    config = world(tmp_path / "world")[0].config
    assert read_heads(out, config) == ([tuple(pair) for pair in saved["selected"]], saved)


def test_heads_without_labels_are_ranked_by_gradient(tmp_path, capsys):
    """A judge that learns is asked as it was before."""
    judge, _, builder, rows = world(tmp_path)
    for row in rows:
        row.positive = None
    saved = select_heads(Reader(judge.float(), builder, CPU), rows, "top", 3, "judge")
    assert saved["labels"] == {"label": 0, "answer": 0, "none": 5}
    assert "ranked by the gradient" in capsys.readouterr().out
    assert len(saved["selected"]) == 3 and min(map(min, saved["scores"])) > 0
    expected, tensors = torch.zeros(()), head_tensors([(2, 3)], CPU)
    for row in rows:
        batch = collate(builder.shuffled([row], 0), CPU)
        scores = torch.zeros(1, len(row.documents), requires_grad=True)
        injection = Injection(scores.log_softmax(-1), batch.documents, tensors)
        loss = target_loss(judge, batch, read_prefix(judge, batch), injection)
        expected = expected + torch.autograd.grad(loss.sum(), scores)[0].norm() / len(rows)
    torch.testing.assert_close(torch.tensor(saved["scores"])[2, 3], expected, rtol=1e-4, atol=1e-7)
    judge.requires_grad_()
    learns = select_heads(Reader(judge, builder, CPU), rows, "top", 3, "judge")
    torch.testing.assert_close(torch.tensor(learns["scores"]), torch.tensor(saved["scores"]))


@pytest.mark.parametrize(
    "changes, told",
    [
        ({}, "these heads of this judge can teach on these rows"),
        ({"context_gain": None, "steering_best_is_relevant": None}, "these heads of this judge can teach"),
        ({"context_gain": 0.01}, "hardly better with the relevant document"),
        ({"steering_range": 0.05}, "these heads hardly move the loss"),
        ({"steering_best_is_relevant": 0.3}, "not lowest with the weight on the relevant document"),
    ],
)
def test_the_verdict(changes, told):
    """The real model's figures, and one at a time too small."""
    report = {"context_gain": 3.34, "steering_range": 2.48, "steering_best_is_relevant": 0.83, "chance": 0.25}
    assert told in verdict(report | changes)
    assert ("cannot teach" in verdict(report | changes)) == ("can teach" not in told)
