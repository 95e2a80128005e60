"""The training step against one plain graph, head selection, resume, mining and the command line."""

import argparse
import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import byte_tokenizer, config_file, make_rows, random_lm, tiny_checkpoint

import dream
from attention import Injection
from data import PromptBuilder, collate, shuffled
from formats.embedders import load_embedder
from model import Embedder, add_lora
from support.files import InputError

SETTINGS = argparse.Namespace(
    objective="dream",
    temperature=0.3,
    judge_batch=2,
    retriever_batch=3,
    inject_rows="target",
    document_mass="keep",
    lora_dropout=0.0,
    seed=0,
    detect_rows="target",
    calibrate=True,
)
HEADS = [(0, 1), (0, 4), (1, 0), (1, 2), (2, 3), (2, 5)]  # two in each of three consecutive layers
CPU = torch.device("cpu")


def settings(**changes):
    return argparse.Namespace(**{**vars(SETTINGS), **changes})


def world(tmp_path, dropout=0.0):
    """A judge, a retriever with LoRA whose B is not zero, and rows with 1 to 5 candidates; all in float64."""
    config = config_file(tmp_path)
    judge = random_lm(config, 0, torch.float64)
    decoder = random_lm(config, 1).model
    add_lora(decoder, 4, 8, dropout)
    torch.manual_seed(2)
    for name, parameter in decoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    retriever = Embedder(decoder.double(), byte_tokenizer(), 64).train()
    builder = PromptBuilder(byte_tokenizer(), 1000, max_target=6)
    return judge, retriever, builder, make_rows([3, 5, 2, 4, 3])


def plain_gradients(judge, retriever, builder, rows, args, seed, parameters=None):
    """The slow twin: every text alone, every prompt whole, no cache, no micro-batches, one graph."""
    loss = 0.0
    for row in rows:
        (prompt,) = builder.build([row], [shuffled(len(row.documents), *seed, row.index)])
        q = retriever.embed(retriever.tokenize([row.query], "query"))
        texts = [d.full_text for d in row.documents]
        d = torch.cat([retriever.embed(retriever.tokenize([text], "document")) for text in texts])
        documents = torch.full((1, len(prompt.input_ids)), len(texts))
        for i, (start, end) in enumerate(prompt.spans):
            documents[0, start:end] = i
        first = prompt.target_start - 1 if args.inject_rows == "target" else prompt.question_start
        heads = {la: torch.tensor([h for other, h in HEADS if other == la]) for la in (0, 1, 2)}
        log_weights = (q @ d.T / args.temperature).log_softmax(-1)
        keep = args.document_mass == "keep"
        injection = Injection(log_weights, documents, heads, keep, torch.tensor([first]), first)
        ids = torch.tensor([prompt.input_ids])
        logits = judge.lm_head(judge.model(ids, injection=injection))[0, prompt.target_start - 1 : -1]
        loss += torch.nn.functional.cross_entropy(logits, ids[0, prompt.target_start :]) / len(rows)
    parameters = parameters or list(dream.trainable(retriever).values())
    return loss.detach(), torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("inject_rows", ["target", "suffix"])
@pytest.mark.parametrize("document_mass", ["keep", "full"])
@pytest.mark.parametrize("judge_batch, retriever_batch", [(2, 3), (1, 100), (100, 7)])
def test_step_equals_one_plain_graph(tmp_path, inject_rows, document_mass, judge_batch, retriever_batch):
    judge, retriever, builder, rows = world(tmp_path)
    args = settings(
        inject_rows=inject_rows,
        document_mass=document_mass,
        judge_batch=judge_batch,
        retriever_batch=retriever_batch,
    )
    tensors = dream.head_tensors(HEADS, CPU)

    def objective(scored):
        return dream.dream_objective(scored, judge, tensors, args)

    retriever.decoder.activation_checkpointing = retriever_batch == 7
    prepared = dream.prepare_rows(retriever, builder, rows, args, (0, 5))
    stats = dream.per_row(dream.training_step(retriever, objective, prepared, args, (0, 5)), len(rows))
    loss, expected = plain_gradients(judge, retriever, builder, rows, args, (0, 5))
    torch.testing.assert_close(stats["loss"], loss.to(stats["loss"].dtype))
    assert max(gradient.abs().max() for gradient in expected) > 1e-4
    for (name, parameter), gradient in zip(dream.trainable(retriever).items(), expected, strict=True):
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_dropout_is_replayed_in_the_second_pass(tmp_path):
    """With dropout, two chunks give the gradient of one graph only if the masks are the same both times."""
    judge, retriever, builder, rows = world(tmp_path, dropout=0.3)
    args = settings(lora_dropout=0.3, retriever_batch=4)
    tensors = dream.head_tensors(HEADS, CPU)
    graphs = []
    original = retriever.embed

    def objective(scored):
        return dream.dream_objective(scored, judge, tensors, args)

    def embed(token_ids):
        out = original(token_ids)
        graphs.append((tuple(map(tuple, token_ids)), out.detach()))
        return out

    retriever.embed = embed
    prepared = dream.prepare_rows(retriever, builder, rows, args, (0, 1))
    dream.training_step(retriever, objective, prepared, args, (0, 1))
    first, second = graphs[: len(graphs) // 2], graphs[len(graphs) // 2 :]
    for (ids, out), (again_ids, again) in zip(first, second, strict=True):
        assert ids == again_ids and torch.equal(out, again)


def test_loss_is_invariant_to_candidate_numbering(tmp_path):
    """Weights go with documents, not with places: permuting candidates with their scores changes nothing."""
    judge, _, builder, rows = world(tmp_path)
    row = rows[1]
    permutation = [3, 0, 4, 1, 2]
    other = copy.copy(row)
    other.documents = [row.documents[i] for i in permutation]
    prompt_order = [2, 4, 0, 1, 3]  # the same documents at the same places of the prompt
    batch = collate(builder.build([row], [prompt_order]), CPU)
    moved = collate(builder.build([other], [[permutation.index(i) for i in prompt_order]]), CPU)
    log_weights = torch.randn(1, 5, dtype=torch.float64).log_softmax(-1)
    tensors = dream.head_tensors(HEADS, CPU)
    a = dream.dream_loss(judge, batch, log_weights, tensors)
    b = dream.dream_loss(judge, moved, log_weights[:, permutation], tensors)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_steering_puts_the_whole_weight_on_one_candidate(tmp_path):
    judge, _, builder, rows = world(tmp_path)
    prompts = builder.build(rows)
    losses = dream.steering(judge, prompts, dream.head_tensors(HEADS, CPU), SETTINGS, CPU)
    assert losses.shape == (5, 5)
    for losses_of_row, row in zip(losses, rows, strict=True):
        assert losses_of_row.isfinite().sum() == len(row.documents)
    assert (losses[1].amax() - losses[1].amin()) > 1e-3


def test_document_shares_and_calibration(tmp_path):
    """Without a baseline shares are plain sums; a baseline equal to the attention leaves nothing."""
    judge, _, builder, rows = world(tmp_path)
    judge = judge.float()
    prompts = builder.build(rows)
    attention, batch = dream.attention_on_prefix(judge, prompts, CPU, "target")
    shares = dream.document_shares(attention, batch)
    start, end = prompts[1].spans[3]
    torch.testing.assert_close(shares[1, :, :, 3], attention[1, :, :, start:end].sum(-1))
    assert (shares.sum(-1) < 1).all()
    assert dream.document_shares(attention, batch, attention).abs().max() == 0
    spiked = attention.clone()
    spiked[1, 0, 0, start] = -5.0  # far below its document's mean: dropped, not summed
    dropped = dream.document_shares(spiked, batch, torch.zeros_like(attention))
    expected = attention[1, 0, 0, start + 1 : end].sum()
    torch.testing.assert_close(dropped[1, 0, 0, 3], expected)


def test_choose_heads():
    scores = torch.tensor([[0.1, 0.9], [0.5, 0.3]])
    assert dream.choose_heads(scores, "top", 2, 0) == [(0, 1), (1, 0)]
    assert dream.choose_heads(scores, "worst", 1, 0) == [(0, 0)]
    assert len(dream.choose_heads(scores, "all", 1, 0)) == 4
    draws = {tuple(dream.choose_heads(scores, "random", 2, seed)) for seed in range(20)}
    assert len(draws) > 3 and dream.choose_heads(scores, "random", 2, 7) == dream.choose_heads(
        scores, "random", 2, 7
    )


def write_rows(path, rows, **extra):
    lines = [
        {
            "query": r.query,
            "target": r.target,
            "documents": [{"title": d.title, "text": d.text} for d in r.documents],
            "positive": r.positive,
            **extra,
        }
        for r in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def beir_folder(folder, num_documents=12):
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{i}", "title": "", "text": f"text {i} " + "ab " * i} for i in range(num_documents)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(d) + "\n" for d in corpus))
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "text 3"}\n')
    for split in ("dev", "test"):
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\nq\td3\t1\n")
    return folder


@pytest.fixture
def tiny_run(tmp_path):
    """The flags of a small training."""
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    rows = write_rows(tmp_path / "rows.jsonl", make_rows([3, 2, 4] * 8))
    beir = beir_folder(tmp_path / "beir")
    flags = f"train --train {rows} --judge {checkpoint} --retriever {checkpoint} --dev {beir} --test {beir}"
    flags += " --steps 6 --batch 4 --eval-every 2 --lr 1e-2 --num-heads 2 --lora-dropout 0.1"
    return [*flags.split(), "--out"]


@pytest.mark.parametrize("full", ["--full", "--no-full"])
def test_resumed_run_equals_an_uninterrupted_one(tiny_run, tmp_path, monkeypatch, full):
    """Stopped after step 4 of 6 and resumed: the same weights, optimizer and metrics, bit for bit."""
    tiny_run = [*tiny_run[:-1], full, "--out"]
    assert dream.main([*tiny_run, str(tmp_path / "whole")]) == 0
    save = dream.save_checkpoint

    def stop_after_step_4(out, step, *rest):
        save(out, step, *rest)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(dream, "save_checkpoint", stop_after_step_4)
    assert dream.main([*tiny_run, str(tmp_path / "parts")]) == 130
    monkeypatch.undo()
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 9}\n{"step": 6, "lo')  # after the checkpoint, lost with the process
    assert dream.main(["train", "--resume", str(tmp_path / "parts")]) == 0
    weights = "model.safetensors" if full == "--full" else "adapter_model.safetensors"
    for name in (weights, "optimizer.safetensors", "trainer.json"):
        whole, parts = ((tmp_path / run / "step-000006" / name).read_bytes() for run in ("whole", "parts"))
        assert whole == parts, name

    def metrics(run):
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]

    assert metrics("whole") == metrics("parts")
    assert [m["step"] for m in metrics("whole") if "loss" in m] == [1, 2, 3, 4, 5, 6]


def test_rows_that_choose_the_heads_are_never_trained_on(tiny_run, tmp_path, monkeypatch):
    """Several epochs use every other row, and no row that was set aside."""
    chosen, trained = set(), set()
    select, step = dream.select_heads, dream.training_step

    def selecting(judge, builder, rows, *rest):
        chosen.update(row.index for row in rows)
        return select(judge, builder, rows, *rest)

    def stepping(retriever, objective, prepared, *rest):
        trained.update(row.index for row in prepared.rows)
        return step(retriever, objective, prepared, *rest)

    monkeypatch.setattr(dream, "select_heads", selecting)
    monkeypatch.setattr(dream, "training_step", stepping)
    assert dream.main([*tiny_run, str(tmp_path / "run"), "--batch", "8"]) == 0
    assert len(chosen) == 2 and not chosen & trained and len(chosen | trained) == 24


def test_run_folder_is_loadable_and_not_overwritten(tiny_run, tmp_path, capsys):
    out = tmp_path / "run"
    assert dream.main([*tiny_run, str(out)]) == 0
    embedder = load_embedder(out, CPU, torch.float32)
    vectors = embedder.embed(embedder.tokenize(["a text"], "query"))
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(1))
    capsys.readouterr()
    assert dream.main([*tiny_run, str(out)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (
        dream.main([*tiny_run, str(out), "--overwrite", "--steps", "3", "--heads", str(out / "heads.json")])
        == 0
    )
    names = json.loads((out / "checkpoints.json").read_text())
    assert names["last"] == "step-000003" and not (out / "step-000006").exists()


@pytest.mark.parametrize("full", ["--full", "--no-full"])
def test_training_in_bfloat16(tiny_run, tmp_path, full):
    """Half precision computes; what the optimizer sees, and what is saved, stays float32."""
    out = tmp_path / "run"
    assert dream.main([*tiny_run, str(out), full, "--dtype", "bfloat16", "--inject-rows", "suffix"]) == 0
    last = out / json.loads((out / "checkpoints.json").read_text())["last"]
    for name in ("model.safetensors", "adapter_model.safetensors", "optimizer.safetensors"):
        if (last / name).exists():
            assert {tensor.dtype for tensor in load_file(last / name).values()} == {torch.float32}
    losses = [json.loads(line).get("loss", 1.0) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < loss < 50 for loss in losses)


def test_heads_without_labels_are_ranked_by_gradient(tiny_run, tmp_path, capsys):
    rows = make_rows([3, 2] * 6)
    for row in rows:
        row.positive = None
    path = write_rows(tmp_path / "unlabelled.jsonl", rows)
    judge = tiny_run[tiny_run.index("--judge") + 1]
    out = tmp_path / "heads.json"
    assert (
        dream.main(["heads", "--train", str(path), "--judge", judge, "--out", str(out), "--num-heads", "3"])
        == 0
    )
    saved = json.loads(out.read_text())
    assert saved["labels"] == {"label": 0, "answer": 0, "none": 12}
    assert "ranked by the gradient" in capsys.readouterr().out
    assert len(saved["selected"]) == 3 and min(min(row) for row in saved["scores"]) > 0
    run = tmp_path / "run"  # a judge that learns is asked as it was before
    assert dream.main([*tiny_run, str(run), "--train", str(path), "--judge-lora"]) == 0
    saved = json.loads((run / "heads.json").read_text())
    assert saved["labels"]["none"] and min(min(row) for row in saved["scores"]) > 0


def test_mine(tmp_path, capsys):
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    beir = beir_folder(tmp_path / "beir")
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        '{"query": "text 3", "answers": ["3", "three"], "passage_id": "d3", "source": "a"}\n'
        '{"text": "text ab", "answer": "nowhere", "source": "b"}\n'
    )
    for by in ("bm25", str(checkpoint)):
        out = tmp_path / "rows.jsonl"
        flags = ["mine", "--corpus", str(beir), "--questions", str(questions), "--out", str(out), "--by", by]
        assert dream.main([*flags, "--candidates", "4", "--judge", str(checkpoint)]) == 0
        first, second = map(json.loads, out.read_text().splitlines())
        assert first["target"] == "3" and first["positive"] == 0 and len(first["documents"]) == 4
        assert first["documents"][0]["text"].startswith("text 3 ")
        assert "positive" not in second and second["target"] == "nowhere"
        table = capsys.readouterr().out.splitlines()
        assert any(line.split()[:3] == ["a", "1", "100.0%"] for line in table)
        assert any(line.split()[:3] == ["b", "1", "0.0%"] for line in table)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["train", "--lerning-rate", "1"], "unrecognized arguments: --lerning-rate"),
        (["train", "--steps", "0"], "0 is not at least 1"),
        (
            ["train", "--train", "nowhere.jsonl", "--judge", "x", "--retriever", "x", "--out", "o"],
            "no such file",
        ),
        (["train", "--train", "rows.jsonl"], "--judge is missing"),
        (["heads", "--judge", "nowhere"], "nowhere: no such folder"),
        (["train", "--resume", "nowhere"], "nowhere/settings.json: no such file"),
        (["mine", "--corpus", "c"], "--out"),
    ],
)
def test_bad_flags_get_one_line_and_exit_code_2(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = dream.main(flags)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and "Traceback" not in error


def test_a_judge_whose_context_is_too_short(tiny_run, tmp_path, capsys):
    assert dream.main([*tiny_run, str(tmp_path / "run"), "--judge-context", "60"]) == 2
    assert "the judge's context of 60 tokens" in capsys.readouterr().err


def test_too_many_heads_is_an_input_error(tmp_path):
    judge, _, builder, rows = world(tmp_path)
    with pytest.raises(InputError, match="the judge has 24 heads"):
        dream.select_heads(judge, builder, rows, settings(num_heads=25), CPU)
