"""
Your own texts from beginning to end: files in, rows out of them, a trained retriever, an answer.

    python demo/own_corpus.py path/to/texts "What do the minutes say about the roof?" --out runs/own
    python demo/own_corpus.py path/to/texts --judge DIR --retriever DIR --steps 1000

1. Every .txt and .md file below the folder becomes a document of OUT/corpus.jsonl; its name is the title.
2. `dream.py mine --from-text` cuts the documents into passages and makes training rows of them.
3. `dream.py train` trains on the rows. Started again, it goes on where it stopped.
4. `tools.search` answers the question from the passages, or asks for questions.

The defaults are the demo's tiny model, which knows nothing but its own small world: with them this is a
picture of the steps, not a retriever. Each command is printed before it runs, to be copied and changed.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import InputError, writing  # noqa: E402


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
    status = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if status:
        sys.exit(status)


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
    parser.add_argument(
        "--recipe", choices=["next", "rest"], default="next", help="of the rows, see dream.py mine"
    )
    parser.add_argument("--steps", default="100", help="of training (default: %(default)s)")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    try:
        number = write_corpus(args.texts, out / "corpus.jsonl")
    except InputError as error:
        print(f"own_corpus.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{out / 'corpus.jsonl'}: {number:,} documents")
    rows, trained = str(out / "rows.jsonl"), str(out / "run")
    corpus = ["--corpus", str(out / "corpus.jsonl"), "--judge", args.judge]
    run("dream.py", "mine", "--from-text", args.recipe, *corpus, "--out", rows)
    if (out / "run" / "settings.json").exists():
        run("dream.py", "train", "--resume", trained)
    else:
        models = ["--judge", args.judge, "--retriever", args.retriever]
        run("dream.py", "train", "--train", rows, *models, "--steps", args.steps, "--out", trained)
    question = [args.question] if args.question else []
    run("-m", "tools.search", *question, "--model", trained, "--corpus", f"{rows}.passages.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
