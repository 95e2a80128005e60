"""Training rows from a corpus: candidates for questions, and questions out of its text alone."""

import json

import pytest
from tiny import beir_folder, tiny_checkpoint

from data import Rows
from tools.mine import main, passages, sentences, text_question

TEXT = (
    "The river Wensel rises in the hills. It floods the meadows of Calder every spring. Farmers build walls "
    "against it. In 1901 the water reached the church door. Nobody drowned that year."
)


def test_sentences_and_passages_keep_every_word():
    parts = sentences(TEXT)
    assert len(parts) == 5 and " ".join(parts) == TEXT
    assert sentences("It cost 3.5 pounds. e.g. this stays. Who? Me!") == [
        "It cost 3.5 pounds. e.g. this stays.",
        "Who?",
        "Me!",
    ]
    for words in (1, 12, 1000):
        cut = list(passages(TEXT, words))
        assert " ".join(cut) == TEXT
        assert all(len(part.split()) <= words or len(sentences(part)) == 1 for part in cut)
    assert list(passages("  ")) == []


def test_next_hides_the_sentence_that_asks():
    drawn = {text_question(TEXT, "next", seed) for seed in range(40)}
    assert len(drawn) == 4  # each sentence but the last
    for query, target, shown in drawn:
        parts = sentences(TEXT)
        assert parts[parts.index(query) + 1] == target
        assert query not in shown and target in shown and len(sentences(shown)) == 4


def test_next_hides_every_copy_of_the_sentence_that_asks():
    text = "The harbour froze in March. Ships waited for a week. "
    text += text.split(" S")[0] + " Then rain came down hard."
    drawn = {text_question(text, "next", seed) for seed in range(40)} - {None}
    assert any(query.startswith("The harbour") for query, _, _ in drawn)
    assert all(query not in shown for query, _, shown in drawn)


def test_rest_asks_with_the_first_words():
    for seed in range(40):
        query, target, shown = text_question(TEXT, "rest", seed)
        assert f"{query} {target}" in sentences(TEXT) and shown == TEXT
        assert len(target.split()) <= max(len(query.split()) // 2, 1) and len(query.split()) >= 4


@pytest.mark.parametrize(
    "text",
    [
        "He saw the old mill by the river. He saw the old mill by the river.",  # the same again
        "She sold the blue house of her aunt. Her aunt, the blue house of her dreams.",  # four words in a row
        "Too short. Also short.",
        "",
    ],
)
def test_a_target_that_the_query_gives_away_is_passed_over(text):
    assert text_question(text, "next", 0) is None


def test_candidates_of_questions_with_answers(tmp_path, capsys):
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    beir = beir_folder(tmp_path / "beir")
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        '{"query": "text 3", "answers": ["3", "three"], "passage_id": "d3", "source": "a"}\n'
        '{"text": "text ab", "answer": "nowhere", "source": "b"}\n'
    )
    for by in ("bm25", str(checkpoint)):
        out = tmp_path / "rows.jsonl"
        flags = ["--corpus", str(beir), "--questions", str(questions), "--out", str(out), "--by", by]
        assert main([*flags, "--candidates", "4", "--judge", str(checkpoint)]) == 0
        first, second = map(json.loads, out.read_text().splitlines())
        assert first["target"] == "3" and first["positive"] == 0 and len(first["documents"]) == 4
        assert first["documents"][0]["text"].startswith("text 3 ")
        assert "positive" not in second and second["target"] == "nowhere"
        table = capsys.readouterr().out.splitlines()
        assert any(line.split()[:3] == ["a", "1", "100.0%"] for line in table)
        assert any(line.split()[:3] == ["b", "1", "0.0%"] for line in table)


def corpus(folder):
    documents = [
        {"_id": f"d{i}", "title": f"Town {i}", "text": TEXT.replace("Calder", f"Town{i} ")} for i in range(6)
    ]
    long = " ".join(f"Sentence {i} tells of thing {i} and of {i * 7}." for i in range(60))
    documents.append({"_id": "long", "title": "", "text": long})
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(d) + "\n" for d in documents))
    return path


@pytest.mark.parametrize("recipe", ["next", "rest"])
def test_mine_from_text(tmp_path, recipe, capsys):
    out = tmp_path / "rows.jsonl"
    flags = ["--corpus", str(corpus(tmp_path)), "--out", str(out), "--candidates", "4"]
    command = ["--from-text", recipe, *flags]
    assert main(command) == 0
    assert "in source" in capsys.readouterr().out
    rows = Rows(out)
    assert len(rows) + rows.skipped >= 10
    for i in range(len(rows)):
        row = rows[i]
        assert row.positive == 0 and row.target in row.documents[0].text
        assert all(row.target not in d.text and row.query not in d.text for d in row.documents[1:])
        assert (row.query in row.documents[0].text) == (recipe == "rest")
    first = out.read_bytes()
    assert main(command) == 0 and out.read_bytes() == first
    kept = [json.loads(line) for line in open(f"{out}.passages.jsonl")]
    long = [d["text"] for d in kept if d["_id"].startswith("long#")]
    assert len(long) > 3
    neighbours = [rows[i] for i in range(len(rows)) if rows[i].query.startswith("Sentence")]
    assert neighbours and all(row.documents[1].text in long for row in neighbours)


def test_limit_and_groups(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    path = str(corpus(tmp_path))
    assert main(["--from-text", "next", "--limit", "3", "--corpus", path, "--out", str(out)]) == 0
    assert "out of 3 passages" in capsys.readouterr().out
    assert main(["--groups", "4", "--corpus", path, "--out", str(out)]) == 0
    texts = [json.loads(line)["text"] for line in open(f"{out}.passages.jsonl")]
    rows = Rows(out, 2, documents_only=True)  # --candidates cuts rows with questions, not groups
    assert [d.text for i in range(len(rows)) for d in rows[i].documents] == texts[: len(texts) // 4 * 4]


def test_one_source_of_questions(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["--corpus", str(corpus(tmp_path)), "--out", str(tmp_path / "rows.jsonl")])
    assert error.value.code == 2 and "give one of --questions FILE, --from-text" in capsys.readouterr().err


def test_no_question_in_the_text(tmp_path, capsys):
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"_id": "a", "title": "", "text": "Short."}) + "\n")
    assert main(["--from-text", "next", "--corpus", str(path), "--out", str(tmp_path / "r")]) == 2
    assert f"{path}: no questions" in capsys.readouterr().err


def test_too_few_passages_for_a_group(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert main(["--groups", "99", "--corpus", str(corpus(tmp_path)), "--out", str(out)]) == 2
    assert "--groups 99: the corpus has" in capsys.readouterr().err and not out.exists()
