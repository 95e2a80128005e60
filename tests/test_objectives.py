"""Every objective against a plain float64 twin: one graph, one text at a time, its equations."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_dream import CPU, HEADS, beir_folder, plain_gradients, settings, world, write_rows
from tiny import byte_tokenizer, make_rows, tiny_checkpoint
from tokenizers import processors

import dream
from attention import CrossDocument, isolated_documents
from data import TEMPLATE, CandidatePool, Document, PromptBuilder, Row, Rows, collate
from formats.checkpoints import read_config
from model import Cache, add_lora, apply_rope, rope_frequencies
from support.files import InputError


def step(retriever, builder, rows, args, judge=None, heads=()):
    """One training step: its figures per row, and the gradients of all that learns."""
    objective = dream.make_objective(args, judge, list(heads), CPU)
    prepared = dream.prepare_rows(retriever, builder, rows, args, (0, 5))
    stats = dream.training_step(retriever, objective, prepared, args, (0, 5))
    stats = dream.per_row(stats, len(prepared.indices))
    return stats, [p.grad for p in dream.trained(retriever, judge).values()]


def assert_gradients(found, expected):
    assert max(gradient.abs().max() for gradient in expected) > 1e-4
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-10)


def embed(retriever, text, kind="document"):
    return retriever.embed(retriever.tokenize([text], kind))[0]


def every(**changes):
    """Settings of all objectives."""
    defaults = dict(in_batch_negatives=False, judge_temperature=0.5, target_likelihood="mean", kl="forward")
    defaults |= dict(group_size=4, normalise_values=False, max_length=64)
    return settings(**{**defaults, **changes})


def learning(judge, checkpointing):
    """Give the judge adapters that change something."""
    add_lora(judge.model, 4, 8)
    for name, parameter in judge.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    judge.double()
    judge.model.activation_checkpointing = checkpointing


# InfoNCE


@pytest.mark.parametrize("in_batch", [False, True])
def test_infonce_equals_its_equation(tmp_path, in_batch):
    _, retriever, _, rows = world(tmp_path)
    rows[2].documents[1] = rows[0].documents[2]  # one text in two rows
    rows[3].documents[2] = rows[4].documents[0]  # a positive elsewhere
    rows[1].positive = 3
    args = every(objective="infonce", in_batch_negatives=in_batch)
    stats, found = step(retriever, None, rows, args)
    losses = []
    for row in rows:
        texts = [d.full_text for d in row.documents]
        if in_batch:
            texts += sorted({d.full_text for other in rows for d in other.documents} - set(texts))
        q = embed(retriever, row.query, "query")
        scores = torch.stack([q @ embed(retriever, text) for text in texts]) / args.temperature
        losses.append(scores.logsumexp(0) - scores[row.positive])
    loss = torch.stack(losses).mean()
    torch.testing.assert_close(stats["loss"].double(), loss.detach(), rtol=0, atol=1e-6)
    assert_gradients(found, torch.autograd.grad(loss, list(dream.trainable(retriever).values())))


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
    args = every(objective="replug", target_likelihood=likelihood, kl=kl)
    stats, found = step(retriever, builder, rows, args, judge)
    losses = []
    for row in rows:
        log_p_judge = []
        for document in row.documents:
            (prompt,) = builder.build([Row(0, row.query, row.target, [document], None)])
            ids = torch.tensor([prompt.input_ids])
            logits = judge.lm_head(judge.model(ids))[0, prompt.target_start - 1 : -1]
            nll = F.cross_entropy(logits, ids[0, prompt.target_start :], reduction=likelihood)
            log_p_judge.append(-nll)
        q = embed(retriever, row.query, "query")
        scores = torch.stack([q @ embed(retriever, d.full_text) for d in row.documents])
        log_p = (scores / args.temperature).log_softmax(0)
        log_q = (torch.stack(log_p_judge) / args.judge_temperature).log_softmax(0)
        if kl == "reverse":
            log_p, log_q = log_q, log_p
        losses.append((log_p.exp() * (log_p - log_q)).sum())
    loss = torch.stack(losses).mean()
    torch.testing.assert_close(stats["loss"].double(), loss.detach(), rtol=1e-5, atol=0)
    assert_gradients(found, torch.autograd.grad(loss, list(dream.trainable(retriever).values())))


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
@pytest.mark.parametrize("checkpointing", [False, True])
def test_revela_equals_its_equation(tmp_path, normalise, checkpointing):
    """Both passes, the weights, and the gradients of retriever and LM, the first pass not detached."""
    judge, retriever, builder, rows = world(tmp_path)
    learning(judge, checkpointing)
    args = every(objective="revela", normalise_values=normalise)
    stats, found = step(retriever, builder, rows, args, judge)
    groups = dream.revela_groups(retriever, rows, 4)
    assert len(groups) > 1 and all(len(group) == 4 for group in groups)
    losses = []
    for group in groups:
        texts = [row.target for row in group]
        passages = torch.stack([embed(retriever, text) for text in texts])
        halves = torch.stack([embed(retriever, row.query, "query") for row in group])
        scores = (halves @ passages.T / args.temperature).masked_fill(torch.eye(4).bool(), -torch.inf)
        token_ids = builder.plain(texts, 64)
        summed = plain_revela(judge, token_ids, scores.softmax(-1), normalise)
        losses.append(summed.sum() / sum(len(ids) - 1 for ids in token_ids))
    loss = torch.stack(losses).mean()
    torch.testing.assert_close(stats["loss"].double(), loss.detach(), rtol=1e-6, atol=0)
    parameters = list(dream.trained(retriever, judge).values())
    assert_gradients(found, torch.autograd.grad(loss, parameters))
    assert sum(g.abs().sum() > 0 for g in found) > len(found) * 0.9  # LM and retriever alike


def test_revela_groups_spend_what_the_rows_would(tmp_path):
    _, retriever, _, rows = world(tmp_path)
    rows = make_rows([8] * 12, range(30, 60))

    def tokens(kind, texts):
        return sum(map(len, retriever.tokenize(list(texts), kind)))

    budget = tokens("query", [r.query for r in rows])
    budget += tokens("document", [d.full_text for r in rows for d in r.documents])
    groups = dream.revela_groups(retriever, rows, 16)
    spent = sum(tokens("document", [r.target]) + tokens("query", [r.query]) for g in groups for r in g)
    cost = spent / len(groups)
    assert all(len(g) == 16 == len(set(g[0].documents)) for g in groups)
    assert spent <= budget < spent + 1.5 * cost
    assert groups[0][0].documents[:8] == rows[0].documents  # a row's own, then the next row's
    assert groups[0][0].documents[8:] == rows[1].documents
    assert groups[0][0].query == dream.first_half(groups[0][0].target)
    assert len(dream.revela_groups(retriever, rows[:1], 16)) == 1  # fewer texts than a group wants


def test_cross_attention_in_groups_of_heads_reads_no_padding(tmp_path):
    judge, _, _, _ = world(tmp_path)
    ids, lengths = torch.randint(0, 256, (3, 9)), [9, 4, 6]
    alone = Cache(torch.tensor(lengths))
    judge.model(ids, store=alone)
    weights = torch.rand(3, 3, dtype=torch.float64).fill_diagonal_(0)
    cross = CrossDocument(weights[None], alone.keys, alone.values, torch.tensor(lengths))
    before = judge.model(ids, injection=cross)
    for keys in (alone.keys, alone.values):
        for tensor in keys.values():
            tensor[1, :, 4:] = 100.0
    torch.testing.assert_close(judge.model(ids, injection=cross), before, rtol=0, atol=0)


# The judge's adapters, isolated documents


@pytest.mark.parametrize("inject_rows", ["target", "suffix"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_judge_lora_equals_one_plain_graph(tmp_path, inject_rows, checkpointing):
    judge, retriever, builder, rows = world(tmp_path)
    learning(judge, checkpointing)
    args = every(inject_rows=inject_rows)
    stats, found = step(retriever, builder, rows, args, judge, HEADS)
    judge.model.activation_checkpointing = False
    own = list(dream.trained(retriever, judge).values())
    loss, expected = plain_gradients(judge, retriever, builder, rows, args, (0, 5), own)
    torch.testing.assert_close(stats["loss"], loss.to(stats["loss"].dtype))
    assert_gradients(found, expected)
    first = next(
        i for i, name in enumerate(dream.trained(retriever, judge)) if "judge.model.layers.0" in name
    )
    assert found[first].abs().sum() + found[first + 1].abs().sum() > 0  # also what only documents reach


def test_isolated_documents_do_not_see_each_other(tmp_path):
    judge, _, builder, rows = world(tmp_path)
    alone = PromptBuilder(builder.tokenizer, 1000, max_target=6, isolate_documents=True)
    row = rows[1]
    changed = Row(
        0, row.query, row.target, [Document("zzz", "q" * len(row.documents[0].text)), *row.documents[1:]], 0
    )
    keys = {}
    for name, own in (("isolated", alone), ("causal", builder)):
        caches = []
        for each in (row, changed):
            batch = collate(own.build([each]), CPU)
            caches.append(dream.read_prefix(judge, batch))
        start, end = own.build([row])[0].spans[2]
        keys[name] = [cache.keys[3][0, :, start:end] for cache in caches]
        question = [cache.keys[3][0, :, -1] for cache in caches]
        assert not torch.allclose(*question)  # the query reads all of them
    torch.testing.assert_close(*keys["isolated"], rtol=0, atol=0)
    assert not torch.allclose(*keys["causal"])


def test_isolation_mask():
    documents = torch.tensor([[2, 0, 0, 1, 1, 2]])  # instruction, two documents, query
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 0, 0, 1, 0, 0],
            [1, 0, 0, 1, 1, 0],
            [1, 1, 1, 1, 1, 1],
        ]
    ).bool()
    assert torch.equal(isolated_documents(documents, 2)[0], expected)


# Whole runs


RUNS = {
    "infonce": ["--objective", "infonce", "--in-batch-negatives"],
    "replug": ["--objective", "replug"],
    "revela": ["--objective", "revela", "--group-size", "4"],
    "judge-lora": ["--judge-lora", "--judge-lr", "1e-3", "--isolate-documents"],
    "refresh": ["--refresh-candidates", "3", "--candidates", "4"],
}


@pytest.fixture
def command(tmp_path):
    base = str(tiny_checkpoint(tmp_path / "base"))
    rows = str(write_rows(tmp_path / "rows.jsonl", make_rows([4] * 40)))
    dev = str(beir_folder(tmp_path / "beir"))
    return [
        "train",
        "--train",
        rows,
        "--judge",
        base,
        "--retriever",
        base,
        "--dev",
        dev,
        "--dev-split",
        "test",
        "--steps",
        "8",
        "--batch",
        "4",
        "--eval-every",
        "4",
        "--lr",
        "1e-2",
        "--lora-rank",
        "2",
        "--keep",
        "9",
    ]


@pytest.mark.parametrize("name", RUNS)
def test_each_kind_of_run_resumes_bit_for_bit(name, command, tmp_path, monkeypatch):
    """Killed between two checkpoints, in the middle of a stretch between two refreshes."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert dream.main([*command, *RUNS[name], "--out", str(whole)]) == 0
    original, calls = dream.training_step, itertools.count(1)

    def killed(*arguments):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(dream, "training_step", killed)
    assert dream.main([*command, *RUNS[name], "--out", str(run)]) == 130
    assert dream.main(["train", "--resume", str(run)]) == 0
    last = json.loads((whole / "checkpoints.json").read_text())["last"]
    files = sorted(path.relative_to(whole / last) for path in (whole / last).rglob("*.safetensors"))
    assert ("judge/adapter_model.safetensors" in map(str, files)) == (name in ("revela", "judge-lora"))
    assert ("candidates.safetensors" in map(str, files)) == (name == "refresh")
    for path in files:
        assert (whole / last / path).read_bytes() == (run / last / path).read_bytes(), path
    losses = [[json.loads(line).get("loss") for line in open(r / "metrics.jsonl")] for r in (whole, run)]
    assert losses[0] == losses[1] and len(set(losses[0])) > 4


def test_the_judges_adapters_learn_at_their_own_rate(command, tmp_path):
    """--judge-lr 0 leaves B at zero; the retriever learns all the same."""
    from safetensors.torch import load_file

    run = tmp_path / "run"
    assert dream.main([*command, "--judge-lora", "--judge-lr", "1e-30", "--out", str(run)]) == 0
    last = run / json.loads((run / "checkpoints.json").read_text())["last"]
    judge, retriever = (
        load_file(last / "judge" / "adapter_model.safetensors"),
        load_file(last / "adapter_model.safetensors"),
    )
    assert max(t.abs().max() for n, t in judge.items() if "lora_B" in n) < 1e-20
    assert max(t.abs().max() for n, t in retriever.items() if "lora_B" in n) > 1e-4


def test_refreshed_candidates_are_the_retrievers_best(tmp_path):
    retriever = world(tmp_path)[1].float()
    retriever.dtype = torch.float32
    rows = Rows(write_rows(tmp_path / "rows.jsonl", make_rows([4, 3, 5, 4])))
    usable = [0, 2, 3]
    args = settings(candidates=4)
    pool, numbers = dream.refresh_candidates(retriever, rows, usable, args)
    texts = {d.full_text: d for i in usable for d in rows[i].documents}
    assert len(pool) == len(texts) == 13
    for place, index in enumerate(usable):
        row = dream.with_candidates(rows[index], pool, numbers[place], 4)
        query = embed(retriever, rows[index].query, "query").detach()
        scores = {t: float(query @ embed(retriever, t).detach()) for t in texts}
        source = rows[index].documents[0]
        best = [t for t in sorted(texts, key=scores.get, reverse=True) if t != source.full_text]
        assert [d.full_text for d in row.documents] == [source.full_text, *best[:3]] and row.positive == 0
        unlabelled = dream.replace(rows[index], positive=None)
        unlabelled = dream.with_candidates(unlabelled, pool, numbers[place], 4)
        expected = sorted(texts, key=scores.get, reverse=True)[:4]
        assert [d.full_text for d in unlabelled.documents] == expected and unlabelled.positive is None


def test_refreshed_candidates_do_not_hold_the_query_where_the_rows_own_do_not(tmp_path):
    """Rows from text: another row shows the passage that this row's query was taken out of."""
    whole = Document("", "the bell rings at noon and then the fair opens")
    rows = [Row(0, "the bell rings at noon", "the fair opens", [Document("", "the fair opens"), whole], 0)]
    rows.append(Row(1, "what rings?", "the bell", [whole, Document("", "a dog")], 0))
    for row, expected in ((replace(rows[0], documents=rows[0].documents[:1]), 1), (rows[0], 2)):
        pool = {0: ("0", whole)}
        found = dream.with_candidates(row, pool, torch.tensor([0, -1]), 4).documents
        assert len(found) == expected and (whole in found) == (expected == 2)


def test_there_must_be_room_for_candidates_that_come_later(tmp_path, capsys):
    """A row of two documents fits; the eight that it may get when candidates are mined anew would not."""
    tiny_checkpoint(tmp_path / "judge")
    rows = write_rows(tmp_path / "rows.jsonl", make_rows([2] * 12))
    command = ["train", "--train", rows, "--judge", tmp_path / "judge", "--out", tmp_path / "run"]
    command += "--judge-context 220 --steps 2 --batch 4 --num-heads 2 --device cpu --max-target 8".split()
    command += ["--retriever", tmp_path / "judge", "--dev", "", "--test"]
    assert dream.main([*map(str, command), "--refresh-candidates", "1"]) == 2
    assert "for its 8 documents; use fewer --candidates" in capsys.readouterr().err
    assert dream.main(list(map(str, command))) == 0


def test_a_process_knows_all_rows_of_a_step(tmp_path):
    """It computes its own, and divides by, and tells of, those of all."""
    retriever = world(tmp_path)[1]
    rows = make_rows([3, 3, 3, 3, 3])
    prepared = dream.prepare_rows(retriever, None, rows, settings(objective="infonce"), (0,), 1, 2)
    assert [row.index for row in prepared.rows] == [rows[1].index, rows[3].index]
    assert prepared.indices == [row.index for row in rows]


def test_candidate_pool_holds_each_text_once(tmp_path):
    rows = make_rows([3, 3])
    rows[1].documents[2] = rows[0].documents[1]
    rows = Rows(write_rows(tmp_path / "rows.jsonl", rows))
    pool = CandidatePool(rows, range(2))
    assert [pool[i][0] for i in range(len(pool))] == list("01234")
    assert {pool[i][1] for i in range(5)} == {d for i in range(2) for d in rows[i].documents}


def test_revela_reads_rows_without_questions(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"documents": ["a b c", "d e f"]}) + "\n")
    assert Rows(path, documents_only=True)[0].documents == [Document("", "a b c"), Document("", "d e f")]
    with pytest.raises(InputError, match="no target"):
        Rows(path)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--objective replug --judge-lora", "replug has no judge that could learn"),
        ("--objective infonce --judge-lora", "infonce has no judge that could learn"),
        ("--objective revela --refresh-candidates 5", "revela has no queries to mine by"),
    ],
)
def test_flags_that_exclude_each_other(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        dream.main(["train", *flags.split()])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_a_run_whose_settings_name_no_objective_of_ours(tmp_path, capsys):
    (tmp_path / "settings.json").write_text(json.dumps({"objective": "magic"}))
    assert dream.main(["train", "--resume", str(tmp_path)]) == 2
    assert "objective is 'magic', not what the flag gives" in capsys.readouterr().err


def test_there_is_a_group_for_every_process(tmp_path):
    """Revela's groups are as many as tokens pay for, and never fewer than processes where rows suffice."""
    retriever = world(tmp_path)[1]
    rows = [replace(row, query="") for row in make_rows([3] * 12)]  # nothing pays for the halves that ask
    paid = len(dream.revela_groups(retriever, rows, 3))
    assert paid < 12, paid
    assert len(dream.revela_groups(retriever, rows, 3, least=12)) == 12


def test_the_judges_bos_is_what_its_tokenizer_puts_there(tmp_path):
    """Whatever config.json calls it."""
    folder = tiny_checkpoint(tmp_path / "judge", bos_token_id=5)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<s>"])
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    args = settings(judge_context=300, max_target=8, judge_template=TEMPLATE)
    for post_processor, first in ((None, []), (template, [257])):
        if post_processor:
            tokenizer.post_processor = post_processor
        tokenizer.save(str(folder / "tokenizer.json"))
        builder = dream.make_builder(args, read_config(folder / "config.json"), folder)
        input_ids = builder.build(make_rows([2]))[0].input_ids
        assert [number for number in input_ids if number == 257] == first == input_ids[: len(first)]
