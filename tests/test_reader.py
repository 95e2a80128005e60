"""The reader of real text: what it practises on, and that training saves, loads and resumes."""

import json
import random

import pytest
import torch

from data import InputError, PromptBuilder, Row
from demo import reader
from model import Checkpoint

CPU = torch.device("cpu")
NAMES = ("Oslo", "Lima", "Quito", "Accra", "Hanoi", "Minsk", "Tunis", "Dakar")
SHAPE = {
    **reader.CONFIG,
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def passage_text(number: int) -> str:
    name = NAMES[number % len(NAMES)]
    return (
        f"The harbour of {name} was opened in {1800 + number} by captain Vane{number}. "
        f"Its lighthouse, {30 + number} metres tall, burns whale oil in every winter storm."
    )


@pytest.fixture
def files(tmp_path):
    """A corpus of 24 passages; the last 4 are the dev split's."""
    texts = {
        "corpus": [{"_id": f"p{i}", "title": f"Harbour {i}", "text": passage_text(i)} for i in range(24)],
        "train": [
            {
                "query": f"who opened harbour {i}?",
                "answers": [f"captain Vane{i}"],
                "passage_id": f"p{i}",
            }
            for i in range(20)
        ]
        + [{"query": "is it far?", "answers": ["it depends"], "passage_id": "p5"}],
        "dev": [
            {
                "query": "how tall?",
                "answers": ["metres"],
                "passage_id": f"p{i}",
            }
            for i in range(20, 24)
        ],
        "plain": [
            {"title": f"Harbour {i}", "text": f"Plainword{i} " + passage_text(40 + i) * 3}
            for i in range(18, 24)
        ],
    }
    paths = {}
    for name, items in texts.items():
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(item) + "\n" for item in items))
    return paths


@pytest.fixture
def library(files):
    library = reader.read_library(files["corpus"], files["train"], files["dev"], files["plain"], held=10)
    library.common = {"the", "of", "in", "by", "was", "its", "every"}
    return library


@pytest.fixture
def tokenizer(library):
    tokenizer = reader.train_tokenizer(library, SHAPE["vocab_size"])
    library.words = reader.single_words(tokenizer)
    return tokenizer


def test_cloze_answer_stands_in_the_text_and_not_in_the_query():
    rng, text = random.Random(0), passage_text(3)
    drawn = [
        reader.draw_cloze(rng, text, {"the", "of"}, worn) for worn in (0.0, 0.5, 1.0) for _ in range(200)
    ]
    drawn = [each for each in drawn if each]
    assert len(drawn) > 100 and len({answer for _, answer in drawn}) > 20
    for query, answer in drawn:
        assert answer in text
        assert answer.lower() not in query.lower()
        assert not {answer.split()[0].lower(), answer.split()[-1].lower()} & {"the", "of"}


def test_nothing_of_the_dev_split_is_read(library, files):
    read = library.passages + library.plain + library.held
    text = " ".join(" ".join(passage.sentences) for passage in read)
    for number in range(20):
        assert f"Vane{number}." in text
    for number in range(20, 24):
        assert f"Vane{number}." not in text
        assert f"Plainword{number}" not in text  # an article about a title of the dev split
    assert "Plainword18" in text and "how tall?" not in str(read)
    assert "is it far?" not in str(read)  # its answer does not stand in the passage
    assert len(library.held) == 2 and not {id(p) for p in library.held} & {id(p) for p in library.passages}


def test_a_passage_of_both_splits_is_left_out(files):
    with open(files["dev"], "a") as file:
        file.write(json.dumps({"query": "x", "answers": ["y"], "passage_id": "p0"}) + "\n")
    library = reader.read_library(files["corpus"], files["train"], files["dev"], None)
    assert not any("Vane0." in " ".join(p.sentences) for p in library.passages + library.plain + library.held)


def test_answers_are_a_text_or_a_list_of_texts(files, tmp_path, capsys):
    lines = files["train"].read_text().splitlines()
    for number, answers in ((0, "captain Vane0"), (1, 5)):
        lines[number] = json.dumps(json.loads(lines[number]) | {"answers": answers})
        files["train"].write_text("\n".join(lines) + "\n")
        if number == 0:
            library = reader.read_library(files["corpus"], files["train"], files["dev"], None, held=10)
            asked = [answer for p in library.passages + library.held for _, answer in p.questions]
            assert "captain Vane0" in asked and "c" not in asked
    assert reader.main(arguments(files, tmp_path / "out")) == 2
    told = "line 2: 'answers' must be a text or a list of texts\n"
    assert capsys.readouterr().err.endswith(told)


def test_empty_passages_are_left_out(files):
    corpus = [json.loads(line) for line in files["corpus"].read_text().splitlines()]
    corpus[3]["text"] = " \n "
    files["corpus"].write_text("".join(json.dumps(passage) + "\n" for passage in corpus))
    files["plain"].write_text(json.dumps({"text": f"a\n{' ' * 300}\n{passage_text(7) * 3}"}) + "\n")
    library = reader.read_library(files["corpus"], files["train"], files["dev"], files["plain"])
    assert len(library.plain) == 1 and all(p.sentences for p in library.passages + library.held)


def test_measuring_leaves_out_what_no_question_can_be_drawn_from(tokenizer, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    network = reader.CausalLM(reader.Config.read(tmp_path / "config.json"))
    reader.initialise(network, 0)
    short = reader.Passage("a", ["Too short."], [("how?", "short")])
    long = reader.Passage("b", reader.split(passage_text(1)), [("who?", "captain Vane1")])
    assert reader.measure(network, tokenizer, [short, long], 4).keys() == {"real", "cloze"}
    assert reader.measure(network, tokenizer, [short, short], 4).keys() == {"real"}


@pytest.mark.parametrize("done", [0.1, 0.5, 0.9])
def test_contexts_are_the_judges_own_prompts(library, tokenizer, done):
    """Up to the first answer, a context is token by token what PromptBuilder makes of the same row."""
    builder = PromptBuilder(tokenizer, 4096)
    for seed in range(20):
        pieces = reader.draw_context(random.Random(seed), library, done)
        kinds = [kind for _, kind in pieces]
        first = kinds.index(reader.QUESTION)
        documents = [text for text, kind in pieces if kind == reader.DOCUMENT]
        query = pieces[first][0].removeprefix("Question: ").removesuffix("\nAnswer:")
        answer = pieces[first + 1][0].removeprefix(" ")
        ids = [token for text, _ in pieces[: first + 2] for token in tokenizer.encode(text).ids]
        blocks = [
            reader.Document("", text.removeprefix("Document: ").removesuffix("\n\n")) for text in documents
        ]
        assert ids == builder.build([Row(0, query, answer, blocks, None)])[0].input_ids
        assert any(answer in text for text in documents)


def test_answers_mask_covers_exactly_the_targets(library, tokenizer, monkeypatch):
    drawn = []
    draw_context = reader.draw_context

    def spy(*arguments):
        drawn.append(draw_context(*arguments))
        return drawn[-1]

    monkeypatch.setattr(reader, "draw_context", spy)
    batches = reader.draw_batches(random.Random(1), library, tokenizer, 0.8, 3000)
    expected = sorted("".join(t for t, kind in pieces if kind == reader.ANSWER) for pieces in drawn)
    masked = [
        tokenizer.decode(row[kind == reader.ANSWER].tolist())
        for ids, kinds in batches
        for row, kind in zip(ids, kinds, strict=True)
    ]
    assert sorted(masked) == expected and len(expected) > 3
    total = sum(len(tokenizer.encode(text).ids) for pieces in drawn for text, _ in pieces)
    assert total < sum(ids.numel() for ids, _ in batches)  # there is padding,
    assert total == sum(int((kinds < 4).sum() - (ids == 0).sum()) for ids, kinds in batches)
    assert all(not kinds[ids == 0].any() for ids, kinds in batches)  # which is never predicted


def test_nonsense_comes_first_and_is_said_again(library, tokenizer):
    pieces = reader.draw_context(random.Random(0), library, 0.0)
    assert [kind for _, kind in pieces] == [reader.DOCUMENT, reader.ANSWER, reader.ANSWER]
    assert len({text for text, _ in pieces}) == 1


def test_first_weights_find_the_word_after_a_word(tmp_path):
    """Before any training: of 20 words said twice, the next is foretold more often than chance, 1 in 19."""
    (tmp_path / "config.json").write_text(json.dumps({**reader.CONFIG, "vocab_size": 4000}))
    network = reader.CausalLM(reader.Config.read(tmp_path / "config.json"))
    reader.initialise(network, 0)
    words = torch.randint(4000, (48, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = network.lm_head(network.model(words.repeat(1, 2))[:, 20:-1])  # (B, 19, V)
    logits = logits.gather(2, words[:, None].expand(-1, 19, -1))  # (B, 19, 20), of the words said
    logits.diagonal(dim1=1, dim2=2).fill_(-torch.inf)  # a tied network foretells the word itself
    assert (logits.argmax(-1) == torch.arange(1, 20)).float().mean() > 0.09


def arguments(files, out, *more: str) -> list[str]:
    paths = [f"--{name}={files[name]}" for name in ("corpus", "train", "dev")]
    return [*paths, f"--text={files['plain']}", f"--out={out}", "--tokens=600", *more]


def test_training_saves_loads_and_resumes_to_the_same_weights(library, files, tmp_path):
    whole = reader.parse_arguments(arguments(files, tmp_path / "whole", "--steps=3"))
    folder = reader.run(whole, library, SHAPE)
    assert folder.name == "step-00003"
    checkpoint = Checkpoint(folder, CPU, torch.float32)
    assert checkpoint.config.vocab_size == 400 and len(list(tmp_path.glob("whole/*.tmp"))) == 0
    checkpoint.causal_lm()
    report = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text())
    assert report["step"] == 3 and report["tokens"] > 500 and report["real"]["random"] > 0

    parts = reader.parse_arguments(arguments(files, tmp_path / "parts", "--steps=3", "--minutes=0.00001"))
    steps = [reader.run(parts, library, SHAPE).name for _ in range(3)]
    assert steps == ["step-00001", "step-00002", "step-00003"]
    resumed = Checkpoint(tmp_path / "parts" / "step-00003", CPU, torch.float32)
    assert all(torch.equal(resumed.tensors[name], t) for name, t in checkpoint.tensors.items())


def test_bad_input_is_one_line(files, tmp_path, capsys):
    with open(files["train"], "a") as file:
        file.write(json.dumps({"query": "x", "answers": ["y"], "passage_id": "nowhere"}) + "\n")
    assert reader.main(arguments(files, tmp_path / "out")) == 2
    assert "line 22: passage_id 'nowhere' is not in" in capsys.readouterr().err


def test_a_state_of_other_settings_is_refused(library, files, tmp_path):
    given = arguments(files, tmp_path / "out", "--steps=1")
    reader.run(reader.parse_arguments(given), library, SHAPE)
    with pytest.raises(InputError, match="choose another --out"):
        reader.run(reader.parse_arguments([*given, "--seed=1"]), library, SHAPE)


@pytest.mark.parametrize("content", [b"garbage", b"", b"PK\x03\x04", None])
def test_a_damaged_state_is_told(tmp_path, content):
    path = tmp_path / "state.pt"
    torch.save([], path) if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=r"state.pt: cannot be read \(\w+\); delete it or choose another"):
        reader.read_state(path, {})
