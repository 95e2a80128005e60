"""Names of the Hugging Face hub, against a server on the loopback that speaks its protocol."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from loopback import Loopback, commit
from tiny import byte_tokenizer, tiny_checkpoint

import dream
import eval as yardstick
from formats.checkpoints import Checkpoint
from formats.embedders import load_embedder, save_embedder
from model import Embedder, add_lora, lora_layers
from support.files import InputError
from support.hub import find_folder
from support.launch import CPU

TEXTS = ["a", "some longer text"]


def embeddings(name, **options):
    embedder = load_embedder(name, CPU, torch.float32, **options)
    return embedder.embed(embedder.tokenize(TEXTS, "query"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one small model, own/base, and this process set to use it."""
    from huggingface_hub import constants

    base = tiny_checkpoint(tmp_path / "repos" / "base")
    for unwanted in ("pytorch_model.bin", "original/params.json", "model.fp16.safetensors", "README.md"):
        (base / unwanted).parent.mkdir(exist_ok=True)
        (base / unwanted).write_text("never fetched")
    with Loopback(repos={"own/base": base}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"  # as HF_ENDPOINT sets it at import
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def test_a_name_fetches_what_is_needed_once_and_gives_the_same_model(hub, tmp_path):
    folder = find_folder("own/base")
    assert folder.name == commit(tmp_path / "repos" / "base")
    fetched = {path.rsplit("/", 1)[-1] for method, path, _ in hub.requests if "/resolve/" in path}
    assert fetched == {"config.json", "tokenizer.json", "model.safetensors"}
    assert torch.equal(embeddings("own/base"), embeddings(tmp_path / "repos" / "base"))
    hub.requests.clear()
    find_folder("own/base")
    assert not [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]


def test_a_report_in_tokens_fetches_no_weights(hub):
    find_folder("own/base", weights=False)
    assert not [path for _, path, _ in hub.requests if path.endswith(".safetensors")]


def test_a_revision_is_another_checkpoint(hub, tmp_path):
    other = tiny_checkpoint(tmp_path / "repos" / "other", seed=1)
    hub.revisions["own/base", "v2"] = other
    assert torch.equal(embeddings("own/base@v2"), embeddings(other))
    assert not torch.equal(embeddings("own/base@v2"), embeddings("own/base"))
    assert torch.equal(embeddings(f"own/base@{commit(other)}"), embeddings(other))


@pytest.mark.parametrize("revision", [None, "v2"])
def test_an_adapter_that_names_its_base_by_its_hub_name(hub, tmp_path, revision):
    """As the published DREAM models are: CausalLM-form names, no settings of ours, tokenizer beside it."""
    base = tmp_path / "repos" / "base"
    if revision:
        base = hub.revisions["own/base", revision] = tiny_checkpoint(tmp_path / "repos" / "other", seed=1)
    decoder = Checkpoint(base, CPU, torch.float32).decoder()
    add_lora(decoder, 4, 8)
    for layer in lora_layers(decoder).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    embedder = Embedder(decoder, byte_tokenizer(), 512).eval()
    adapter = tmp_path / "repos" / "adapter"
    save_embedder(embedder, adapter, f"own/base@{revision}" if revision else "own/base")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("own/base", revision)
    hub.repos["own/adapter"] = adapter
    expected = embedder.embed(embedder.tokenize(TEXTS, "query"))
    assert torch.equal(embeddings("own/adapter"), expected)


def test_training_from_hub_names(hub, tmp_path, monkeypatch):
    """Judge and retriever by one name share their weights; the run names its base by it, and loads again."""
    rows = tmp_path / "rows.jsonl"
    row = {"query": "q", "target": "t", "documents": ["a text", "another"], "positive": 0}
    rows.write_text("".join(json.dumps({**row, "query": f"q {i}"}) + "\n" for i in range(20)))
    names = ["--judge", "own/base@main", "--retriever", "own/base@main"]
    flags = ["--steps", "2", "--batch", "2", "--num-heads", "2", "--lora-rank", "2", "--device", "cpu"]
    out = tmp_path / "run"
    assert dream.main(["train", "--train", str(rows), *names, "--out", str(out), *flags]) == 0
    config = json.loads((out / "step-000002" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("own/base", "main")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert embeddings(out).isfinite().all()


def test_what_cannot_be_fetched_is_told_in_one_line(hub, tmp_path, monkeypatch):
    hub.repos["own/gated"] = tmp_path / "repos" / "base"
    hub.gated.add("own/gated")
    hub.repos["own/pickle"] = tmp_path / "repos" / "pickle"
    (tmp_path / "repos" / "pickle").mkdir()
    for file in ("config.json", "pytorch_model.bin"):
        (tmp_path / "repos" / "pickle" / file).write_text("{}")

    def refusal(name):
        with pytest.raises(InputError) as error:
            find_folder(name)
        assert "\n" not in str(error.value) and name in str(error.value)
        return str(error.value)

    assert "accept its terms" in refusal("own/gated") and "HF_TOKEN" in refusal("own/gated")
    monkeypatch.setenv("HF_TOKEN", "good-token")
    assert find_folder("own/gated").is_dir()
    written = [file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert written and not [content for content in written if b"good-token" in content]
    monkeypatch.delenv("HF_TOKEN")
    missing = refusal("own/missing")
    assert "no such folder here" in missing and "is not there, or private" in missing
    assert "has no revision 'v9'" in refusal("own/base@v9")
    assert "pickled weights are not read" in refusal("own/pickle")
    assert "owner/name" in refusal("just-a-name") and "owner/name" in refusal("/no/such/folder")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal("own/base")


def test_a_download_that_broke_off(hub, tmp_path, monkeypatch):
    hub.cut_after, hub.cuts = 1000, 1  # once: the hub's library goes on by itself
    whole = find_folder("own/base")
    target = (whole / "model.safetensors").resolve()
    content = target.read_bytes()

    target.write_bytes(content[:-100])  # a file that is there in part is told by its real path
    with pytest.raises(InputError, match="not a whole safetensors file.*delete it, fetch it again") as error:
        embeddings("own/base")
    assert str(target) in str(error.value) and "\n" not in str(error.value)
    target.unlink()
    assert torch.equal(embeddings("own/base"), embeddings(tmp_path / "repos" / "base"))

    (whole / "model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="not, or not wholly, in .*fetch it once while online"):
        find_folder("own/base")


def test_a_hub_that_does_not_answer_is_told_in_one_line(hub, monkeypatch, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(
            "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}"
        )
        assert yardstick.main(["--dataset", "demo", "--model", "own/base"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eval.py: error: own/base: ") and "(no connection); fetch it once" in line


def test_the_commands_take_names_and_the_environment_counts(hub, tmp_path):
    """eval.py in processes of their own: HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE."""
    command = [sys.executable, "eval.py", "--dataset", "demo", "--model", "own/base", "--max-length", "8"]

    def run(**settings):
        own = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment = os.environ | own | settings
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = run()
    assert "NDCG@10" in printed and (tmp_path / "home" / "hub" / "models--own--base").is_dir()
    hub.requests.clear()
    assert run(HF_HUB_OFFLINE="1") == printed and not hub.requests


def test_a_mistyped_folder_gets_the_nearest_name(tmp_path, monkeypatch):
    """Also where it reads like a name on the hub, which then cannot be had."""
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(tmp_path / "models" / "reader")
    for name in ("models/raeder", str(tmp_path / "models" / "readr"), "./models/redaer"):
        monkeypatch.setattr("support.hub.fetch_repository", refuse)
        with pytest.raises(InputError, match=r"did you mean the folder \S*models/reader\?$"):
            find_folder(name)
    with pytest.raises(InputError, match="owner/name@revision$"):
        find_folder(str(tmp_path / "models" / "something-else"))


def refuse(*arguments):
    raise InputError("no connection")
