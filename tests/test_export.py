"""tools/export.py: every format embeds as its run, the card tells what is known, errors leave nothing."""

import json
import re
import shlex

import pytest
import torch
from safetensors import safe_open
from tiny import byte_tokenizer, tiny_checkpoint

from formats.checkpoints import Checkpoint
from formats.embedders import load_embedder, save_embedder
from model import Embedder, add_lora, lora_layers
from support.launch import CPU
from tools.export import main, public_name

TEXTS = ["a", "some longer text", "東京 🙂", "x" * 90, ""]
PROMPTS = {"query": "find: ", "document": "text | "}
OPTIONS = {"prompts": PROMPTS, "append_eos": True}


def save_step(folder, base, seed, full, **options):
    """One checkpoint, as dream.py writes it: LoRA on `base`, or all of its weights changed."""
    decoder = Checkpoint(base, CPU, torch.float32).decoder()
    torch.manual_seed(seed)
    if not full:
        add_lora(decoder, 4, 8.0, targets=["q_proj", "v_proj", "down_proj"])
    changed = [layer.lora_B.weight for layer in lora_layers(decoder).values()] or list(decoder.parameters())
    for parameter in changed:
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape)
    embedder = Embedder(decoder, byte_tokenizer(), 64, **options).eval()
    save_embedder(embedder, folder, str(base.resolve()))


def make_run(tmp_path, full=False, options=OPTIONS, **config):
    """A run's folder with the two checkpoints and the files that dream.py leaves there."""
    base = tiny_checkpoint(tmp_path / "somebody" / "base-model", **config)
    run = tmp_path / "somebody" / "run"
    save_step(run / "step-000100", base, 1, full, **options)
    save_step(run / "step-000200", base, 2, full, **options)
    settings = {
        "command": "train",
        "train": str(tmp_path / "somebody" / "rows.jsonl.gz"),
        "rows": 12345,
        "judge": "Qwen/Qwen2.5-1.5B",
        "retriever": str(base),
        "out": str(run),
        "full": full,
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "lora_targets": ["q_proj", "v_proj", "down_proj"],
        "candidates": 7,
        "temperature": 0.03,
        "document_mass": "keep",
        "inject_rows": "target",
        "steps": 200,
        "lr": 0.00025,
        "query_prompt": PROMPTS["query"],
        "document_prompt": PROMPTS["document"],
        "append_eos": True,
        "heads": str(tmp_path / "heads.json"),
        "seed": 5,
    }
    scores = {"bm25": 0.61111, "before": 0.12344, "after": 0.73456}
    results = {
        kind: [{"dataset": "nfcorpus", "split": "test", "queries": 1323, "metrics": {"ndcg@10": score}}]
        for kind, score in scores.items()
    }
    files = {
        "checkpoints": {"last": "step-000200", "best": "step-000100"},
        "settings": settings,
        "heads": {"judge": settings["judge"], "selected": [[2, 5], [0, 3], [2, 1]]},
        "results": results,
    }
    for name, content in files.items():
        (run / f"{name}.json").write_text(json.dumps(content))
    return run


def embeddings(folder):
    embedder = load_embedder(folder, CPU, torch.float32)
    with torch.no_grad():
        return torch.cat([embedder.embed(embedder.tokenize(TEXTS, kind)) for kind in PROMPTS]), embedder


def dtypes(path):
    with safe_open(path, framework="pt") as file:
        return {file.get_tensor(name).dtype for name in file.keys()}


@pytest.mark.parametrize("kind", ["merged", "adapter", "sentence-transformers", "full"])
@pytest.mark.parametrize("options", [OPTIONS, {}])
def test_an_export_embeds_as_the_run(tmp_path, kind, options):
    run = make_run(tmp_path, kind == "full", options)
    to, kind = tmp_path / "exports" / "mine", "merged" if kind == "full" else kind
    assert main([str(run), "--to", str(to), "--format", kind]) == 0
    expected, source = embeddings(run)
    actual, exported = embeddings(to)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    last, _ = embeddings(run / "step-000200")
    assert (last - expected).abs().max() > 1e-2  # so that the best checkpoint is what was compared
    assert exported.describe() == source.describe()
    assert exported.describe()["append_eos"] == bool(options)
    assert (to / "adapter_model.safetensors").exists() == (kind == "adapter")
    assert (to / "model.safetensors").exists() == (kind != "adapter")
    assert (to / "modules.json").exists()  # whatever the format: without it, others pool by the mean
    assert [path.name for path in to.parent.iterdir()] == ["mine"]


def test_a_hub_base_is_named_in_full(tmp_path, monkeypatch, capsys):
    """A base on the hub, with a revision: stays in the adapter's config, stands in the front matter."""
    run = make_run(tmp_path)
    path = run / "step-000100" / "adapter_config.json"
    changes = {"base_model_name_or_path": "owner/base", "revision": "v1.5"}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    asked = []

    def fetched(name, *_):
        asked.append(name)
        return tmp_path / "somebody" / "base-model"

    monkeypatch.setattr("support.hub.fetch_repository", fetched)
    assert main([str(run), "--to", str(tmp_path / "mine"), "--format", "adapter"]) == 0
    assert set(asked) == {"owner/base@v1.5"}
    saved = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("owner/base", "v1.5")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "\nbase_model: owner/base\n" in card.split("---")[1]
    assert "note:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "stated, asked, written",
    [
        (None, "auto", torch.float32),
        ("bfloat16", "auto", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
        ("float32", "bfloat16", torch.bfloat16),
        ("float32", "float16", torch.float16),
    ],
)
def test_dtype(tmp_path, capsys, stated, asked, written):
    run = make_run(tmp_path)
    path = tmp_path / "somebody" / "base-model" / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("dtype", "torch_dtype")}
    path.write_text(json.dumps(config | ({"torch_dtype": stated} if stated else {})))
    to = tmp_path / "mine"
    assert main([str(run), "--to", str(to), "--format", "merged", "--dtype", asked]) == 0
    assert dtypes(to / "model.safetensors") == {written}
    name = str(written).removeprefix("torch.")
    config = json.loads((to / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == name  # transformers 5 and 4
    assert f"merged, {name}, " in capsys.readouterr().out
    assert torch.cosine_similarity(embeddings(to)[0], embeddings(run)[0]).min() > 0.999


@pytest.mark.parametrize("dtype, written", [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_an_adapters_type(tmp_path, capsys, dtype, written):
    run, to = make_run(tmp_path), tmp_path / "mine"
    main([str(run), "--to", str(to), "--format", "adapter", "--dtype", dtype])
    assert dtypes(to / "adapter_model.safetensors") == {written}
    assert f"adapter, {str(written).removeprefix('torch.')}, " in capsys.readouterr().out
    assert torch.cosine_similarity(embeddings(to)[0], embeddings(run)[0]).min() > 0.999


def test_another_name_for_the_base(tmp_path, capsys):
    """Trained from a local folder, published with the hub's name: in the adapter's files and in the card."""
    run, to = make_run(tmp_path), tmp_path / "mine"
    assert main([str(run), "--to", str(to), "--format", "adapter", "--base", "owner/base"]) == 0
    assert json.loads((to / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/base"
    assert "\nbase_model: owner/base\n" in (to / "README.md").read_text().split("---")[1]
    assert "note:" not in capsys.readouterr().out


def card_of(tmp_path, run, kind="merged", *flags):
    to = tmp_path / f"card-{kind}"
    assert main([str(run), "--to", str(to), "--format", kind, *flags]) == 0
    return (to / "README.md").read_text()


@pytest.mark.parametrize("kind", ["merged", "adapter", "sentence-transformers"])
def test_the_card(tmp_path, kind):
    card = card_of(tmp_path, make_run(tmp_path), kind, "--name", "owner/name")
    _, front, text = card.split("---\n", 2)
    assert (
        f"library_name: {'transformers' if kind == 'merged' else kind.replace('adapter', 'peft')}\n" in front
    )
    assert "base_model" not in front and "license" not in front  # the base is known by a local path only
    for line in ("# owner/name", "* Base checkpoint: `base-model`", "* Judge: `Qwen/Qwen2.5-1.5B`"):
        assert f"\n{line}\n" in text
    for line in (
        "* Training data: `rows.jsonl.gz`",
        "* Training rows: `12,345`",
        "* Checkpoint: `step-000100`",
        "* Weights: `float32`",
    ):
        assert f"\n{line}\n" in text
    cells = dict(re.findall(r"^\| `(\w+)` +\| (.*?) +\|$", text, re.MULTILINE))
    assert cells["temperature"] == "0.03" and cells["candidates"] == "7" and cells["lr"] == "0.00025"
    assert cells["document_mass"] == "keep"
    assert cells["lora_rank"] == "4" and cells["lora_targets"] == "q_proj, v_proj, down_proj"
    assert (
        cells["document_prompt"] == '"text \\| "' and cells["append_eos"] == "yes" and cells["full"] == "no"
    )
    assert "retriever" not in cells and "heads" not in cells
    assert "3 attention heads of the judge, layer.head from 0: 0.3, 2.1, 2.5." in text
    assert re.search(r"\| nfcorpus +\| test +\| +1,323 \| 0.6111 \| 0.1234 \| 0.7346 \|", text)
    assert '* Before a query: `"find: "`' in text and "EOS follows every text" in text
    assert ("SentenceTransformer(" in text) == (kind != "merged")
    assert ("PeftModel." in text) == (kind == "adapter")
    widths = [len(line) for line in text.splitlines() if line.startswith("| `")]
    assert len(widths) > 10 and len(set(widths)) == 1
    for word in ("NAME", "LENGTH", "QUERY", "DOCUMENT", "LOAD"):
        assert not re.search(rf"\b{word}\b", text)


@pytest.mark.parametrize("kind", ["merged", "adapter", "sentence-transformers"])
def test_no_local_paths(tmp_path, kind):
    """In no file but the adapter's config, which is loaded by that path."""
    run = make_run(tmp_path, _name_or_path=str(tmp_path / "somebody" / "elsewhere"))
    card_of(tmp_path, run, kind)
    files = [path for path in (tmp_path / f"card-{kind}").rglob("*") if path.is_file()]
    assert len(files) > 5
    leaking = {path.name for path in files if b"somebody" in path.read_bytes()}
    assert leaking == ({"adapter_config.json"} if kind == "adapter" else set())


@pytest.mark.parametrize(
    "name, public",
    [
        ("Qwen/Qwen2.5-0.5B@v1", "Qwen/Qwen2.5-0.5B@v1"),
        ("hub/models--Qwen--Qwen2.5-0.5B/snapshots/0a1b2c", "Qwen/Qwen2.5-0.5B"),
        ("some/models/base/", "base"),
        ("../base", "base"),
        ("here/base", "base"),
        ("here/rows.jsonl", "rows.jsonl"),
    ],
)
def test_public_name(tmp_path, monkeypatch, name, public):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "base").mkdir(parents=True)
    (tmp_path / "here" / "rows.jsonl").touch()
    assert public_name(name) == public


def test_results_are_those_of_the_best_checkpoint(tmp_path):
    run = make_run(tmp_path)
    best, last = (card_of(tmp_path / name, run / name) for name in ("step-000100", "step-000200"))
    assert "## Results" in best and "0.7346" in best
    assert "## Results" not in last and "## Training" in last and "`step-000200`" in last


@pytest.mark.parametrize(
    "objective, learns, told",
    [
        (
            "dream",
            False,
            "trained with DREAM .* without labels, through the attention .* of a frozen language",
        ),
        ("dream", True, "without labels, .* a language model, the judge, whose adapters learnt too"),
        ("infonce", False, "InfoNCE .* by labels, .* without a judge"),
        ("replug", False, "REPLUG-LSR .* without labels, .* likely to a frozen language model, the judge"),
        ("revela", False, "Revela .* without labels, .* a language model, the judge, whose adapters learnt"),
    ],
)
def test_the_card_tells_its_objective(tmp_path, objective, learns, told):
    run = make_run(tmp_path)
    settings = json.loads((run / "settings.json").read_text())
    settings |= {"objective": objective, "judge_lora": learns, "kl": "reverse"}
    (run / "settings.json").write_text(json.dumps(settings))
    card = card_of(tmp_path, run)
    assert re.search(told, card.replace("\n", " "))
    names = re.findall(r"^\| `(\w+)`", card, re.MULTILINE)
    assert names[0] == "objective" and ("kl" in names) == (objective == "replug")
    for part in ("- dream\n", "Injected: ", "`inject_rows`", "arxiv.org/abs/2606"):
        assert (part in card) == (objective == "dream"), part
    assert ("* Judge: `" in card) == (objective != "infonce")


def test_what_is_unknown_is_left_out(tmp_path):
    """A full run tells no LoRA settings, an unfinished one no results, an adapter alone nothing at all."""
    run = make_run(tmp_path, full=True)
    (run / "results.json").write_text(json.dumps({"bm25": [], "before": [], "after": []}))
    card = card_of(tmp_path / "one", run)
    assert "lora" not in card and "## Results" not in card and "| `full` " in card
    (make_run(tmp_path / "other") / "step-000100").rename(tmp_path / "alone")
    card = card_of(tmp_path / "two", tmp_path / "alone")
    for absent in (
        "Judge",
        "Training data",
        "Checkpoint:",
        "## Training",
        "## Results",
        "- dream\n",
        "heads",
    ):
        assert absent not in card
    assert "`base-model`" in card and "## Embeddings" in card and "## Licence" in card


def refused(capsys, *argv):
    assert main([str(part) for part in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("export: error: ") and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    "name, change",
    [
        ("heads", {"selected": 5}),
        ("heads", {"selected": [[1, 2, 3]]}),
        ("settings", {"objective": "other"}),
        ("settings", {"rows": "many"}),
        ("settings", {"judge": 5}),
        ("results", {"after": [5]}),
    ],
)
def test_files_of_another_shape_are_one_line(tmp_path, capsys, name, change):
    run = make_run(tmp_path)
    path = run / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    error = refused(capsys, run, "--to", tmp_path / "mine", "--format", "merged")
    assert f"{path}: not as `train` writes it" in error and not (tmp_path / "mine").exists()


def test_ctrl_c(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tools.export.load_embedder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([str(make_run(tmp_path)), "--to", str(tmp_path / "mine"), "--format", "merged"]) == 130
    assert capsys.readouterr().err == "export: interrupted\n" and not (tmp_path / "mine").exists()


def test_before_the_demo_was_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    error = refused(capsys, "runs/demo", "--to", "mine", "--format", "merged")
    assert "runs/demo does not exist: train it (`python dream.py train`)" in error


def test_commands_can_be_copied(tmp_path, capsys):
    to = tmp_path / "my model"
    assert main([str(make_run(tmp_path)), "--to", str(to), "--format", "merged"]) == 0
    assert shlex.split(capsys.readouterr().out.splitlines()[-1])[4] == str(to)
    assert "$ python eval.py --model 'my model' --dataset" in (to / "README.md").read_text()


def test_a_folder_in_use_is_refused(tmp_path, capsys):
    run, to = make_run(tmp_path), tmp_path / "mine"
    to.mkdir()
    (to / "notes.txt").write_text("mine")
    assert "not empty" in refused(capsys, run, "--to", to, "--format", "merged")
    assert "no checkpoint" in refused(capsys, run, "--to", to, "--format", "merged", "--overwrite")
    assert (to / "notes.txt").read_text() == "mine"
    (to / "notes.txt").unlink()
    for flags in ([], ["--overwrite"]):
        assert main([str(run), "--to", str(to), "--format", "merged", *flags]) == 0
        (to / "left over").touch()
    assert main([str(run), "--to", str(to), "--format", "adapter", "--overwrite"]) == 0
    assert not (to / "left over").exists() and not (to / "model.safetensors").exists()


@pytest.mark.parametrize("victim", ["run/step-000100", "base-model"])
def test_its_own_source_is_never_overwritten(tmp_path, capsys, victim):
    run = make_run(tmp_path)
    to = tmp_path / "somebody" / victim
    before = sorted(path.name for path in to.iterdir())
    assert "or its base" in refused(capsys, run, "--to", to, "--format", "merged", "--overwrite")
    assert sorted(path.name for path in to.iterdir()) == before


def test_a_full_run_has_no_adapter(tmp_path, capsys):
    run = make_run(tmp_path, full=True)
    assert "no adapter" in refused(capsys, run, "--to", tmp_path / "mine", "--format", "adapter")
    assert not (tmp_path / "mine").exists()


def test_a_failed_export_leaves_nothing(tmp_path, capsys, monkeypatch):
    """No weights, no base, no room: one line, and neither the folder nor a part of it."""
    from tools import export

    run, to = make_run(tmp_path), tmp_path / "exports" / "mine"
    assert "no such folder" in refused(capsys, tmp_path / "nowhere", "--to", to, "--format", "merged")

    def full_disk(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_atomic", full_disk)
    assert "No space left" in refused(capsys, run, "--to", to, "--format", "merged")
    monkeypatch.undo()
    (tmp_path / "somebody" / "base-model").rename(tmp_path / "gone")
    assert "base-model" in refused(capsys, run, "--to", to, "--format", "merged")
    (run / "step-000100" / "adapter_model.safetensors").unlink()
    assert refused(capsys, run, "--to", to, "--format", "merged")
    assert not to.parent.exists() or list(to.parent.iterdir()) == []


def test_the_end_names_the_next_command(tmp_path, capsys):
    import eval as yardstick

    to = tmp_path / "mine"
    assert main([str(make_run(tmp_path)), "--to", str(to), "--format", "adapter"]) == 0
    written, note, following = capsys.readouterr().out.splitlines()
    size = sum(path.stat().st_size for path in to.rglob("*") if path.is_file()) / 1e6
    assert written == f"written: {to}  adapter, float32, {size:.1f} MB"
    assert note.startswith("note: ") and following.startswith("next: python eval.py ")
    assert yardstick.parse_arguments(following.split()[3:]).model == [str(to)]
