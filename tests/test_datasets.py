"""Public datasets by their names: downloads, unpacking, layouts, groups; from a server on the loopback."""

import gzip
import hashlib
import json
import stat
import sys
import zipfile

import pytest
from loopback import Loopback, commit

import eval as yardstick
from formats.catalogue import BEIR, GROUPS, expand_names, resolve_dataset, resolve_datasets
from formats.datasets import load_dataset
from formats.fetch import download, unpack
from support.files import InputError

CORPUS = [{"_id": "d1", "title": "T", "text": "one"}, {"_id": "d2", "title": "", "text": "two two"}]
QUERIES = [{"_id": "q1", "text": "one"}, {"_id": "q2", "text": "two"}, {"_id": "q3", "text": "not judged"}]
QRELS = [("q1", "d1", 1), ("q2", "d2", 2)]


def lines(objects):
    return "".join(json.dumps(value) + "\n" for value in objects)


def dataset_files(split="test"):
    judged = "query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{d}\t{s}\n" for q, d, s in QRELS)
    return {"corpus.jsonl": lines(CORPUS), "queries.jsonl": lines(QUERIES), f"qrels/{split}.tsv": judged}


def write_files(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def write_zip(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of BEIR's zips, and a cache of this test's own."""
    (tmp_path / "served").mkdir()
    with Loopback(files=tmp_path / "served") as server:
        monkeypatch.setenv("BEIR_URL", f"{server.url}/files")
        monkeypatch.setenv("DREAM_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("formats.fetch.time.sleep", lambda seconds: None)
        yield server


def serve(tmp_path, monkeypatch, name, files, md5=None):
    digest = write_zip(tmp_path / "served" / f"{name}.zip", files)
    monkeypatch.setitem(BEIR, name, (BEIR[name][0], md5 or digest))


def beir_zip(name, split="test"):
    return {f"{name}/{file}": text for file, text in dataset_files(split).items()}


def test_a_name_is_fetched_once_and_left_whole(server, tmp_path, monkeypatch, capsys):
    serve(tmp_path, monkeypatch, "scifact", {**beir_zip("scifact"), "scifact/extra.bin": "not needed"})
    assert yardstick.main(["--dataset", "scifact", "--model", "bm25"]) == 0
    printed = capsys.readouterr().out
    assert "to fetch into" in printed and "scifact 0 MB" in printed and "scifact  test" in printed
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["scifact", "scifact.lock"]
    names = {p.name for p in (tmp_path / "cache" / "scifact").rglob("*") if p.is_file()}
    assert names == {"corpus.jsonl", "queries.jsonl", "test.tsv"}
    asked = len(server.requests)
    assert yardstick.main(["--dataset", "scifact", "--model", "bm25"]) == 0
    assert len(server.requests) == asked and "to fetch" not in capsys.readouterr().out


def test_msmarco_is_scored_on_dev(server, tmp_path, monkeypatch):
    serve(tmp_path, monkeypatch, "msmarco", beir_zip("msmarco", "dev"))
    dataset = resolve_dataset("msmarco")
    assert (dataset.split, dataset.task) == ("dev", "MSMARCO")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path, ranges):
    content = bytes(range(256)) * 20_000
    (tmp_path / "served" / "big.bin").write_bytes(content)
    server.no_range = not ranges
    server.cut_after, server.cuts = 2_000_000, 2
    url, path = f"{server.url}/files/big.bin", tmp_path / "big.bin"
    if ranges:  # another process went on: the first gives up at once, what came is kept
        with pytest.raises(InputError, match="run again, what came is kept in .*big.bin.part"):
            download(url, path, patience=0)
        assert not path.exists() and (tmp_path / "big.bin.part").stat().st_size == 2_000_000
    download(url, path, hashlib.md5(content).hexdigest())
    assert path.read_bytes() == content and not (tmp_path / "big.bin.part").exists()
    asked = [headers.get("range") for method, _, headers in server.requests if method == "GET"]
    expected = [None, "bytes=2000000-", "bytes=4000000-"]
    assert asked == (expected if ranges else [None, "bytes=2000000-", "bytes=2000000-"])


def test_a_download_that_always_breaks_gives_up_in_one_line(server, tmp_path):
    (tmp_path / "served" / "big.bin").write_bytes(b"x" * 1000)
    server.cut_after, server.cuts = 0, 10**6
    with pytest.raises(InputError, match="run again") as error:
        download(f"{server.url}/files/big.bin", tmp_path / "big.bin")
    assert "\n" not in str(error.value) and not (tmp_path / "big.bin").exists()
    assert len(server.requests) == 5


def test_a_complete_part_needs_no_more_bytes(server, tmp_path):
    (tmp_path / "served" / "f").write_bytes(b"abc")
    (tmp_path / "f.part").write_bytes(b"abc")
    download(f"{server.url}/files/f", tmp_path / "f", hashlib.md5(b"abc").hexdigest())
    assert (tmp_path / "f").read_bytes() == b"abc"


def refused(name, message, tmp_path):
    """The dataset is refused in one line that holds `message`, and the cache holds no part of it."""
    with pytest.raises(InputError) as error:
        resolve_datasets(name)
    assert message in str(error.value) and "\n" not in str(error.value)
    left = {p.name for p in (tmp_path / "cache").iterdir()}
    assert left <= {f"{name}.lock", f"{name}.zip"}, left
    return left


def test_a_wrong_md5_is_refused_and_deleted(server, tmp_path, monkeypatch):
    serve(tmp_path, monkeypatch, "scifact", beir_zip("scifact"), md5="0" * 32)
    assert refused("scifact", "published is 000", tmp_path) == {"scifact.lock"}


def test_a_corrupt_zip_is_refused_and_deleted(server, tmp_path, monkeypatch):
    served = tmp_path / "served" / "scifact.zip"
    write_zip(served, {**beir_zip("scifact"), "scifact/qrels/train.tsv": "x" * 5000})
    content = bytearray(served.read_bytes())
    for broken in (content[: len(content) // 2], bytes(10) + content[10:60] + bytes(30) + content[90:]):
        served.write_bytes(broken)
        monkeypatch.setitem(BEIR, "scifact", ("SciFact", hashlib.md5(broken).hexdigest()))
        assert refused("scifact", "not a whole zip", tmp_path) == {"scifact.lock"}
    assert list((tmp_path / "cache").rglob("*.jsonl")) == []


@pytest.mark.parametrize(
    "member", ["../evil.jsonl", "scifact/../../evil.jsonl", "/evil.jsonl", "a\\..\\b.jsonl"]
)
def test_a_zip_that_leaves_its_folder_is_refused(server, tmp_path, monkeypatch, member):
    serve(tmp_path, monkeypatch, "scifact", {**beir_zip("scifact"), member: "{}"})
    refused("scifact", "would leave the folder", tmp_path)
    assert not list(tmp_path.rglob("evil*"))


def test_links_and_absurd_sizes_are_refused(tmp_path):
    link = zipfile.ZipInfo("set/corpus.jsonl")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "l.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match="is a link"):
        unpack(tmp_path / "l.zip", tmp_path / "out")
    write_zip(tmp_path / "b.zip", {"set/corpus.jsonl": bytes(201 << 20)})
    with pytest.raises(InputError, match="more than 200 times its size"):
        unpack(tmp_path / "b.zip", tmp_path / "out")
    with pytest.raises(InputError, match="more than 200 times its size"):
        load_dataset(tmp_path / "b.zip")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "url, message",
    [
        ("http://example.org/a.zip", "only https"),
        ("ftp://example.org/a", "only https"),
        ("file:///etc/passwd", "only"),
    ],
)
def test_only_https_is_fetched(tmp_path, url, message):
    with pytest.raises(InputError, match=message):
        download(url, tmp_path / "a")


def test_a_missing_file_is_told(server, tmp_path):
    refused("scifact", "scifact.zip: the server answers 404", tmp_path)


def test_too_little_space_is_told_before_the_download(server, tmp_path, monkeypatch):
    serve(tmp_path, monkeypatch, "scifact", beir_zip("scifact"))
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("formats.catalogue.shutil.disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="too little space; set DREAM_CACHE"):
        expand_names(["scifact"])
    assert [method for method, _, _ in server.requests] == ["HEAD"]


def test_groups_and_misspelt_names(server, capsys):
    names = expand_names(["beir13", "beir9", "scifact"])
    assert names == [*GROUPS["beir13"], "cqadupstack"]  # each once
    assert "scifact (?)" in capsys.readouterr().out  # the server has none of them
    assert [len(GROUPS[name]) for name in ("beir", "beir13", "beir9", "rteb")] == [15, 13, 9, 14]
    with pytest.raises(InputError, match="did you mean scifact?"):
        resolve_datasets("scifcat")
    with pytest.raises(InputError, match="did you mean FinQARetrieval?"):
        resolve_datasets("FinQA")


def test_cqadupstack_is_the_mean_of_its_parts(server, tmp_path, monkeypatch, capsys):
    files = {f"cqadupstack/{part}/{f}": t for part in ("android", "gis") for f, t in dataset_files().items()}
    files["cqadupstack/gis/qrels/test.tsv"] = "q-id\td-id\tscore\nq1\td2\t1\n"  # the wrong document: 0
    serve(tmp_path, monkeypatch, "cqadupstack", files)
    serve(tmp_path, monkeypatch, "scifact", beir_zip("scifact"))
    arguments = ["--dataset", "cqadupstack", "scifact", "--model", "bm25", "--json", str(tmp_path / "r.json")]
    assert yardstick.main([*arguments, "--per-query", "--mteb", str(tmp_path / "mteb")]) == 0
    with pytest.raises(InputError, match="--dev cqadupstack: has several parts; give one of them"):
        resolve_dataset("cqadupstack", flag="--dev")
    printed = capsys.readouterr().out
    assert "cqadupstack: NDCG@10 0.5000, the mean of its parts" in printed
    assert "mean NDCG@10: 0.7500, each benchmark counted once" in printed
    written = json.loads((tmp_path / "r.json").read_text())
    assert [r["dataset"] for r in written["results"]] == ["cqadupstack-android", "cqadupstack-gis", "scifact"]
    assert written["averages"]["cqadupstack"]["ndcg@10"] == 0.5
    assert written["averages"]["mean"]["ndcg@10"] == 0.75
    assert written["results"][0]["ndcg@10_per_query"] == {"q1": 1.0, "q2": 1.0}
    assert written["settings"]["code"] and written["settings"]["identical_ids"] == "mteb"
    names = {path.name for path in (tmp_path / "mteb").rglob("*.json")}
    expected = {"CQADupstackAndroidRetrieval.json", "CQADupstackGisRetrieval.json", "SciFact.json"}
    assert names == {*expected, "model_meta.json"}


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    folder = write_files(tmp_path / "one", dataset_files())
    write_zip(tmp_path / "two.zip", beir_zip("two"))
    first = load_dataset(folder).fingerprint
    assert first == load_dataset(tmp_path / "two.zip").fingerprint and len(first) == 32
    for name, old, new in (
        ("corpus.jsonl", "one", "uno"),
        ("qrels/test.tsv", "\t2\n", "\t1\n"),
        ("queries.jsonl", "two", "2"),
    ):
        changed = write_files(tmp_path / name.replace("/", "-"), dataset_files())
        (changed / name).write_text((changed / name).read_text().replace(old, new))
        assert load_dataset(changed).fingerprint != first


CARD = """---
configs:
- config_name: corpus
  data_files:
  - split: corpus
    path: {corpus}
- config_name: queries
  data_files:
  - split: queries
    path: {queries}
- config_name: {name}
  data_files:
  - split: test
    path: {qrels}
---
# A dataset
"""


def mteb_files(**changes):
    """The files of a dataset as mteb keeps them: everything in JSON lines, ids maybe called id."""
    names = {"corpus": "corpus.jsonl", "queries": "queries.jsonl", "qrels": "qrels/test.jsonl", **changes}
    judged = [{"query-id": q, "corpus-id": d, "score": float(s)} for q, d, s in QRELS]
    renamed = [{"id": value["_id"], "title": None, "text": value["text"]} for value in QUERIES]
    return {names["corpus"]: lines(CORPUS), names["queries"]: lines(renamed), names["qrels"]: lines(judged)}


def test_mtebs_layout_with_and_without_a_card(tmp_path):
    plain = load_dataset(write_files(tmp_path / "beir", dataset_files()))
    root = {"corpus": "corpus.jsonl", "queries": "queries.jsonl", "qrels": "qrels/test.jsonl"}
    inner = {"corpus": "a/c-0.jsonl", "queries": "b/x.jsonl", "qrels": "data/t.jsonl"}
    for number, (names, card, config) in enumerate(
        [(root, False, ""), (root, True, "default"), (inner, True, "default"), (inner, True, "qrels")]
    ):
        folder = write_files(tmp_path / str(number), mteb_files(**names))
        if card:
            (folder / "README.md").write_text(CARD.format(name=config, **names))
        dataset = load_dataset(folder)
        assert (dataset.queries, dataset.qrels) == (plain.queries, plain.qrels)
        assert dataset.fingerprint == plain.fingerprint


def test_shards_compression_languages_and_all_splits(tmp_path):
    folder = tmp_path / "set"
    files = {
        "en-corpus/x-00000-of-00002.jsonl": lines(CORPUS[:1]).strip(),  # without a last newline
        "en-corpus/x-00001-of-00002.jsonl": lines(CORPUS[1:]),
        "en-queries/x.jsonl": lines(QUERIES),
        "en-qrels/one.jsonl": lines([{"query-id": "q1", "corpus-id": "d1", "score": 1}]),
        "en-qrels/two.jsonl": lines([{"query-id": "q2", "corpus-id": "d2", "score": 2}]),
    }
    write_files(folder, files)
    dataset = load_dataset(folder, "one", subset="en")
    assert dataset.num_documents == 2 and list(dataset.queries) == ["q1"]
    assert [text for _, text in dataset.corpus()] == ["T one", "two two"]
    together = load_dataset(folder, "all", subset="en")
    assert together.qrels == {"q1": {"d1": 1}, "q2": {"d2": 2}}
    with pytest.raises(InputError, match="no qrels for split 'test'; splits there: one, two"):
        load_dataset(folder, "test", subset="en")
    with pytest.raises(InputError, match="found en-corpus, en-qrels, en-queries"):
        load_dataset(folder, "one")
    repeated = write_files(tmp_path / "again", {**files, "en-corpus/y.jsonl": lines(CORPUS)})
    # A document in two splits counts once.
    assert load_dataset(repeated, "all", subset="en").num_documents == 2
    with gzip.open(repeated / "en-corpus" / "z.jsonl.gz", "wt") as file:
        file.write(lines([{"_id": "d3", "text": "three"}]))
    assert load_dataset(repeated, "all", subset="en").num_documents == 3


def test_a_card_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "secret.jsonl").write_text(lines(CORPUS))
    folder = write_files(tmp_path / "set", mteb_files())
    names = {"corpus": "../secret.jsonl", "queries": "queries.jsonl", "qrels": "qrels/test.jsonl"}
    (folder / "README.md").write_text(CARD.format(name="qrels", **names))
    with pytest.raises(InputError, match="refused, data_files outside of the folder"):
        load_dataset(folder)
    (folder / "README.md").write_text("---\nconfigs: 3\n---\n")
    with pytest.raises(InputError, match="README.md: its header's configs cannot be read"):
        load_dataset(folder)


@pytest.mark.parametrize("score", ["high", True, None, 0.5])
def test_scores_in_json_are_whole_numbers(tmp_path, score):
    files = mteb_files() | {
        "qrels/test.jsonl": lines([{"query-id": "q1", "corpus-id": "d1", "score": score}])
    }
    with pytest.raises(InputError, match="line 1: 'score' is .*, expected a whole number"):
        load_dataset(write_files(tmp_path / "set", files))


def test_parquet_is_read_or_told(tmp_path, monkeypatch):
    """With pyarrow the same dataset; without it one line that says what to install."""
    folder = write_files(tmp_path / "set", mteb_files(corpus="corpus/test-00000-of-00001.jsonl"))
    expected = load_dataset(folder).fingerprint
    (folder / "corpus" / "test-00000-of-00001.jsonl").unlink()
    path = folder / "corpus" / "test-00000-of-00001.parquet"
    path.write_bytes(b"PAR1 not really")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        load_dataset(folder)
    monkeypatch.undo()
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    with pytest.raises(InputError, match="not a whole parquet file"):
        load_dataset(folder)
    parquet.write_table(pyarrow.Table.from_pylist(CORPUS), path)
    assert load_dataset(folder).fingerprint == expected


def test_rteb_tasks_come_from_the_hub(tmp_path, monkeypatch, capsys):
    """The card first, then only the files it names for this task; a task in parts is their mean."""
    from huggingface_hub import constants

    simple = write_files(tmp_path / "simple", mteb_files())
    names = {"corpus": "corpus.jsonl", "queries": "queries.jsonl", "qrels": "qrels/test.jsonl"}
    (simple / "README.md").write_text(CARD.format(name="default", **names) + "\n")
    (simple / "unwanted.parquet").write_text("never fetched")
    parts = tmp_path / "cure"
    card = ["---", "configs:"]
    for config in ("corpus", "queries-en", "queries-fr", "qrels"):
        card += [f"- config_name: {config}", "  data_files:"]
        for split in ("a", "b"):
            card += [f"  - split: {split}", f"    path: {split}/{config}.jsonl"]
    judged = {"a": [("q1", "d1", 1)], "b": [("q2", "d1", 1)]}  # the second is wrong: 0
    for split, rows in judged.items():
        rows = [{"query-id": q, "corpus-id": d, "score": s} for q, d, s in rows]
        files = {"corpus": CORPUS, "queries-en": QUERIES, "queries-fr": [], "qrels": rows}
        write_files(parts, {f"{split}/{name}.jsonl": lines(content) for name, content in files.items()})
    (parts / "README.md").write_text("\n".join([*card, "---", ""]))
    tables = {"FinQARetrieval": ("own/finqa", commit(simple)), "CUREv1": ("own/cure", commit(parts))}
    monkeypatch.setattr("formats.catalogue.RTEB", tables)
    monkeypatch.setattr("formats.catalogue.CURE", ["all", "a", "b"])
    with Loopback(repos={"datasets/own/finqa": simple, "datasets/own/cure": parts}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        arguments = ["--dataset", "FinQARetrieval", "CUREv1", "--model", "bm25"]
        assert yardstick.main([*arguments, "--mteb", str(tmp_path / "out")]) == 0
        fetched = {path.rsplit("/", 2)[-1] for _, path, _ in hub.requests if "/resolve/" in path}
    assert "unwanted.parquet" not in fetched and "queries-fr.jsonl" not in fetched
    printed = capsys.readouterr().out
    assert "CUREv1: NDCG@10 0.5000, the mean of its parts" in printed
    (path,) = (tmp_path / "out").rglob("CUREv1.json")
    content = json.loads(path.read_text())
    scores = {split: rows[0]["ndcg_at_10"] for split, rows in content["scores"].items()}
    assert scores == {"all": 0.5, "a": 1.0, "b": 0.0}
    assert content["dataset_revision"] == commit(parts)
    assert {rows[0]["hf_subset"] for rows in content["scores"].values()} == {"en"}
