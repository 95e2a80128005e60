"""The training step against one plain graph, whole runs, resume and the command line."""

import copy
import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_attention import equations
from tiny import HEADS, beir_folder, make_rows, tiny_checkpoint, world, write_rows

import dream
from attention import Injection, head_tensors
from data import collate, shuffled
from formats.embedders import load_embedder
from model import target_loss
from related.qrhead import Reader
from support import launch, runs
from support.launch import CPU

TEMPERATURE = 0.3
SEED = (0, 5)


def dream_objective(judge, builder, **reader):
    objective = dream.Dream(Reader(judge, builder, CPU, **reader))
    objective.heads = head_tensors(HEADS, CPU)
    return objective


def parameters(retriever, judge=None):
    return list(dream.Models(retriever, judge, None).parameters().values())


def step(retriever, objective, rows, retriever_batch=3, judge=None, temperature=TEMPERATURE):
    """One training step: its sums, with the mean loss, and the gradients of all that learns."""
    batch = dream.prepare(retriever, objective, rows, SEED)
    sums = dream.training_step(retriever, objective, batch, temperature, retriever_batch)
    sums["loss"] /= len(batch.indices)
    return sums, [parameter.grad for parameter in parameters(retriever, judge)]


def plain_step(judge, retriever, builder, rows, inject_rows="target", keep_budget=True, in_batch=False):
    """The slow twin: every text alone, every prompt whole, attention by the equations' loop, one graph."""
    loss, effective, weight = 0.0, 0.0, 0.0
    for row in rows:
        (prompt,) = builder.build([row], [shuffled(len(row.documents), *SEED, row.index)])
        query = retriever.embed(retriever.tokenize([row.query], "query"))
        texts = [document.full_text for document in row.documents]
        embedded = torch.cat([retriever.embed(retriever.tokenize([text], "document")) for text in texts])
        weights = (query @ embedded.T / TEMPERATURE).softmax(-1)[0]
        given = weights
        if in_batch:
            others = {d.full_text for other in rows for d in other.documents} - {*texts}
            more = torch.cat([retriever.embed(retriever.tokenize([t], "document")) for t in sorted(others)])
            given = (query @ torch.cat([embedded, more]).T / TEMPERATURE).softmax(-1)[0, : len(texts)]
        first = prompt.target_start - 1 if inject_rows == "target" else prompt.question_start
        change, ids = equations(given, prompt.spans, first, HEADS, keep_budget), prompt.input_ids
        logits = judge.lm_head(judge.model(torch.tensor([ids]), change=change))[
            0, prompt.target_start - 1 : -1
        ]
        loss += F.cross_entropy(logits, torch.tensor(ids[prompt.target_start :])) / len(rows)
        effective += (-(weights * weights.log()).sum()).exp().detach()
        weight += 0 if row.positive is None else weights[row.positive].detach()
    sums = {"loss": loss.detach(), "effective_candidates": effective, "positive_weight": weight}
    return sums, torch.autograd.grad(loss, parameters(retriever, judge))


def assert_equal(found, expected):
    """The sums and the gradients of a step and of its twin."""
    for name, value in expected[0].items():
        own = found[0][name].double()
        torch.testing.assert_close(own, value, rtol=1e-6, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert max(gradient.abs().max() for gradient in expected[1]) > 1e-4
    for own, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("inject_rows", ["target", "suffix"])
@pytest.mark.parametrize("document_mass", ["keep", "full"])
def test_step_equals_one_plain_graph(tmp_path, inject_rows, document_mass):
    """Whatever the batch sizes, and with the activations computed again."""
    judge, retriever, builder, rows = world(tmp_path)
    rows[1].positive, rows[2].positive = 4, None
    keep = document_mass == "keep"
    expected = plain_step(judge, retriever, builder, rows, inject_rows, keep)
    for judge_batch, retriever_batch, again in ((2, 3, False), (1, 100, False), (100, 7, True)):
        retriever.decoder.activation_checkpointing = again
        retriever.zero_grad()
        objective = dream_objective(
            judge, builder, batch=judge_batch, inject_rows=inject_rows, keep_budget=keep
        )
        found = step(retriever, objective, rows, retriever_batch)
        assert_equal(found, expected)
        assert found[0]["labelled"] == 4 and found[0]["tokens"] > found[0]["retriever_tokens"] > 0


@pytest.mark.usefixtures("way")
def test_other_rows_documents_take_weight(tmp_path):
    """With --in-batch-negatives the softmax is over all documents of the step, each text once."""
    judge, retriever, builder, rows = world(tmp_path)
    rows[2].documents[1] = rows[0].documents[2]
    rows[1].positive, rows[2].positive = 4, None
    expected = plain_step(judge, retriever, builder, rows, in_batch=True)
    for judge_batch in (2, 100):
        retriever.zero_grad()
        objective = dream_objective(judge, builder, batch=judge_batch)
        objective.in_batch_negatives = True
        assert_equal(step(retriever, objective, rows), expected)
    alone = plain_step(judge, retriever, builder, rows[:1], in_batch=False)
    retriever.zero_grad()
    assert_equal(step(retriever, objective, rows[:1]), alone)


def test_dropout_is_replayed_in_the_second_pass(tmp_path, monkeypatch):
    """With dropout, two chunks give the gradient of one graph only if the masks are the same both times."""
    judge, retriever, builder, rows = world(tmp_path, dropout=0.3)
    objective = dream_objective(judge, builder, batch=2)
    embedded, embed = [], retriever.embed

    def watched(token_ids):
        out = embed(token_ids)
        embedded.append((token_ids, out.detach()))
        return out

    monkeypatch.setattr(retriever, "embed", watched)
    batch = dream.prepare(retriever, objective, rows, SEED)
    dream.training_step(retriever, objective, batch, TEMPERATURE, 4, SEED)
    assert len(embedded) % 2 == 0 and len(embedded) >= 4
    first, second = embedded[: len(embedded) // 2], embedded[len(embedded) // 2 :]
    for (ids, out), (again_ids, again) in zip(first, second, strict=True):
        # A CPU attends in another way where there is a graph: equal but for rounding.
        assert ids == again_ids and torch.allclose(out, again, rtol=0, atol=1e-5)
        assert not torch.allclose(embed(ids), again, rtol=0, atol=1e-3)  # other masks


def test_loss_is_invariant_to_candidate_numbering(tmp_path):
    """Weights go with documents, not with places: permuting candidates with their scores changes nothing."""
    judge, _, builder, rows = world(tmp_path)
    row, permutation = rows[1], [3, 0, 4, 1, 2]
    other = copy.copy(row)
    other.documents = [row.documents[i] for i in permutation]
    prompt_order = [2, 4, 0, 1, 3]  # the same documents at the same places of the prompt
    log_weights = torch.randn(1, 5, dtype=torch.float64).log_softmax(-1)
    losses = []
    for own, order, weights in (
        (row, prompt_order, log_weights),
        (other, [permutation.index(i) for i in prompt_order], log_weights[:, permutation]),
    ):
        batch = collate(builder.build([own], [order]), CPU)
        injection = Injection(weights, batch.documents, head_tensors(HEADS, CPU))
        losses.append(target_loss(judge, batch, change=injection))
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)


def test_a_process_knows_all_rows_of_a_step(tmp_path):
    """It computes its own, and divides by, and tells of, those of all."""
    judge, retriever, builder, _ = world(tmp_path)
    rows = make_rows([3, 3, 3, 3, 3])
    batch = dream.prepare(retriever, dream_objective(judge, builder), rows, (0,), 1, 2)
    own = [row.index for piece in batch.pieces for row in piece.rows]
    assert sorted(own) == [rows[1].index, rows[3].index]
    assert batch.indices == [row.index for row in rows]


# Whole runs


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The flags of a small training, but for its folder."""
    folder = tmp_path_factory.mktemp("training")
    checkpoint, beir = tiny_checkpoint(folder / "checkpoint"), beir_folder(folder / "beir")
    rows = write_rows(folder / "rows.jsonl", make_rows([3, 2, 4] * 8))
    flags = f"train --train {rows} --judge {checkpoint} --retriever {checkpoint} --dev {beir} --test {beir}"
    flags += " --steps 6 --batch 4 --eval-every 2 --lr 1e-2 --num-heads 2 --lora-dropout 0.1 --device cpu"
    return flags.split()


@pytest.fixture(scope="module", params=["--full", "--no-full"])
def whole(request, command, tmp_path_factory):
    """A finished run of all weights, and one of adapters; its flags, but for its folder."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert dream.main([*command, request.param, "--out", str(out)]) == 0
    return out, [*command, request.param]


def stopped_after_step_4(command, out, monkeypatch):
    """A run that was killed right behind a checkpoint; its metrics tell of steps that it lost."""
    save = runs.save_checkpoint

    def saving(out, step, *rest):
        save(out, step, *rest)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save_checkpoint", saving)
        assert dream.main([*command, "--out", str(out)]) == 130
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 9}\n{"step": 6, "lo')


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def assert_same_run(out, whole):
    """The same weights, optimizer, state and metrics, bit for bit."""
    last = json.loads((whole / "checkpoints.json").read_text())["last"]
    names = {path.name for path in (whole / last).glob("*.safetensors")} | {"trainer.json"}
    assert len(names) == 3
    for name in names:
        assert (out / last / name).read_bytes() == (whole / last / name).read_bytes(), name
    assert metrics(out) == metrics(whole)
    assert [line["step"] for line in metrics(out) if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_effective_candidates_are_exp_of_the_entropy():
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    present = weights > 0
    found = dream.effective_candidates(weights.log(), present)
    torch.testing.assert_close(found, torch.tensor([4.0, 2.0, 1.0]))


def test_resumed_run_equals_an_uninterrupted_one(whole, tmp_path, monkeypatch):
    """Stopped after step 4 of 6 and resumed."""
    stopped_after_step_4(whole[1], tmp_path / "run", monkeypatch)
    assert dream.main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "run", whole[0])


def test_without_dev_the_rows_set_aside_are_scored(command, tmp_path, capsys):
    """Before, at every evaluation and at the end, while the last checkpoint stays the one that is used."""
    run, at = tmp_path / "run", command.index("--dev")
    assert dream.main([*command[:at], *command[at + 2 :], "--out", str(run)]) == 0
    when = ["before training", "step 2", "step 4", "step 6"]
    printed = re.findall(r"^(.*): the relevant document is first .* of 2 rows", capsys.readouterr().out, re.M)
    results = json.loads((run / "results.json").read_text())
    assert printed == list(results["aside"]) == when and results["after"]
    logged = {f"step {line['step']}": line["aside"] for line in metrics(run) if "aside" in line}
    assert logged == {name: results["aside"][name] for name in when[1:]}
    assert json.loads((run / "checkpoints.json").read_text()) == {"last": "step-000006", "best": None}


def test_the_input_is_read_before_the_settings_are_printed_and_only_those_that_count(
    command, tmp_path, capsys
):
    for objective, own, others in (
        ("dream", {"heads=top", "num_heads=2", "judge_batch=4"}, {"kl", "group_size"}),
        ("infonce", {"objective=infonce"}, {"judge", "heads", "num_heads", "judge_template", "kl"}),
        ("replug", {"kl=forward", "judge_batch=4"}, {"heads", "group_size", "inject_rows"}),
    ):
        run = tmp_path / objective
        assert dream.main([*command, "--objective", objective, "--steps", "1", "--out", str(run)]) == 0
        rows, _, rest = capsys.readouterr().out.partition(" left out that have a single candidate\n")
        assert "candidates=8" not in rows
        shown = rest.partition("device=cpu  dtype=float32")[0].split()
        names = {word.partition("=")[0] for word in shown if "=" in word}
        assert own <= {*shown} and not others & names
        assert not names & {
            "resume",
            "seed",
            "weight_decay",
            "query_prompt",
            "in_batch_negatives",
            "rows_fingerprint",
        }
        assert json.loads((run / "settings.json").read_text())["dtype"] == "float32"


def test_a_run_computes_in_the_dtype_that_it_began_with(command, tmp_path, monkeypatch):
    """Chosen by itself, it stays the run's: another machine, or another hour, may choose another."""
    monkeypatch.setattr(launch, "NARROW", 16)
    monkeypatch.setattr(launch, "bfloat16_gain", lambda: 2.0)
    assert dream.main([*command, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["dtype"] == "bfloat16"
    monkeypatch.setattr(launch, "bfloat16_gain", lambda: pytest.fail("is measured again"))
    built, build = [], dream.build_models

    def building(settings, device, dtype, resume):
        built.append(dtype)
        return build(settings, device, dtype, resume)

    monkeypatch.setattr(dream, "build_models", building)
    again = ["--resume", str(tmp_path / "run"), "--steps", "2", "--change-settings"]
    assert dream.main(["train", *again]) == 0
    assert built == [torch.bfloat16]


def test_the_demo_and_the_other_objectives_have_temperatures_of_their_own():
    """The demo's results were made with it; `replug` on the demo's rows keeps what was published."""
    given = {"": 0.05, "dream": 0.05, "infonce": 0.05, "replug": 0.1, "revela": 1e-4}
    for name, temperature in given.items():
        flags = ["train", *(["--objective", name] if name else [])]
        assert dream.parse_arguments(flags).temperature == temperature
        assert dream.parse_arguments([*flags, "--temperature", "0.7"]).temperature == 0.7
        rows = "--train rows.jsonl --judge x --retriever x --out o".split()
        own = 0.1 if name in ("", "dream") else temperature
        assert dream.parse_arguments([*flags, *rows]).temperature == own


OLD = {"command": "train", "refresh_candidates": None, "isolate_documents": True, "resume": None}
OLD |= {"judge_context": None, "judge_lr": None}


def test_a_run_of_an_earlier_version_resumes(whole, tmp_path, monkeypatch, capsys):
    """Its settings hold null where nothing was given, and flags that are gone: what was set is told."""
    run = tmp_path / "run"
    stopped_after_step_4(whole[1], run, monkeypatch)
    settings = json.loads((run / "settings.json").read_text())
    assert not any(settings.get(name) for name in OLD)
    (run / "settings.json").write_text(json.dumps(settings | OLD))
    capsys.readouterr()
    assert dream.main(["train", "--resume", str(run)]) == 0
    told = "settings that mean nothing any more: isolate_documents=True\n"
    assert f"note: {run / 'settings.json'}: {told}" in capsys.readouterr().out
    assert_same_run(run, whole[0])
    assert json.loads((run / "settings.json").read_text()) == settings


def test_rows_that_choose_the_heads_are_never_trained_on(command, tmp_path, monkeypatch):
    """Several epochs use every other row, and no row that was set aside."""
    chosen, trained = set(), set()
    select, one_step = dream.select_heads, dream.training_step

    def selecting(reader, rows, *rest):
        chosen.update(row.index for row in rows)
        return select(reader, rows, *rest)

    def stepping(retriever, objective, batch, *rest):
        trained.update(row.index for piece in batch.pieces for row in piece.rows)
        return one_step(retriever, objective, batch, *rest)

    monkeypatch.setattr(dream, "select_heads", selecting)
    monkeypatch.setattr(dream, "training_step", stepping)
    assert dream.main([*command, "--batch", "8", "--out", str(tmp_path / "run")]) == 0
    assert len(chosen) == 2 and not chosen & trained and len(chosen | trained) == 24


def test_run_folder_is_loadable_and_not_overwritten(whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    embedder = load_embedder(out, CPU, torch.float32)
    vectors = embedder.embed(embedder.tokenize(["a text"], "query"))
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(1))
    capsys.readouterr()
    again = [*whole[1], "--out", str(out)]
    assert dream.main(again) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert dream.main([*again, "--overwrite", "--steps", "3", "--heads", str(out / "heads.json")]) == 0
    names = json.loads((out / "checkpoints.json").read_text())
    assert names["last"] == "step-000003" and not (out / "step-000006").exists()


@pytest.mark.parametrize("full", ["--full", "--no-full"])
def test_training_in_bfloat16(command, tmp_path, full):
    """Half precision computes; what the optimizer sees, and what is saved, stays float32."""
    out = tmp_path / "run"
    half = ["--dtype", "bfloat16", "--inject-rows", "suffix", "--out", str(out)]
    assert dream.main([*command, full, "--steps", "2", *half]) == 0
    files = list((out / "step-000002").glob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}
    losses = [line["loss"] for line in metrics(out) if "loss" in line]
    assert len(losses) == 2 and all(0 < loss < 50 for loss in losses)


# The command line


@pytest.mark.parametrize(
    "flags, message",
    [
        ("train --lerning-rate 1", "unrecognized arguments: --lerning-rate"),
        ("train --steps 0", "0 is not at least 1"),
        ("train --train nowhere.jsonl --judge x --retriever x --out o", "no such file"),
        ("train --train rows.jsonl", "--judge is missing"),
        ("train --train rows.jsonl --judge x --retriever x", "--out is missing"),
        ("train --resume nowhere", "nowhere/settings.json: no such file"),
        ("train --objective replug --judge-lora", "replug has no judge that could learn"),
        ("train --objective infonce --judge-lora", "infonce has no judge that could learn"),
        ("train --objective magic", "invalid choice: 'magic'"),
        ("train --dtype float16 --device cpu", "--dtype: invalid choice: 'float16'"),
        ("mine --corpus c", "mine is now a command of its own: python -m tools.mine"),
        ("heads", "heads is now a command of its own: python -m tools.heads"),
        (
            "train --refresh-candidates 5",
            "--refresh-candidates was removed, as it did harm; mine between two runs",
        ),
        ("train --refresh-candidates=5", "--refresh-candidates was removed"),
        ("train --isolate-documents", "--isolate-documents was removed: no difference was measured"),
    ],
)
def test_bad_flags_get_one_line_and_exit_code_2(flags, message, capsys, tmp_path, monkeypatch):
    """Also the commands and flags of earlier versions."""
    monkeypatch.chdir(tmp_path)
    try:
        code = dream.main(flags.split())
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    usage, line = error.splitlines() if error.startswith("usage: ") else ("", error.rstrip("\n"))
    assert code == 2 and line.startswith("dream.py: error: ") and message in line and "\n" not in line


def test_a_judge_whose_context_is_too_short(command, tmp_path, capsys):
    assert dream.main([*command, "--out", str(tmp_path / "run"), "--judge-context", "60"]) == 2
    assert "the judge's context of 60 tokens" in capsys.readouterr().err


def test_a_run_whose_settings_name_no_objective_of_ours(tmp_path, capsys):
    (tmp_path / "settings.json").write_text(json.dumps({"objective": "magic"}))
    assert dream.main(["train", "--resume", str(tmp_path)]) == 2
    assert "objective is 'magic', not what the flag gives" in capsys.readouterr().err
