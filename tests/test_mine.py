"""Training rows from a corpus: candidates for questions, and questions out of its text alone."""

import json
import re
from collections import Counter

import pytest
from conftest import ROOT
from tiny import beir_folder, tiny_checkpoint

import dream
from data import Rows
from tools.mine import main
from tools.questions import blank_question, holds, passages, sentences, windows

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


def test_windows_overlap_by_half_and_end_with_the_text():
    words = [f"w{i}" for i in range(23)]
    cut = [window.split() for window in windows("  ".join(words), 6)]
    assert all(len(window) == 6 for window in cut) and cut[-1] == words[-6:]
    assert [window[0] for window in cut[:-1]] == words[: len(words) - 6 : 3]
    assert all(
        any({first, second} <= set(window) for window in cut)
        for first, second in zip(words, words[1:], strict=False)
    )
    assert list(windows("two words", 6)) == ["two words"] and list(windows("", 6)) == [""]
    assert len(list(windows("a b c d", 4))) == 1


def test_a_phrase_is_held_as_whole_words():
    assert holds("In 1066, at\nHastings.", "at Hastings") and holds("It cost $5 (U.S.)", "$5")
    assert (
        holds("THE U.S. navy", "u.s.") and not holds("In 1066 or 10th", "10") and not holds("thetan", "the")
    )


NAMES = (
    "The old mill belonged to a certain Josiah Brack and his two sons. The river drove it day and night. "
    "After the great flood the council of the town bought it from Josiah Brack. Josiah Brack."
)


def test_blank_asks_for_a_rare_phrase_of_a_sentence():
    common = Counter({word.lower(): 9 for word in re.findall(r"\w+", NAMES)} | {"josiah": 1, "brack": 2})
    drawn = {blank_question(NAMES, common, 2, seed) for seed in range(20)}
    assert len(drawn) == 2, "either of the long sentences, never the one whose words are too few"
    for query, target in drawn:
        assert target == "Josiah Brack" and not holds(query, target)
        beside = query.rstrip("?").replace("what", target)
        assert re.search(r"\bwhat\b", query) and beside in NAMES and len(beside.split()) <= 13
    assert blank_question(NAMES, common, 0, 0) is None, "no word is rare"


@pytest.mark.parametrize(
    "text, target",
    [
        ("The old mill of Josiah Brack was sold by Josiah Brack. Josiah Brack.", None),  # the query says it
        ("The old mill of Ada Bo Cid Dee Eff was sold at once. Ada Bo Cid Dee Eff.", None),  # too long a name
        ("The old mill of Ada was sold to Josiah at the end. Josiah met Ada.", "Josiah"),  # the rarer one
    ],
)
def test_which_phrase_is_blanked(text, target):
    common = Counter(dict.fromkeys("the old mill of was sold by at once to end met".split(), 9))
    drawn = blank_question(text, Counter(common | {"ada": 2}), 2, 0)
    assert drawn is None if target is None else drawn and drawn[1] == target


def test_a_figure_is_asked_for_whatever_its_count():
    text = "The church of the village was built in 1,204 and burnt. Nothing of 1,204 is left to be seen."
    common = Counter(dict.fromkeys(re.findall(r"[\w,]+", text.lower()), 9))
    assert {blank_question(text, common, 2, seed)[1] for seed in range(9)} == {"1,204"}


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


def test_mine_from_text(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    command = ["--from-text", "--corpus", str(corpus(tmp_path)), "--out", str(out), "--candidates", "4"]
    assert main(command) == 0
    assert "in source" in capsys.readouterr().out
    rows = Rows(out)
    assert len(rows) + rows.skipped >= 10
    for row in (rows[i] for i in range(len(rows))):
        assert row.positive == 0 and len(row.documents) == 4
        assert [holds(document.full_text, row.target) for document in row.documents] == [True] + [False] * 3
    first = out.read_bytes()
    assert main(command) == 0 and out.read_bytes() == first


def test_one_long_text_is_enough(tmp_path):
    """Its own passages are candidates where there are no others."""
    path, out = corpus(tmp_path), tmp_path / "rows.jsonl"
    path.write_text(path.read_text().splitlines()[-1])
    assert main(["--from-text", "--corpus", str(path), "--out", str(out), "--candidates", "4"]) == 0
    rows = Rows(out)
    assert len(rows) >= 3 and rows.skipped == 0
    for row in (rows[i] for i in range(len(rows))):
        assert len(row.documents) == 4
        assert [holds(document.text, row.target) for document in row.documents] == [True] + [False] * 3


def test_candidates_of_text_alone(tmp_path):
    """Candidates are of other documents, and the source alone holds the target, be it in a title."""
    places, path = [f"Norwick{chr(97 + i)}" for i in range(12)], tmp_path / "corpus.jsonl"
    text = "The parish church of X stands above the wide river. Pilgrims walked to X in every summer. "
    filler = " ".join("It rained on the fields and on the roofs of all." for _ in range(9))
    documents = [
        {"_id": name, "title": "", "text": f"{text.replace('X', name)}{filler} {name} is small. {filler}"}
        for name in places
    ]
    documents.append(
        {"_id": "about", "title": places[0], "text": "The parish church stands above the wide river."}
    )
    path.write_text("".join(json.dumps(d) + "\n" for d in documents))
    out = tmp_path / "rows.jsonl"
    assert main(["--corpus", str(path), "--from-text", "--candidates", "9", "--out", str(out)]) == 0
    rows, owner = Rows(out), {}
    for passage in map(json.loads, open(f"{out}.passages.jsonl")):
        owner.setdefault(passage["text"], set()).add(passage["_id"].rpartition("#")[0])
    assert len(rows) == len(places)
    for row in (rows[i] for i in range(len(rows))):
        first, *others = row.documents
        assert row.positive == 0 and row.target in places and holds(first.text, row.target)
        assert len(others) == 8 and not any(holds(d.full_text, row.target) for d in others)
        assert all(owner[d.text] - {row.target} for d in others), "of another document"
    command = ["--corpus", str(path), "--from-text", "--window", "20", "--out", str(out)]
    assert main(command) == 0
    assert all(len(row.documents[0].text.split()) <= 20 for row in map(Rows(out).__getitem__, range(9)))


def squad(folder, count=12):
    """A file in SQuAD's format; each paragraph has a question, and the first one two without an answer."""
    paragraphs = []
    for i in range(count):
        filler = " ".join(f"Item {j} of list {i} was sold in spring." for j in range(8))
        text = f"{filler} In town {i} the mayor is Alder{i} Finch, and nobody minds. {filler}"
        asked = {"id": f"q{i}", "question": f"Who is the mayor of town {i}?"}
        answers = [
            {"text": f"{head}Alder{i} Finch", "answer_start": 9} for head in ("the mayor is ", "", "is ")
        ]
        paragraphs.append({"context": text, "qas": [{**asked, "answers": answers}]})
    paragraphs[0]["qas"].append({"id": "u", "question": "Why?", "answers": [], "is_impossible": True})
    paragraphs[0]["qas"].append({"question": "Who?", "answers": [{"text": "x"}], "is_impossible": True})
    half = count // 2
    data = [{"title": "North_Towns", "paragraphs": paragraphs[:half]}, {"paragraphs": paragraphs[half:]}]
    path = folder / "train-v2.0.json"
    path.write_text(json.dumps({"version": "v2.0", "data": data}))
    return path


def test_squad(tmp_path, capsys):
    path, out = squad(tmp_path), tmp_path / "rows.jsonl"
    assert main(["--questions", str(path), "--candidates", "4", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "2 questions left out: they have no answer" in told and "train needs" not in told
    rows = [json.loads(line) for line in out.open()]
    kept = [json.loads(line) for line in open(f"{out}.passages.jsonl")]
    assert [p["_id"] for p in kept] == [f"0.{j}" for j in range(6)] + [f"1.{j}" for j in range(6)]
    assert [p["title"] for p in kept] == ["North Towns"] * 6 + [""] * 6
    assert [r["query"] for r in rows] == [f"Who is the mayor of town {i}?" for i in range(12)]
    assert [r["target"] for r in rows] == [f"Alder{i} Finch" for i in range(12)], "the shortest answer"
    for passage, row in zip(kept, rows, strict=True):
        assert row["positive"] == 0 and row["documents"][0]["text"] == passage["text"]
        assert len(row["documents"]) == 4 and row["source"] == "squad"


@pytest.mark.parametrize(
    "where, broken, told",
    [
        ((), {"version": "1"}, "'data' is missing"),
        (("data",), {"a": 1}, "'data' is missing or not a list"),
        (("data", 1), {}, "data[1]: 'paragraphs' is missing"),
        (("data", 1, "paragraphs", 2), "text", "data[1].paragraphs[2]: 'context' is missing"),
        (("data", 1, "paragraphs", 2, "qas"), None, "data[1].paragraphs[2]: 'qas' is missing"),
        (("data", 0, "paragraphs", 3, "qas", 0, "question"), " ", "[3].qas[0]: 'question' is missing"),
        (("data", 0, "paragraphs", 3, "qas", 0, "answers"), None, "[3].qas[0]: 'answers' is missing"),
        (
            ("data", 0, "paragraphs", 3, "qas", 0, "answers", 2, "text"),
            5,
            "qas[0].answers[2]: 'text' is missing or",
        ),
        (("data",), [], "no questions"),
    ],
)
def test_a_malformed_squad_file_is_one_line(tmp_path, capsys, where, broken, told):
    path = squad(tmp_path)
    content = {"": json.loads(path.read_text())}
    *parents, last = ["", *where]
    inner = content
    for key in parents:
        inner = inner[key]
    inner[last] = broken
    path.write_text(json.dumps(content[""]))
    assert main(["--questions", str(path), "--out", str(tmp_path / "rows.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{path}: " in error and told in error
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("lines", [False, True])
def test_windows_of_questions(tmp_path, lines, capsys):
    """The source holds the answer, the others are of other passages and do not; from SQuAD and JSON lines."""
    path, out = squad(tmp_path), tmp_path / "rows.jsonl"
    data = [p for article in json.loads(path.read_text())["data"] for p in article["paragraphs"]]
    flags = ["--questions", str(path)]
    if lines:
        documents = [{"_id": f"p{i}", "title": "", "text": p["context"]} for i, p in enumerate(data)]
        asked = [
            {"query": p["qas"][0]["question"], "answers": [f"Alder{i} Finch"], "passage_id": f"p{i}"}
            for i, p in enumerate(data)
        ]
        asked.append({"query": "Who is the mayor?", "answer": data[5]["context"][:250], "passage_id": "p5"})
        asked.append(
            {"query": "Who is the mayor of town 7?", "answer": "Alder7 Finch"}
        )  # of no known passage
        for name, values in (("corpus", documents), ("questions", asked)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
        flags = ["--corpus", str(tmp_path / "corpus.jsonl"), "--questions", str(tmp_path / "questions.jsonl")]
    assert main([*flags, "--window", "20", "--candidates", "6", "--out", str(out)]) == 0
    lost = "1 questions left out: no window of their passage holds the answer"
    assert (lost in capsys.readouterr().out) == lines
    kept = {}
    for window in map(json.loads, open(f"{out}.passages.jsonl")):
        owner, _, number = window["_id"].rpartition("#")
        kept.setdefault(owner, []).append(window["text"])
        assert number == str(len(kept[owner]) - 1)
    assert list(kept.values()) == [list(windows(p["context"], 20)) for p in data]
    rows = [json.loads(line) for line in out.open()]
    assert len(rows) == 12 + lines
    for i, row in enumerate(rows):
        texts = [d["text"] for d in row["documents"]]
        owners = [next(owner for owner, own in kept.items() if text in own) for text in texts]
        assert len(texts) == len(set(owners)) == 6
        if i < 12:
            assert row["positive"] == 0 and [holds(t, row["target"]) for t in texts] == [True] + [False] * 5
            assert owners[0] == list(kept)[i]
        else:
            assert "positive" not in row and holds(texts[0], row["target"])


@pytest.mark.parametrize("crowd", [0, 60])
def test_the_source_is_the_best_window_that_holds_the_answer(tmp_path, crowd):
    """Even behind a crowd of hits. The others are hits, though dozens of them are of the passage itself."""
    noise = " ".join(f"word{i}" for i in range(30))
    praise = "The prize of the harbour race is a cup. " * 30
    text = f"Otto swam. {noise} {praise} The prize of the harbour race went to Otto. {noise} Otto left."
    asked = {"question": "Who won the prize of the harbour race?", "answers": [{"text": "Otto"}]}
    others = [f"{noise} harbour and race of year {i}" for i in range(3)] + [f"note{i}" for i in range(50)]
    others += [f"{asked['question']} Try the harbour {i}." for i in range(crowd)]
    paragraphs = [{"context": text, "qas": [asked]}, *({"context": other, "qas": []} for other in others)]
    path, out = tmp_path / "q.json", tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    assert main(["--questions", str(path), "--window", "16", "--candidates", "4", "--out", str(out)]) == 0
    source, *rest = Rows(out)[0].documents
    assert "race went to Otto" in source.text and all("harbour" in d.text for d in rest) and len(rest) == 3


@pytest.mark.parametrize("count, candidates", [(30, 8), (3, 3)])
def test_random_documents_fill_a_row(tmp_path, capsys, count, candidates):
    """Where few documents share a word with the question; none is filled in where nothing is known at all."""
    corpus, questions, out = (tmp_path / f"{name}.jsonl" for name in ("corpus", "questions", "rows"))
    documents = [{"_id": f"d{i}", "title": "", "text": f"only{i} here{i}"} for i in range(count)]
    asked = [{"query": f"where is only{i}?", "answers": ["x"], "passage_id": f"d{i}"} for i in (0, 2)]
    asked += [{"query": "only1", "answers": ["x"]}, {"query": "nothing", "answers": ["x"]}]
    corpus.write_text("".join(json.dumps(d) + "\n" for d in documents))
    questions.write_text("".join(json.dumps(q) + "\n" for q in asked))
    assert main(["--corpus", str(corpus), "--questions", str(questions), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "1 questions left out: they share no word" in told
    assert f"{out}: 3 rows, 0 with a single candidate left out in training; train needs at least 10" in told
    rows = [[d["text"] for d in json.loads(line)["documents"]] for line in out.open()]
    assert [row[0] for row in rows] == [documents[i]["text"] for i in (0, 2, 1)]
    assert all(len(row) == len(set(row)) == candidates for row in rows)
    assert len({frozenset(row[1:]) for row in rows}) == 3, "each question draws its own"


def test_random_passages_of_text_hold_no_target(tmp_path):
    """Of 66 documents 60 hold it, and still the other six are found."""
    same = (
        "Brother Anselm kept bees in the garden of the abbey. The garden of the abbey feeds Brother Anselm."
    )
    texts = [f"{same} Zq{i}." for i in range(60)] + [f"Unrelated{i} stuff{i}." for i in range(6)]
    texts = [text.replace("Brother Anselm", "brother Anselm9") for text in texts]  # rare: it has a digit
    path, out = tmp_path / "corpus.jsonl", tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"_id": str(i), "text": t}) + "\n" for i, t in enumerate(texts)))
    assert main(["--from-text", "--corpus", str(path), "--candidates", "7", "--out", str(out)]) == 0
    rows = Rows(out)
    assert len(rows) == 60
    for row in (rows[i] for i in range(0, 60, 9)):
        assert (
            len(row.documents) == 7
            and [holds(d.text, row.target) for d in row.documents] == [True] + [False] * 6
        )


def test_limit_and_groups(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    path = str(corpus(tmp_path))
    assert main(["--from-text", "--limit", "3", "--corpus", path, "--out", str(out)]) == 0
    assert "out of 3 passages" in capsys.readouterr().out
    assert main(["--groups", "4", "--corpus", path, "--out", str(out)]) == 0
    assert "for train --objective revela; train needs at least 10\n" in capsys.readouterr().out
    texts = [json.loads(line)["text"] for line in open(f"{out}.passages.jsonl")]
    rows = Rows(out, 2, documents_only=True)  # --candidates cuts rows with questions, not groups
    assert [d.text for i in range(len(rows)) for d in rows[i].documents] == texts[: len(texts) // 4 * 4]


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--corpus c", "give one of --questions FILE, --from-text"),
        ("--corpus c --from-text --groups 4", "give one of --questions FILE, --from-text"),
        ("--corpus c --questions train.json", "--questions train.json: a .json file is SQuAD's"),
        ("--questions q.jsonl", "--corpus PATH is missing"),
        ("--from-text", "--corpus PATH is missing"),
        ("--questions train.json --window 1", "--window: 1 is not at least 2"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, capsys, flags, told):
    with pytest.raises(SystemExit) as error:
        main([*flags.split(), "--out", str(tmp_path / "rows.jsonl")])
    assert error.value.code == 2 and told in capsys.readouterr().err.splitlines()[-1]


def test_from_one_public_file_to_a_trained_retriever(tmp_path, capsys):
    """SQuAD's file, windows of 45 words, two steps: what a newcomer does."""
    rows, demo = str(tmp_path / "rows.jsonl"), str(ROOT / "demo" / "checkpoint")
    assert (
        main(["--questions", str(squad(tmp_path)), "--window", "45", "--candidates", "4", "--out", rows]) == 0
    )
    small = "--steps 2 --batch 2 --candidates 4 --max-length 64 --judge-context 512".split()
    train = ["train", "--train", rows, "--judge", demo, "--retriever", demo, "--out", str(tmp_path / "run")]
    assert dream.main([*train, *small]) == 0, capsys.readouterr().err[-2000:]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 2


def test_no_question_in_the_text(tmp_path, capsys):
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"_id": "a", "title": "", "text": "Short."}) + "\n")
    assert main(["--from-text", "--corpus", str(path), "--out", str(tmp_path / "r")]) == 2
    assert f"{path}: no questions" in capsys.readouterr().err


def test_too_few_passages_for_a_group(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert main(["--groups", "99", "--corpus", str(corpus(tmp_path)), "--out", str(out)]) == 2
    assert "--groups 99: the corpus has" in capsys.readouterr().err and not out.exists()
