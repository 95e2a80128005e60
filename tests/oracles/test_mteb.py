"""mteb reads our result files, runs our checkpoints with our scores, and reads datasets as we do."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from small import SHARED, random_texts, write_beir
from tiny import byte_tokenizer, tiny_checkpoint

import eval as yardstick
from formats.catalogue import BEIR, RTEB, _task_parts
from formats.checkpoints import Checkpoint
from formats.datasets import RetrievalDataset, load_dataset
from formats.embedders import load_embedder, save_embedder
from formats.results import MTEB_DROPS, _languages, average, write_mteb
from model import Embedder, add_lora, lora_layers
from support.launch import CPU

FLOAT32 = {"model_kwargs": {"dtype": torch.float32}}
METRICS = [f"{name}@{k}" for name in ("ndcg", "map", "recall", "precision") for k in (1, 3, 5, 10, 100)]


@pytest.fixture
def mteb(tmp_path, monkeypatch):
    """mteb, offline and with the caches of its libraries in tmp_path; imported late, it takes seconds."""
    library = pytest.importorskip("mteb")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("datasets.config.HF_MODULES_CACHE", tmp_path / "modules")
    return library


def random_dataset(folder, seed: int, count: int = 60):
    """A BEIR folder: graded and zero judgements, a query that has only zeros, queries that are documents."""
    documents = {f"d{i}": text for i, text in enumerate(random_texts(count, seed))}
    queries = {f"q{i}": text for i, text in enumerate(random_texts(12, seed + 1, 6))}
    documents |= {query_id: queries[query_id] for query_id in ("q1", "q2", "q5")}
    qrels = {
        query_id: {f"d{j}": (i + j) % 3 for j in range(i, count, 7)} for i, query_id in enumerate(queries)
    }
    qrels["q3"] = {"d1": 0, "d2": 0}
    qrels["q1"]["q5"] = 2
    return write_beir(folder, documents, queries, qrels)


def read_lines(path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def with_mtebs_names(metrics: dict) -> dict:
    return {name.replace("@", "_at_"): value for name, value in metrics.items()}


def test_mteb_reads_our_result_files(mteb, tmp_path, capsys):
    """eval.py --mteb with two datasets, of which one is in two parts."""
    plain = random_dataset(tmp_path / "plain", 1)
    for seed, part in ((20, "one"), (30, "two")):
        random_dataset(tmp_path / "bundle" / part, seed)
    model = tiny_checkpoint(tmp_path / "some model")
    out, results_file = tmp_path / "out", tmp_path / "results.json"
    command = ["--dataset", str(plain), str(tmp_path / "bundle"), "--model", str(model), "--device", "cpu"]
    assert yardstick.main([*command, "--mteb", str(out), "--json", str(results_file)]) == 0
    printed = capsys.readouterr().out
    ours = {r["dataset"]: r for r in json.loads(results_file.read_text())["results"]}
    tasks = ["plain", "bundle-one", "bundle-two"]
    assert list(ours) == tasks and all(r["identical_ids"] == "kept" for r in ours.values())
    assert len({r["metrics"]["ndcg@10"] for r in ours.values()}) == 3, "scores that cannot be mixed up"

    folder = out / "results" / "local__some_model" / "no_revision_available"
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [*(f"{t}.json" for t in tasks), "model_meta.json"]
    )
    for task in tasks:
        found = mteb.results.TaskResult.from_disk(folder / f"{task}.json")
        assert found.task_name == task and found.mteb_version == "2.26.24"
        assert found.get_score() == ours[task]["metrics"]["ndcg@10"]
        assert f"{found.get_score():.4f}" in printed
        assert found.dataset_revision == ours[task]["fingerprint"]
        (row,) = found.scores["test"]
        expected = with_mtebs_names(ours[task]["metrics"])
        assert {name: row[name] for name in expected} == expected

    found = mteb.ResultCache(cache_path=out).load_results(models=["local/some model"], tasks=tasks)
    (of_model,) = found.model_results
    assert (of_model.model_name, of_model.model_revision) == ("local/some model", "no_revision_available")
    scores = {result.task_name: result.get_score() for result in of_model.task_results}
    assert scores == {task: ours[task]["metrics"]["ndcg@10"] for task in tasks}


def test_mteb_averages_the_subsets_and_splits_of_a_task(mteb, tmp_path):
    """CUREv1 has splits, MIRACL subsets: one file for each task, its score the mean of the parts."""
    embedder = Embedder(
        Checkpoint(tiny_checkpoint(tmp_path / "tiny"), CPU, torch.float32).decoder(), byte_tokenizer()
    )
    datasets, results = [], []
    for number, (task, split, subset) in enumerate(
        [
            ("CUREv1", "all", "en"),
            ("CUREv1", "dermatology", "en"),
            ("MIRACLRetrievalHardNegatives", "dev", "de"),
            ("MIRACLRetrievalHardNegatives", "dev", "en"),
            ("MIRACLRetrievalHardNegatives", "dev", "fr"),
        ]
    ):
        dataset = load_dataset(random_dataset(tmp_path / str(number), 10 * number))
        dataset = replace(dataset, task=task, split=split, subset=subset, revision="r", benchmark=task)
        result = yardstick.evaluate_embedder(embedder, dataset, keep_identical_ids=True)
        datasets.append(dataset)
        results.append(result | {"seconds": 1.5})
    write_mteb(tmp_path / "out", "owner/model", "0123abc", datasets, results)

    cache = mteb.ResultCache(cache_path=tmp_path / "out")
    (of_model,) = cache.load_results(models=["owner/model"]).model_results
    assert (of_model.model_name, of_model.model_revision) == ("owner/model", "0123abc")
    by_task = {result.task_name: result for result in of_model.task_results}
    means = average(results)
    assert set(by_task) == {"CUREv1", "MIRACLRetrievalHardNegatives"}
    for task, found in by_task.items():
        pairs = zip(datasets, results, strict=True)
        parts = [result["metrics"]["ndcg@10"] for dataset, result in pairs if dataset.task == task]
        assert len(set(parts)) == len(parts)
        assert found.get_score() == pytest.approx(sum(parts) / len(parts), abs=1e-12)
        assert found.get_score() == pytest.approx(means[task]["ndcg@10"], abs=5.1e-6)  # ours is rounded
        assert found.evaluation_time == 1.5 * len(parts) and found.dataset_revision == "r"
    assert set(by_task["CUREv1"].scores) == {"all", "dermatology"} and by_task["CUREv1"].hf_subsets == ["en"]
    assert sorted(by_task["MIRACLRetrievalHardNegatives"].hf_subsets) == ["de", "en", "fr"]
    one = by_task["CUREv1"].get_score(splits=["dermatology"])
    assert one == results[1]["metrics"]["ndcg@10"]


def test_names_revisions_and_rules_of_public_tasks_are_mtebs(mteb):
    """Every task that we name is one of mteb's, at the revision and in the parts that it evaluates."""
    names = {task for task, _ in BEIR.values()} - {"CQADupstack"} | set(RTEB)
    tasks = {task.metadata.name: task for task in mteb.get_tasks(tasks=sorted(names))}
    assert set(tasks) == names
    assert {name for name, task in tasks.items() if task.ignore_identical_ids} == MTEB_DROPS
    for name, (repository, revision) in RTEB.items():
        dataset = tasks[name].metadata.dataset
        assert (dataset["path"], dataset["revision"]) == (repository, revision)
        splits = {split for split, *_ in _task_parts(name, None)}
        assert splits == set(tasks[name].eval_splits), name
    for name, (task, _) in BEIR.items():
        if task in tasks:
            assert tasks[task].eval_splits == ["dev" if name == "msmarco" else "test"]
    languages = {part[1] for part in _task_parts("MIRACLRetrievalHardNegatives", None)}
    assert languages == set(tasks["MIRACLRetrievalHardNegatives"].hf_subsets)
    assert {task.metadata.main_score for task in tasks.values()} == {"ndcg_at_10"}
    for name, task in tasks.items():
        for subset, spoken in task.metadata.hf_subsets_to_langscripts.items():
            if name != "CUREv1" or subset == "en":
                dataset = RetrievalDataset("", "", Path(), {}, {}, documents=[], task=name, subset=subset)
                assert sorted(set(_languages(dataset))) == sorted(set(spoken)), (name, subset)


def local_task(folder, drop_identical_ids: bool):
    """A BEIR folder as a task of mteb, in memory."""
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    def rows(name: str) -> list[dict]:
        lines = read_lines(folder / f"{name}.jsonl")
        return [{**{key: row[key] for key in row if key != "_id"}, "id": row["_id"]} for row in lines]

    class LocalTask(AbsTaskRetrieval):
        ignore_identical_ids = drop_identical_ids
        metadata = TaskMetadata(
            name="LocalTask",
            description="local",
            dataset={"path": "local/x", "revision": "local"},
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, *args, **kwargs):
            split = {
                "corpus": Dataset.from_list(rows("corpus")),
                "queries": Dataset.from_list(rows("queries")),
                "relevant_docs": load_dataset(folder).qrels,
                "top_ranked": None,
            }
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return LocalTask()


@pytest.mark.parametrize("rule", ["mteb", "beir"])
def test_our_checkpoint_in_mteb(mteb, tmp_path, rule):
    """The README's example with a local task: mteb's scores and eval.py's for one checkpoint are equal."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    pytest.importorskip("peft")
    base = tiny_checkpoint(tmp_path / "base")
    decoder = Checkpoint(base, CPU, torch.float32).decoder()
    torch.manual_seed(0)
    add_lora(decoder, 4, 8)
    for layer in lora_layers(decoder).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    prompts = {"query": "find: ", "document": "text: "}
    embedder = Embedder(decoder, byte_tokenizer(), 64, prompts, append_eos=True).eval()
    save_embedder(embedder, tmp_path / "run", str(base))
    folder = random_dataset(tmp_path / "LocalTask", 4)
    lines = read_lines(folder / "corpus.jsonl")
    for number, row in enumerate(lines):
        row["title"] = f"title {number}" if number % 2 else ""
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))

    command = ["--dataset", str(folder), "--model", str(tmp_path / "run"), "--device", "cpu"]
    command += ["--json", str(tmp_path / "ours.json"), "--identical-ids", rule]
    assert yardstick.main([*command, "--dtype", "float32", "--mteb", str(tmp_path / "ours")]) == 0
    (ours,) = json.loads((tmp_path / "ours.json").read_text())["results"]
    assert ours["identical_ids"] == ("kept" if rule == "mteb" else "dropped")
    before = yardstick.evaluate_embedder(
        embedder, load_dataset(folder), 1000, keep_identical_ids=rule == "mteb"
    )
    assert before["metrics"] == ours["metrics"], "saving and loading changes nothing"

    model = sentence_transformers.SentenceTransformer(str(tmp_path / "run"), device="cpu", **FLOAT32)
    model.model_card_data.model_name = "local/run"  # else all folders share one name in the cache
    cache = mteb.ResultCache(cache_path=tmp_path / "theirs")
    options = {"cache": cache, "encode_kwargs": {"batch_size": 4, "show_progress_bar": False}}
    task = local_task(folder, drop_identical_ids=rule == "beir")
    results = mteb.evaluate(model, [task], show_progress_bar=False, **options)
    (theirs,) = results.task_results
    assert theirs.get_score() == pytest.approx(ours["metrics"]["ndcg@10"], abs=1e-9)
    assert theirs.get_score() > 0.05
    (row,) = theirs.scores["test"]
    assert {name: row[name.replace("@", "_at_")] for name in METRICS} == {
        name: pytest.approx(ours["metrics"][name], abs=1e-9) for name in METRICS
    }
    assert row["mrr_at_10"] == pytest.approx(ours["metrics"]["mrr@10"], abs=5.1e-6)

    # Both write the same files, so either's results stand beside the other's.
    name = "results/local__run/no_revision_available/LocalTask.json"
    read = [mteb.results.TaskResult.from_disk(tmp_path / who / name) for who in ("ours", "theirs")]
    assert read[0].get_score() == read[1].get_score()
    assert set(read[0].scores["test"][0]) - {"map"} <= set(read[1].scores["test"][0])


CARD = "---\nconfigs:\n{}---\n# A dataset\n"
ENTRY = "- config_name: {}\n  data_files:\n  - split: {}\n    path: {}\n"


def in_mtebs_layout(source, folder, layout: str, language: str):
    """A BEIR folder as mteb keeps its datasets: JSON lines at the root, or a folder of parquet a table."""
    front = f"{language}-" if language else ""
    tables = {name: read_lines(source / f"{name}.jsonl") for name in ("corpus", "queries")}
    lines = (source / "qrels" / "test.tsv").read_text().splitlines()[1:]
    rows = (line.split("\t") for line in lines)
    tables["qrels"] = [{"query-id": q, "corpus-id": d, "score": int(gain)} for q, d, gain in rows]
    entries = []
    for table, content in tables.items():
        if layout == "jsonl":
            split = "test" if table == "qrels" else table
            name = f"{front}qrels/test.jsonl" if table == "qrels" else f"{front}{table}.jsonl"
            config = "default" if front + table == "qrels" else front + table
        else:
            split, config = "test", front + table
            name = f"{config}/test-00000-of-00001.parquet"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if layout == "jsonl":
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            pandas = pytest.importorskip("pandas")
            pandas.DataFrame(content).to_parquet(folder / name)
        pattern = name.replace("00000-of-00001", "*")
        entries.append(ENTRY.format(config, split, pattern))
    (folder / "README.md").write_text(CARD.format("".join(entries)))
    return folder


@pytest.mark.parametrize("language", ["", "en"])
@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_mtebs_loader_reads_the_same(mteb, tmp_path, layout, language):
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalDatasetLoader

    source = random_dataset(tmp_path / "source", 5)
    unjudged = {"_id": "q99", "text": "nobody judged this"}
    with open(source / "queries.jsonl", "a") as file:
        file.write(json.dumps(unjudged) + "\n")
    folder = in_mtebs_layout(source, tmp_path / "mteb", layout, language)
    if language:  # a second language beside it, with other documents under the same ids
        other = random_dataset(tmp_path / "other", 50)
        more = in_mtebs_layout(other, tmp_path / "second", layout, "de")
        card = (folder / "README.md").read_text(), (more / "README.md").read_text()
        shutil.copytree(more, folder, dirs_exist_ok=True)
        both = "".join(text.removeprefix("---\nconfigs:\n").partition("---\n")[0] for text in card)
        (folder / "README.md").write_text(CARD.format(both))
    loader = RetrievalDatasetLoader(str(folder), None, split="test", config=language or "default")
    theirs = loader.load()
    ours = load_dataset(folder, "test", language)
    assert dict(ours.corpus()) == {
        row["id"]: f"{row['title']} {row['text']}".strip() for row in theirs["corpus"]
    }
    assert [doc_id for doc_id, _ in ours.corpus()] == list(theirs["corpus"]["id"])
    assert ours.queries == {row["id"]: row["text"] for row in theirs["queries"]} and len(ours.queries) == 12
    assert ours.qrels == theirs["relevant_docs"]
    beir = load_dataset(source, "test")
    assert (dict(ours.corpus()), ours.queries, ours.qrels) == (dict(beir.corpus()), beir.queries, beir.qrels)


@pytest.mark.slow
def test_the_readmes_example(mteb, tmp_path, monkeypatch):
    """mteb's own NFCorpus with the demo's checkpoint, offline: its copy of the data is made from BEIR's.

    The same texts, other code at every step: reader, network, search, metrics. An adapter, because in a whole
    checkpoint of type qwen2 transformers 5 splits texts as Qwen does, whatever tokenizer.json says, and the
    demo's tokenizer splits otherwise. In float32, because transformers takes the base's type, bfloat16.
    """
    sentence_transformers = pytest.importorskip("sentence_transformers")
    archive = SHARED / "nfcorpus.zip"
    if not archive.exists():
        pytest.skip(f"{archive} is absent: mteb's NFCorpus was NOT compared with eval.py's")
    pytest.importorskip("peft")
    base = ROOT / "demo" / "checkpoint"
    embedder = load_embedder(base, CPU, torch.float32, 64)
    embedder.prompts = {"query": "question: ", "document": "text: "}
    add_lora(embedder.decoder, 4, 8)
    save_embedder(embedder, tmp_path / "run", str(base))
    command = ["--dataset", str(archive), "--model", str(tmp_path / "run"), "--device", "cpu"]
    settings = yardstick.parse_arguments([*command, "--identical-ids", "mteb"])
    (ours,) = yardstick.run_evaluation(settings)[str(tmp_path / "run")]

    shutil.unpack_archive(archive, tmp_path / "unpacked")
    copy = in_mtebs_layout(tmp_path / "unpacked" / "nfcorpus", tmp_path / "copy", "jsonl", "")
    tasks = mteb.get_tasks(tasks=["NFCorpus"])
    monkeypatch.setitem(tasks[0].metadata.dataset, "path", str(copy))
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "run"), device="cpu", **FLOAT32)
    model.model_card_data.model_name = "local/run"
    cache = mteb.ResultCache(cache_path=tmp_path / "theirs")
    options = {"batch_size": 32, "show_progress_bar": False}
    results = mteb.evaluate(model, tasks, cache=cache, encode_kwargs=options, show_progress_bar=False)
    (theirs,) = results.task_results
    assert (theirs.task_name, ours["queries"], ours["documents"]) == ("NFCorpus", 323, 3633)
    (row,) = theirs.scores["test"]
    different = {
        name: (row[name.replace("@", "_at_")], ours["metrics"][name])
        for name in METRICS
        if abs(row[name.replace("@", "_at_")] - ours["metrics"][name]) > 1e-9
    }
    assert not different
    assert (
        cache.load_results(models=["local/run"]).model_results[0].task_results[0].get_score()
        == theirs.get_score()
    )
