"""
Your own texts from beginning to end: files in, rows out of them, a trained retriever, an answer.

    python demo/own_corpus.py path/to/texts "What do the minutes say about the roof?" --out runs/own
    python demo/own_corpus.py path/to/texts --judge DIR --retriever DIR --steps 1000

1. Every .txt and .md file below the folder becomes a document of OUT/corpus.jsonl; its name is the title.
2. `tools.mine --from-text` cuts the documents into passages and makes training rows of them.
3. `dream.py train` trains on the rows. Ctrl-C ends it with the step; the same command goes on from there.
4. `tools.search` answers the question from the passages, or asks for questions.

The defaults are the demo's tiny model, which knows nothing but its own small world: with them this is a
picture of the steps, not a retriever. Each command is printed before it runs, to be copied and changed.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support.files import InputError, JsonLines, read_json, writing  # noqa: E402
from support.launch import run_command  # noqa: E402


def write_corpus(texts: Path, path: Path) -> int:
    """The text files below a folder as a corpus.jsonl; how many there are. Raises InputError."""
    files = sorted(file for file in texts.rglob("*") if file.suffix in (".txt", ".md") and file.is_file())
    if not files:
        raise InputError(f"{texts}: no .txt or .md files there")
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as out:
        for file in files:
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{file}: not UTF-8 text ({error})") from error
            name = str(file.relative_to(texts))
            out.write(json.dumps({"_id": name, "title": file.stem.replace("_", " "), "text": text}) + "\n")
    return len(files)


def run(*command: str) -> None:
    """Run a command of this project in its root; its exit status is ours where it fails."""
    print("\n$ python " + shlex.join(command), flush=True)
    # A Ctrl-C reaches the command too, which may have to save: it decides when and how this ends.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    status = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    signal.signal(signal.SIGINT, before)
    if status:
        sys.exit(status)


def find(name: str) -> str:
    """A folder from the caller's place, as commands run in the root; a name on the hub as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def check_begun(run: Path, rows: Path, flags: dict) -> None:
    """What was begun goes on as it was begun. Raises InputError where something else is wanted."""
    begun = read_json(run / "settings.json")
    other = [f"--{name} {begun.get(name)}" for name, value in flags.items() if begun.get(name) != value]
    same = begun.get("rows_fingerprint") == JsonLines(rows).fingerprint
    if other := other + ["other texts"] * (not same):
        told = f"was begun with {', '.join(other)}; delete it to begin anew, or choose another --out"
        raise InputError(f"{run}: {told}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=Path, help="folder of .txt and .md files")
    parser.add_argument("question", nargs="?", help="asked at the end; without it, questions are asked for")
    parser.add_argument("--out", type=Path, default=Path("runs/own"), help="folder (default: %(default)s)")
    demo = str(ROOT / "demo" / "checkpoint")
    parser.add_argument("--judge", default=demo, help="frozen language model (default: the demo's)")
    parser.add_argument(
        "--retriever", default=demo, help="what the retriever starts from (default: likewise)"
    )
    parser.add_argument("--steps", type=int, default=100, help="of training (default: %(default)s)")
    args = parser.parse_args(argv)
    out, flags = args.out.resolve(), {"judge": find(args.judge), "retriever": find(args.retriever)}
    flags |= {"steps": args.steps}
    corpus, rows, trained = str(out / "corpus.jsonl"), str(out / "rows.jsonl"), str(out / "run")

    def work() -> None:
        number = write_corpus(args.texts, Path(corpus))
        print(f"{corpus}: {number:,} documents")
        mined = ["--corpus", corpus, "--judge", flags["judge"], "--out", rows]
        run("-m", "tools.mine", "--from-text", *mined)
        if (out / "run" / "settings.json").exists():
            check_begun(out / "run", Path(rows), flags)
            run("dream.py", "train", "--resume", trained)
        else:
            begun = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
            run("dream.py", "train", "--train", rows, *begun, "--out", trained)
        question = [args.question] if args.question else []
        run("-m", "tools.search", *question, "--model", trained, "--corpus", f"{rows}.passages.jsonl")

    return run_command("own_corpus.py", work)


if __name__ == "__main__":
    sys.exit(main())
