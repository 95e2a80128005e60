"""Files: JSON lines by number, and writes that are whole or not at all."""

from support.files import JsonLines, write_atomic, writing


def test_write_atomic_replaces_and_leaves_nothing_behind(tmp_path):
    write_atomic(tmp_path / "a" / "f", "one")
    write_atomic(tmp_path / "a" / "f", "two")
    assert (tmp_path / "a" / "f").read_text() == "two" and len(list((tmp_path / "a").iterdir())) == 1


def test_json_lines_is_random_access(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(f'{{"i": {i}, "pad": "{"x" * (i % 7)}"}}\n' for i in range(100)))
    lines = JsonLines(path)
    assert [lines[i]["i"] for i in (99, 0, 42)] == [99, 0, 42] and len(lines) == 100


def test_two_processes_may_write_the_same_file(tmp_path, monkeypatch):
    """Each writes its own whole copy; the last one stays, and nothing else."""
    path = tmp_path / "key.json"
    with writing(path) as first:
        first.write("first")
        monkeypatch.setattr("os.getpid", lambda: -1)
        with writing(path) as second:
            second.write("second")
        assert path.read_text() == "second"
        first.write(" of two")
    assert path.read_text() == "first of two" and list(tmp_path.iterdir()) == [path]
