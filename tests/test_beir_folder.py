"""Datasets in BEIR's layout, as folders and zips: what is read, what is refused and in which words."""

import zipfile

import pytest

from formats.datasets import Corpus, load_dataset
from support.files import InputError


def beir(tmp_path, corpus=None, queries=None, qrels=None):
    folder = tmp_path / "set"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(
        corpus
        or '{"_id": "d1", "title": "T", "text": "one"}\n'
        '{"_id": 2, "text": "two"}\n{"_id": "d3", "text": ""}\n'
    )
    (folder / "queries.jsonl").write_text(
        queries
        or '{"_id": "q1", "text": "a", "metadata": {"entity": "seen"}}\n'
        '{"_id": "q2", "text": "b"}\n{"_id": "q3", "text": "c"}\n'
    )
    header = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels" / "test.tsv").write_text(qrels or header + "q1\td1\t2\nq1\t2\t0\nq2\t2\t-1\r\n")
    return folder


def test_beir_folder_and_zip(tmp_path):
    folder = beir(tmp_path)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in folder.rglob("*.*"):
            archive.write(file, f"set/{file.relative_to(folder)}")
        archive.writestr("__MACOSX/set/._corpus.jsonl", b"what Finder leaves")
    (folder / "README.md").write_text("---\ntitle: my notes: yes\n---\n")  # not a card as mteb's are
    for path in (folder, tmp_path / "set.zip"):
        dataset = load_dataset(path, "test")
        assert dataset.name == "set" and dataset.num_documents == 3
        assert dataset.queries == {"q1": "a", "q2": "b"}  # only those with judgements
        assert dataset.qrels == {"q1": {"d1": 2, "2": 0}, "q2": {"2": -1}}
        assert list(dataset.corpus()) == [("d1", "T one"), ("2", "two"), ("d3", "")]
        assert list(dataset.corpus()) == list(dataset.corpus())
        assert dataset.groups == {"seen": {"q1"}}


HEADER = "query-id\tcorpus-id\tscore\n"


BAD_SETS = [
    ({"qrels": HEADER + "q1 d1 1\n"}, "test.tsv, line 2: expected"),
    ({"qrels": HEADER + "q1\td1\thigh\n"}, "test.tsv, line 2: expected"),
    ({"qrels": HEADER}, "test.tsv: no judgements"),
    ({"qrels": HEADER + "q9\td1\t1\n"}, "query 'q9' has judgements in test but no text"),
    (
        {"queries": '{"_id": "q1", "text": "a"}\n{"_id": "q1", "text": "b"}\n'},
        "line 2: _id 'q1' occurs twice",
    ),
    ({"queries": '{"_id": "q1"}\n'}, "line 1: 'text' is missing or empty"),
    ({"corpus": "\n"}, "corpus.jsonl: no documents"),
    ({"corpus": '{"text": "a"}\n'}, "corpus.jsonl, line 1: '_id' is missing"),
    (
        {"corpus": '{"_id": "d1", "text": ""}\n' * 2},
        "corpus.jsonl, line 2: _id 'd1' stands already on line 1",
    ),
    ({"corpus": '{"_id": "d1", "text": 4}\n'}, "corpus.jsonl, line 1: 'text' is int"),
]


@pytest.mark.parametrize("changes, message", BAD_SETS, ids=[message for _, message in BAD_SETS])
def test_bad_datasets(tmp_path, changes, message):
    folder = beir(tmp_path, **changes)
    with pytest.raises(InputError) as error:
        load_dataset(folder, "test")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_split_names_those_there_are(tmp_path):
    with pytest.raises(InputError, match="no qrels for split 'dev'; splits there: test"):
        load_dataset(beir(tmp_path), "dev")


def test_corpus_finds_duplicate_ids(tmp_path):
    (tmp_path / "c.jsonl").write_text(
        '{"_id": "a", "text": "1"}\n{"_id": "b", "text": "2"}\n{"_id": "a", "text": "3"}\n'
    )
    with pytest.raises(InputError, match="line 3: _id 'a' stands already on line 1"):
        Corpus(tmp_path / "c.jsonl")
