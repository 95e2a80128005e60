"""Choose the judge's heads, show them as a map, say whether they can teach, and save them; without training.

    python -m tools.heads                                                       the demo
    python -m tools.heads --train rows.jsonl --judge Qwen/Qwen2.5-1.5B --out heads.json

`dream.py train --heads heads.json` then takes them. The flags are those of `train`.
"""

import json
import sys

from data import Rows, check_prompts, shuffled
from dream import Settings, complete, demo_settings, make_reader
from formats.checkpoints import Checkpoint, make_builder
from formats.embedders import hidden_size
from related.qrhead import select_heads
from support.files import check_writable, write_atomic
from support.flags import add_flags, counting, flags_of
from support.launch import ArgumentParser, one_process, pick_device, pick_dtype, run_command
from support.runs import locate
from support.show import print_settings

FLAGS = (
    "train candidates judge judge_template judge_context max_target heads num_heads head_examples "
    "detect_rows calibrate inject_rows document_mass seed judge_batch device dtype"
).split()


def parse_arguments(argv: list[str] | None) -> Settings:
    parser = ArgumentParser("heads", description=__doc__)
    add_flags(parser, Settings, FLAGS)
    parser.add_argument("--out", default="heads.json", metavar="FILE", help="(default: %(default)s)")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    if "train" not in given:
        given = {name: value for name, value in demo_settings().items() if name in FLAGS} | given
    return complete(Settings(**given), parser.error, needed=("judge",))


def choose(settings: Settings) -> None:
    one_process("heads")
    check_writable(settings.out)
    device = pick_device(settings.device)
    rows = Rows(settings.train, settings.candidates)
    aside = [rows[i] for i in shuffled(len(rows), settings.seed)[: settings.head_examples]]
    dtype, reason = pick_dtype(settings.dtype, device, hidden_size(settings.judge))
    checkpoint = Checkpoint(locate(settings.judge), device, dtype)
    how = settings.judge_template, settings.judge_context, settings.max_target
    builder = make_builder(checkpoint.folder, *how)
    check_prompts(rows, builder)
    print_settings(counting(settings, without=flags_of(Settings).keys() - {*FLAGS}), device, dtype, reason)
    reader = make_reader(settings, checkpoint.causal_lm(), builder, device)
    chosen = select_heads(reader, aside, settings.heads, settings.num_heads, settings.judge)
    write_atomic(settings.out, json.dumps(chosen) + "\n")
    print(f"written: {settings.out}")


def main(argv: list[str] | None = None) -> int:
    """The exit status, as `run_command` says."""
    return run_command("heads", lambda: choose(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
