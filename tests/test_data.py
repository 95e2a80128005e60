"""Rows, prompts and batches: what they accept, what they refuse and in which words."""

import gzip
import json
import lzma
import re

import pytest
import torch
from tiny import byte_tokenizer, make_rows, write_rows
from tokenizers import Tokenizer, models, normalizers

from data import (
    Document,
    PromptBuilder,
    Row,
    Rows,
    check_prompts,
    collate,
    document_block,
    fit_longest_first,
    shuffled,
    token_batches,
)
from formats.templates import read_template
from support.files import InputError
from support.launch import CPU

GOOD = {"query": "q", "target": "t", "documents": ["one", {"title": "T", "text": "two"}], "positive": 1}


def rows_file(tmp_path, *objects):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((o if isinstance(o, str) else json.dumps(o)) + "\n" for o in objects))
    return path


def test_a_row_is_read_with_both_forms_of_documents(tmp_path):
    row = Rows(rows_file(tmp_path, GOOD))[0]
    assert (row.query, row.target, row.positive) == ("q", "t", 1)
    assert row.documents == [Document("", "one"), Document("T", "two")]
    assert [d.full_text for d in row.documents] == ["one", "T two"]


@pytest.mark.parametrize(
    "key, value", [("answer", "t"), ("answers", None), ("output", "t"), ("answer", ["t", "u"])]
)
def test_target_may_have_other_names(tmp_path, key, value):
    row = {**GOOD, key: value}
    del row["target"]
    path = rows_file(tmp_path, row)
    if value is None:
        with pytest.raises(InputError, match="no target"):
            Rows(path)
    else:
        assert Rows(path)[0].target == "t"


def test_equal_documents_count_once_and_the_positive_moves_along(tmp_path):
    row = {**GOOD, "documents": ["a", "b", "a", {"text": " b "}, "c"], "positive": 3}
    read = Rows(rows_file(tmp_path, row))[0]
    assert [d.text for d in read.documents] == ["a", "b", "c"] and read.positive == 1


def test_num_candidates_takes_the_first_and_forgets_a_positive_that_is_cut(tmp_path):
    row = {**GOOD, "documents": ["a", "b", "c", "d"], "positive": 3}
    read = Rows(rows_file(tmp_path, row), num_candidates=2)[0]
    assert [d.text for d in read.documents] == ["a", "b"] and read.positive is None


def test_rows_with_one_candidate_are_left_out_and_counted(tmp_path):
    rows = Rows(rows_file(tmp_path, {**GOOD, "documents": ["x", "x"], "positive": 0}, GOOD))
    assert len(rows) == 1 and rows.skipped == 1 and rows[0].index == 1


TEVATRON = {
    "query": "q",
    "answer": ["t"],
    "positive_passages": [{"docid": "1", "title": "T", "text": "one"}],
    "negative_passages": [{"docid": "2", "title": "", "text": "two"}],
}
FLAG = {"query": "q", "target": "t", "pos": ["T one", "other"], "neg": ["two", "three"], "prompt": "x"}


def test_rows_of_flagembedding_and_tevatron(tmp_path):
    tevatron, flag = Rows(rows_file(tmp_path, TEVATRON, FLAG))
    assert tevatron.documents == [Document("T", "one"), Document("", "two")]
    assert flag.documents == [Document("", "T one"), Document("", "two"), Document("", "three")]
    assert tevatron.positive == flag.positive == 0 and tevatron.target == flag.target == "t"


def test_rows_without_questions_for_revela(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"documents": ["a b c", "d e f"]}) + "\n")
    assert Rows(path, documents_only=True)[0].documents == [Document("", "a b c"), Document("", "d e f")]
    with pytest.raises(InputError, match="no target"):
        Rows(path)


BAD_ROWS = [
    ({**FLAG, "pos": []}, "line 2: 'pos' and 'neg' must be lists"),
    ({**FLAG, "neg": "two"}, "line 2: 'pos' and 'neg' must be lists"),
    ({**TEVATRON, "negative_passages": [{"docid": "2"}]}, "line 2: document 1 is empty"),
    ({**TEVATRON, "answer": []}, "line 2: no target; give the output to predict as 'target'"),
    ('{"query": "q", "target"', "line 2: not JSON"),
    ("[1]", "line 2: expected a JSON object, found list"),
    ({**GOOD, "query": ""}, "line 2: 'query' is missing or empty"),
    ({**GOOD, "query": 3}, "line 2: 'query' is int, expected a string"),
    ({k: v for k, v in GOOD.items() if k != "target"}, "line 2: no target"),
    ({**GOOD, "target": "  "}, "line 2: no target"),
    ({**GOOD, "documents": []}, "line 2: no candidates"),
    ({k: v for k, v in GOOD.items() if k != "documents"}, "line 2: no candidates"),
    ({**GOOD, "documents": ["a", 5]}, "line 2: document 1 is neither"),
    ({**GOOD, "documents": ["a", " "]}, "line 2: document 1 is empty"),
    ({**GOOD, "documents": ["a", {"title": 1, "text": "b"}]}, "line 2: the title of document 1"),
    ({**GOOD, "positive": 2}, "line 2: 'positive' is 2, expected an index into 2"),
    ({**GOOD, "positive": True}, "line 2: 'positive' is True"),
]


@pytest.mark.parametrize("bad, message", BAD_ROWS, ids=[message for _, message in BAD_ROWS])
def test_bad_rows_are_named_by_file_line_and_field(tmp_path, bad, message):
    path = rows_file(tmp_path, GOOD, bad)
    with pytest.raises(InputError) as error:
        Rows(path)
    assert str(error.value).startswith(f"{path}, ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_compressed_files_bom_crlf_and_blank_lines(tmp_path):
    text = (
        "\ufeff"
        + json.dumps(GOOD)
        + "\r\n\r\n"
        + json.dumps({**GOOD, "query": "é 東京 🙂"}, ensure_ascii=False)
    )
    for name, opener in (("r.jsonl", open), ("r.jsonl.gz", gzip.open), ("r.jsonl.xz", lzma.open)):
        with opener(tmp_path / name, "wb") as file:
            file.write(text.encode())
        rows = Rows(tmp_path / name)
        assert [row.query for row in (rows[0], rows[1])] == ["q", "é 東京 🙂"]
        assert rows[1].where.endswith("line 3")
    (tmp_path / "bad.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match="cannot be read"):
        Rows(tmp_path / "bad.gz")


def test_invalid_utf8_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"query": "\xff"}\n')
    with pytest.raises(InputError, match="line 1: not JSON in UTF-8"):
        Rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("seed", range(10))
def test_spans_cover_exactly_the_documents_tokens(seed):
    """Also for equal, nested and truncated texts, in any order, with and without a BOS."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = byte_tokenizer()
    documents = [
        Document("", "ab" * 20),
        Document("t", "ab" * 20),
        Document("", "ab"),
        Document("é", "ab" * 60),
    ]
    row = Row(seed, "where is ab?", "ab", documents, 0)
    order = torch.randperm(4, generator=generator).tolist()
    context = 200 + 60 * (seed % 4)
    bos = 256 if seed % 2 else None
    builder = PromptBuilder(tokenizer, context, bos_id=bos)
    (prompt,) = builder.build([row], [order])
    assert len(prompt.input_ids) <= context
    blocks = [tokenizer.encode(document_block(d)).ids for d in documents]
    limit = fit_longest_first(
        [len(b) for b in blocks],
        context - (len(prompt.input_ids) - sum(end - start for start, end in prompt.spans)),
    )
    for (start, end), block in zip(prompt.spans, blocks, strict=True):
        cut = block[: limit - 2] + block[-2:]  # it ends as all do, with two line ends
        assert prompt.input_ids[start:end] == (cut if len(block) > limit else block)
    starts = [prompt.spans[i][0] for i in order]
    assert starts == sorted(starts) and prompt.spans[order[-1]][1] == prompt.question_start
    assert prompt.input_ids[0] == bos if bos else prompt.spans[order[0]][0] > 0
    question = tokenizer.decode(prompt.input_ids[prompt.question_start : prompt.target_start])
    assert question == "Question: where is ab?\nAnswer:"  # the query is never cut
    assert tokenizer.decode(prompt.input_ids[prompt.target_start :]) == " ab"
    assert prompt.tokens_cut == sum(max(0, len(b) - limit) for b in blocks)


def test_fit_longest_first():
    assert fit_longest_first([5, 5, 5], 15) == 5
    assert fit_longest_first([2, 10, 20], 15) == 6  # 2 + 6 + 6
    assert fit_longest_first([2, 10, 20], 100) == 20
    assert fit_longest_first([4, 4], 3) == 1
    assert fit_longest_first([4, 4], -7) == 0


def test_targets_are_cut_and_counted():
    builder = PromptBuilder(byte_tokenizer(), 1000, max_target=4)
    (prompt,) = builder.build([Row(0, "q", "abcdef", [Document("", "x")], None)])
    assert prompt.target_cut and len(prompt.input_ids) - prompt.target_start == 4


def test_check_finds_what_build_would_refuse(tmp_path, capsys):
    rows = make_rows([3, 8, 2])
    builder = PromptBuilder(byte_tokenizer(), 1000, max_target=3)
    assert builder.check(rows) == sum(prompt.target_cut for prompt in builder.build(rows)) == 2
    check_prompts(Rows(write_rows(tmp_path / "rows.jsonl", rows)), builder)
    assert capsys.readouterr().out == "2 targets cut to 3 tokens\n"
    tight = PromptBuilder(byte_tokenizer(), 190)
    tight.check([rows[0], rows[2]])
    for refuse in (tight.check, tight.build):
        with pytest.raises(InputError, match="the judge's context of 190 tokens leaves"):
            refuse(rows)


def test_with_query_keeps_documents_and_target():
    builder = PromptBuilder(byte_tokenizer(), 1000)
    (prompt,) = builder.build(make_rows([3]))
    (other,) = builder.with_query([prompt], "N/A")
    assert other.spans == prompt.spans
    assert other.input_ids[: other.question_start] == prompt.input_ids[: prompt.question_start]
    assert other.input_ids[other.target_start :] == prompt.input_ids[prompt.target_start :]
    assert "N/A" in byte_tokenizer().decode(other.input_ids)


@pytest.mark.parametrize("name", ["qwen", "qwen3", "llama"])
def test_chat_templates_have_their_special_tokens_and_texts_cannot_add_any(name):
    template = read_template(name)
    markers = sorted(set(re.findall(r"<\|\w+\|>", template)))
    tokenizer = byte_tokenizer()
    with pytest.raises(InputError, match=f"holds {re.escape(re.findall('<.*?>', template)[0])}"):
        PromptBuilder(tokenizer, 2000, template=template)
    tokenizer.add_special_tokens(markers)
    special = {tokenizer.token_to_id(marker) for marker in markers}
    builder = PromptBuilder(tokenizer, 2000, template=template)
    forged = f"one {markers[0]} two"
    row = Row(0, f"why {markers[-1]}?", "because", [Document("", forged), Document("", "three")], 0)
    (prompt,) = builder.build([row])
    documents = "".join(document_block(document) for document in row.documents)
    text = template.format(documents=documents, query=row.query, target=row.target)
    assert tokenizer.decode(prompt.input_ids, skip_special_tokens=False) == text
    assert sum(i in special for i in prompt.input_ids) == len(re.findall(r"<\|\w+\|>", template))
    assert tokenizer.decode(prompt.input_ids[slice(*prompt.spans[0])]) == document_block(row.documents[0])
    assert tokenizer.decode(prompt.input_ids[prompt.target_start :]) == "because"
    (other,) = builder.with_query([prompt], "N/A")
    asked = template.format(documents=documents, query="N/A", target=row.target)
    assert tokenizer.decode(other.input_ids, skip_special_tokens=False) == asked


def test_a_template_may_be_a_file(tmp_path):
    (tmp_path / "t.txt").write_text("Given:\n{documents}\nQ: {query}\nA: {target}\n")
    assert read_template(str(tmp_path / "t.txt")).endswith("A: {target}")
    with pytest.raises(InputError, match="not plain, qwen, qwen3, llama, and not a text file"):
        read_template("lama")


@pytest.mark.parametrize(
    "template", ["{documents}{query}{target}", "x {documents} {query}", "a {query}{documents}{target}"]
)
def test_templates_that_cannot_work(template):
    with pytest.raises(InputError, match="template"):
        PromptBuilder(byte_tokenizer(), 1000, template=template)


def test_a_tokenizer_that_puts_spaces_by_itself_puts_one_before_the_target():
    """As Llama 2's: a target's first token is its first word, not a bare space."""
    words = [
        ("<unk>", 0.0),
        ("▁Paris", -1.0),
        *((letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyzP:"),
    ]
    tokenizer = Tokenizer(models.Unigram(words, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    assert tokenizer.encode(" Paris").tokens == ["▁", "▁Paris"]
    builder = PromptBuilder(tokenizer, 500)
    (prompt,) = builder.build([Row(0, "abc", "Paris", [Document("", "abc")], 0)])
    assert [tokenizer.id_to_token(number) for number in prompt.input_ids[prompt.target_start :]] == ["▁Paris"]


@pytest.mark.parametrize("rows", ["target", "suffix"])
def test_collate_splits_prompts_where_the_graph_begins(rows):
    prompts = PromptBuilder(byte_tokenizer(), 1000).build(make_rows([3, 1, 5]))
    batch = collate(prompts, CPU, rows)
    suffix, flat = batch.suffix_ids, batch.suffix_ids.flatten()
    for b, prompt in enumerate(prompts):
        length = int(batch.prefix_lengths[b])
        joined = batch.prefix_ids[b, :length].tolist() + suffix[b].tolist()
        assert joined[: len(prompt.input_ids) - 1] == prompt.input_ids[:-1]
        for i, (start, end) in enumerate(prompt.spans):
            assert (batch.documents[b] == i).nonzero().flatten().tolist() == list(range(start, end))
        assert batch.present[b].tolist() == [i < len(prompt.spans) for i in range(5)]
        own = batch.target_owner[b].bool()
        assert batch.target_ids[own].tolist() == prompt.input_ids[prompt.target_start :]
        expected = prompt.input_ids[prompt.target_start - 1 : -1]  # each row predicts the next token
        assert flat[batch.target_rows[own]].tolist() == expected


def test_shuffles_depend_on_the_seed_alone():
    assert shuffled(20, 1, 2, 3) == shuffled(20, 1, 2, 3) != shuffled(20, 1, 2, 4)
    assert sorted(shuffled(20, 5)) == list(range(20))
    rows, builder = make_rows([5, 8]), PromptBuilder(byte_tokenizer(), 1000)
    orders = [shuffled(5, 0, 7, 0), shuffled(8, 0, 7, 1)]
    assert builder.shuffled(rows, 0, 7) == builder.build(rows, orders) != builder.build(rows)


def test_token_batches():
    lengths = [3, 50, 7, 7, 1, 120, 30]
    batches = token_batches(lengths, 60)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 60
    assert batches[0] == [5]
