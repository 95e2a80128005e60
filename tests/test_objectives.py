"""Every objective against a plain float64 twin: one graph, one text at a time, its equations."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_dream import TEMPERATURE, assert_equal, dream_objective, parameters, plain_step, step
from tiny import beir_folder, learning, make_rows, tiny_checkpoint, world, write_rows

import dream
from data import Row
from model import apply_rope, rope_frequencies
from related import infonce
from related.infonce import InBatch, InfoNCE
from related.replug import Replug
from related.revela import CrossDocument, Revela, first_half, revela_groups
from support.launch import CPU


def embed(retriever, text, kind="document"):
    return retriever.embed(retriever.tokenize([text], kind))[0]


def mean(losses, learnt):
    """What a twin expects of a step: the mean of its losses, and the gradients."""
    loss = torch.stack(losses).mean()
    return {"loss": loss.detach()}, torch.autograd.grad(loss, learnt)


# InfoNCE


@pytest.mark.parametrize("in_batch", [False, True])
def test_infonce_equals_its_equation(tmp_path, in_batch):
    _, retriever, _, rows = world(tmp_path)
    rows[2].documents[1] = rows[0].documents[2]  # one text in two rows
    rows[3].documents[2] = rows[4].documents[0]  # a positive elsewhere
    rows[1].positive = 3
    losses = []
    for row in rows:
        texts = [d.full_text for d in row.documents]
        if in_batch:
            texts += sorted({d.full_text for other in rows for d in other.documents} - set(texts))
        q = embed(retriever, row.query, "query")
        scores = torch.stack([q @ embed(retriever, text) for text in texts]) / TEMPERATURE
        losses.append(scores.logsumexp(0) - scores[row.positive])
    expected = mean(losses, parameters(retriever))
    for together in (1 << 30, 2):
        retriever.zero_grad()
        assert_equal(step(retriever, InfoNCE(in_batch, together), rows), expected)


def test_in_batch_negatives_count_a_text_of_several_processes_once(tmp_path, monkeypatch):
    _, retriever, _, rows = world(tmp_path)
    rows[2].documents[1] = rows[3].documents[2] = rows[1].documents[0]  # also rows[1]'s positive
    objective = InfoNCE(True)
    batches = [dream.prepare(retriever, objective, rows, (0,), rank, 2) for rank in (0, 1)]
    embedded = [retriever.embed(batch.token_ids) for batch in batches]

    def gathered(own):
        if own.is_floating_point():
            return torch.cat([part[b.num_queries :] for part, b in zip(embedded, batches, strict=True)])
        return torch.cat([batch.digests[:, None] for batch in batches])

    monkeypatch.setattr(infonce, "gather_rows", gathered)
    texts = list({document.full_text for row in rows for document in row.documents})
    passages = torch.stack([embed(retriever, text) for text in texts])
    for batch, embeddings in zip(batches, embedded, strict=True):
        (piece,) = batch.pieces
        scores = torch.einsum("bc,bnc->bn", embeddings[piece.queries], embeddings[piece.candidates])
        how = scores, piece.present, piece.queries, piece.candidates, TEMPERATURE
        shares = InBatch(embeddings, batch).log_share(*how)[:, 0]
        for row, share in zip(piece.rows, shares, strict=True):
            weights = (passages @ embed(retriever, row.query, "query") / TEMPERATURE).softmax(0)
            own = [texts.index(text) for text in {document.full_text for document in row.documents}]
            torch.testing.assert_close(share, weights[own].sum().log(), rtol=0, atol=1e-6)


def test_infonce_needs_labels(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", make_rows([3] * 12))
    lines = rows.read_text().splitlines()
    lines[4] = json.dumps({k: v for k, v in json.loads(lines[4]).items() if k != "positive"})
    rows.write_text("\n".join(lines) + "\n")
    base = str(tiny_checkpoint(tmp_path / "base"))
    command = ["train", "--train", str(rows), "--retriever", base, "--objective", "infonce"]
    assert dream.main([*command, "--out", str(tmp_path / "run"), "--head-examples", "1"]) == 2
    assert "line 5: --objective infonce needs 'positive'" in capsys.readouterr().err


# REPLUG


@pytest.mark.parametrize("likelihood", ["mean", "sum"])
@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_replug_equals_its_equation(tmp_path, likelihood, kl):
    judge, retriever, builder, rows = world(tmp_path)
    objective = Replug(judge, builder, 2, 0.5, likelihood, kl)
    found, losses = step(retriever, objective, rows), []
    for row in rows:
        log_p_judge = []
        for document in row.documents:
            (prompt,) = builder.build([Row(0, row.query, row.target, [document], None)])
            ids = torch.tensor([prompt.input_ids])
            logits = judge.lm_head(judge.model(ids))[0, prompt.target_start - 1 : -1]
            log_p_judge.append(-F.cross_entropy(logits, ids[0, prompt.target_start :], reduction=likelihood))
        q = embed(retriever, row.query, "query")
        scores = torch.stack([q @ embed(retriever, d.full_text) for d in row.documents])
        log_p = (scores / TEMPERATURE).log_softmax(0)
        log_q = (torch.stack(log_p_judge) / 0.5).log_softmax(0)
        if kl == "reverse":
            log_p, log_q = log_q, log_p
        losses.append((log_p.exp() * (log_p - log_q)).sum())
    assert_equal(found, mean(losses, parameters(retriever)))


# Revela


def plain_revela(judge, texts, weights, normalise):
    """Both passes, one text after another, head by head, by the equations: each text's summed loss."""
    layers, config = judge.model.layers, judge.config
    group = config.num_attention_heads // config.num_key_value_heads

    def project(attention, x):  # (T, C) -> q (Hq, T, D), k, v (Hq, T, D)
        angles = torch.arange(len(x))[:, None].float() * rope_frequencies(config, CPU)
        angles = torch.cat([angles, angles], -1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        heads = [
            p(x).view(len(x), -1, config.head_dim).transpose(0, 1)[None]
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        q, k = (apply_rope(y, cos, sin)[0] for y in heads[:2])
        return q, k.repeat_interleave(group, 0), heads[2][0].repeat_interleave(group, 0)

    def attend(q, k, v, causal):  # of one head
        logits = q @ k.T * config.head_dim**-0.5
        if causal:
            logits = logits.masked_fill(~torch.ones_like(logits, dtype=torch.bool).tril(), -torch.inf)
        return logits.softmax(-1)

    first = [[None] * len(layers) for _ in texts]
    for i, ids in enumerate(texts):
        x = judge.model.embed_tokens(torch.tensor(ids))
        for number, layer in enumerate(layers):
            q, k, v = project(layer.self_attn, layer.input_layernorm(x))
            first[i][number] = (k, v)
            heads = [attend(q[h], k[h], v[h], True) @ v[h] for h in range(len(q))]
            x = x + layer.self_attn.o_proj(torch.cat(heads, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
    losses = []
    for i, ids in enumerate(texts):
        x = judge.model.embed_tokens(torch.tensor(ids))
        for number, layer in enumerate(layers):
            q, k, v = project(layer.self_attn, layer.input_layernorm(x))
            heads = []
            for h in range(len(q)):
                out = attend(q[h], k[h], v[h], True) @ v[h]
                for j in range(len(texts)):
                    if j == i:
                        continue
                    k_j, v_j = (part[h] for part in first[j][number])
                    a = attend(q[h], k_j, v_j, False)
                    b = a @ v_j
                    if normalise:
                        b = b / (a @ v_j.norm(dim=-1, keepdim=True) + 1e-6)
                    out = out + weights[i, j] * b
                heads.append(out)
            x = x + layer.self_attn.o_proj(torch.cat(heads, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits = judge.lm_head(judge.model.norm(x))[:-1]
        losses.append(F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
    return torch.stack(losses)


@pytest.mark.parametrize("normalise", [False, True])
def test_revela_equals_its_equation(tmp_path, normalise):
    """Both passes, the weights, and the gradients of retriever and LM, the first pass not detached; whatever
    groups are read together, and with the activations computed again."""
    judge, retriever, builder, rows = world(tmp_path)
    learning(judge).double()
    groups, losses = revela_groups(retriever, rows, 4), []
    assert len(groups) > 1 and all(len(group) == 4 for group in groups)
    for group in groups:
        texts = [row.target for row in group]
        passages = torch.stack([embed(retriever, text) for text in texts])
        halves = torch.stack([embed(retriever, row.query, "query") for row in group])
        scores = (halves @ passages.T / TEMPERATURE).masked_fill(torch.eye(4).bool(), -torch.inf)
        token_ids = builder.plain(texts, 64)
        summed = plain_revela(judge, token_ids, scores.softmax(-1), normalise)
        losses.append(summed.sum() / sum(len(ids) - 1 for ids in token_ids))
    expected = mean(losses, parameters(retriever, judge))
    for together, again in ((2, False), (1, True)):
        judge.model.activation_checkpointing = again
        judge.zero_grad()
        retriever.zero_grad()
        objective = Revela(judge, builder, retriever, together, 4, normalise)
        found = step(retriever, objective, rows, judge=judge)
        assert_equal(found, expected)
    moved = [gradient.abs().sum() > 0 for gradient in found[1]]
    assert sum(moved) > len(moved) * 0.9  # LM and retriever alike


def test_revela_groups_spend_what_the_rows_would(tmp_path):
    _, retriever, _, rows = world(tmp_path)
    rows = make_rows([8] * 12, range(30, 60))

    def tokens(kind, texts):
        return sum(map(len, retriever.tokenize(list(texts), kind)))

    budget = tokens("query", [r.query for r in rows])
    budget += tokens("document", [d.full_text for r in rows for d in r.documents])
    groups = revela_groups(retriever, rows, 16)
    spent = sum(tokens("document", [r.target]) + tokens("query", [r.query]) for g in groups for r in g)
    cost = spent / len(groups)
    texts = [[row.target for row in group] for group in groups]
    for group, own in zip(groups, texts, strict=True):
        assert len(set(own)) == 16
        for number, row in enumerate(group):  # each asks for all others
            assert [d.full_text for d in row.documents] == own[:number] + own[number + 1 :]
            assert row.query == first_half(row.target) and row.target.startswith(row.query)
    assert spent <= budget < spent + 1.5 * cost
    assert texts[0] == [
        d.full_text for row in rows[:2] for d in row.documents
    ]  # a row's own, then the next's
    assert len(revela_groups(retriever, rows[:1], 16)) == 1  # fewer texts than a group wants


def test_there_is_a_group_for_every_process(tmp_path):
    """Revela's groups are as many as tokens pay for, and never fewer than processes where rows suffice."""
    retriever = world(tmp_path)[1]
    rows = [replace(row, query="") for row in make_rows([3] * 12)]  # nothing pays for the halves that ask
    paid = len(revela_groups(retriever, rows, 3))
    assert paid < 12, paid
    assert len(revela_groups(retriever, rows, 3, least=12)) == 12


def test_cross_attention_in_groups_of_heads_reads_no_padding(tmp_path):
    judge, _, _, _ = world(tmp_path)
    ids = torch.randint(0, 256, (3, 9))
    alone = judge.model.read(ids, torch.tensor([9, 4, 6]))
    weights = torch.rand(3, 3, dtype=torch.float64).fill_diagonal_(0)
    cross = CrossDocument(weights[None], alone)
    before = judge.model(ids, change=cross)
    assert not torch.allclose(before, judge.model(ids))
    for keys in (alone.keys, alone.values):
        for tensor in keys.values():
            tensor[1, :, 4:] = 100.0
    torch.testing.assert_close(judge.model(ids, change=cross), before, rtol=0, atol=0)


# A judge that learns


@pytest.mark.parametrize("inject_rows", ["target", "suffix"])
def test_judge_lora_equals_one_plain_graph(tmp_path, inject_rows):
    judge, retriever, builder, rows = world(tmp_path)
    learning(judge).double()
    expected = plain_step(judge, retriever, builder, rows, inject_rows)
    for again in (False, True):
        judge.model.activation_checkpointing = again
        judge.zero_grad()
        retriever.zero_grad()
        objective = dream_objective(judge, builder, batch=2, inject_rows=inject_rows)
        found = step(retriever, objective, rows, judge=judge)
        assert_equal(found, expected)
    names = list(dream.Models(retriever, judge, None).parameters())
    first = next(number for number, name in enumerate(names) if name.startswith("judge.model.layers.0"))
    assert found[1][first].abs().sum() + found[1][first + 1].abs().sum() > 0  # also what only documents reach


# Whole runs


RUNS = {
    "infonce": "--objective infonce --in-batch-negatives",
    "replug": "--objective replug",
    "revela": "--objective revela --group-size 4",
    "judge-lora": "--judge-lora --judge-lr 1e-3",
}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objectives")
    base, dev = tiny_checkpoint(folder / "base"), beir_folder(folder / "beir")
    rows = write_rows(folder / "rows.jsonl", make_rows([4] * 40))
    flags = f"train --train {rows} --judge {base} --retriever {base} --dev {dev} --dev-split test --steps 8"
    return f"{flags} --batch 4 --eval-every 4 --lr 1e-2 --lora-rank 2 --keep 9 --device cpu".split()


@pytest.mark.parametrize("name", RUNS)
def test_each_kind_of_run_resumes_bit_for_bit(name, command, tmp_path, monkeypatch):
    """Killed between two checkpoints."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert dream.main([*command, *RUNS[name].split(), "--out", str(whole)]) == 0
    original, calls = dream.training_step, itertools.count(1)

    def killed(*arguments):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(dream, "training_step", killed)
    assert dream.main([*command, *RUNS[name].split(), "--out", str(run)]) == 130
    assert dream.main(["train", "--resume", str(run)]) == 0
    last = json.loads((whole / "checkpoints.json").read_text())["last"]
    files = sorted(path.relative_to(whole / last) for path in (whole / last).rglob("*.safetensors"))
    assert ("judge/adapter_model.safetensors" in map(str, files)) == (name in ("revela", "judge-lora"))
    for path in files:
        assert (whole / last / path).read_bytes() == (run / last / path).read_bytes(), path
    losses = [[json.loads(line).get("loss") for line in open(r / "metrics.jsonl")] for r in (whole, run)]
    assert losses[0] == losses[1] and len(set(losses[0])) > 4


def test_the_judges_adapters_learn_at_their_own_rate(command, tmp_path):
    """--judge-lr next to nothing leaves B at zero; the retriever learns all the same."""
    run = tmp_path / "run"
    flags = ["--judge-lora", "--judge-lr", "1e-30", "--steps", "4", "--out", str(run)]
    assert dream.main([*command, *flags]) == 0
    last = run / json.loads((run / "checkpoints.json").read_text())["last"]
    judge, retriever = (
        [tensor.abs().max() for name, tensor in load_file(folder / file).items() if "lora_B" in name]
        for folder, file in (
            (last / "judge", "adapter_model.safetensors"),
            (last, "adapter_model.safetensors"),
        )
    )
    assert max(judge) < 1e-20 and max(retriever) > 1e-4
