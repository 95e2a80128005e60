"""A dataclass as flags: types, limits, --help's sections, and what an earlier settings.json may hold."""

import json
from dataclasses import dataclass

import pytest
import torch

from support import launch
from support.files import InputError
from support.flags import add_flags, flag, read_settings, resumed, sections
from support.launch import CPU, ArgumentParser, pick_device, pick_dtype


@dataclass
class Settings:
    train: str = flag("", "training rows", "what is learnt from", "FILE")
    which: str = flag("top", "which heads", choices=("top", "all"))
    test: list[str] = flag([], "datasets", "where it is tested")
    targets: list[str] = flag(["q_proj", "k_proj"], "projections")
    steps: int = flag(1000, "optimizer steps")
    seed: int = flag(0, "of everything drawn", least=0)
    warmup: float = flag(0.1, "part of the steps", below=1)
    temperature: float = flag(0.0, "tau", above=True)
    full: bool = flag(False, "all weights")
    rows: int = 0


def make_parser(only=None):
    parser = ArgumentParser("own.py", gone={"--refresh": "was removed: it did harm"})
    add_flags(parser, Settings, only)
    return parser


def parse(text, only=None):
    return {k: v for k, v in vars(make_parser(only).parse_args(text.split())).items() if v is not None}


@pytest.mark.parametrize(
    "text, given",
    [
        ("", {}),  # what is not given is no default: it must not overrule a run's own settings
        ("--train a.jsonl --which all", {"train": "a.jsonl", "which": "all"}),
        ("--steps 3 --seed 0 --warmup 0", {"steps": 3, "seed": 0, "warmup": 0.0}),
        ("--temperature 1e-4 --full", {"temperature": 1e-4, "full": True}),
        ("--no-full --test", {"full": False, "test": []}),
        ("--test a b --targets q_proj", {"test": ["a", "b"], "targets": ["q_proj"]}),
    ],
)
def test_a_flag_has_its_defaults_type(text, given):
    assert parse(text) == given
    assert {name: type(value) for name, value in parse(text).items()} == {
        k: type(v) for k, v in given.items()
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("--steps 0", "--steps: 0 is not at least 1 and below 1e+09"),
        ("--steps 1000000000", "1000000000 is not at least 1 and below"),
        ("--steps 1.5", "--steps: invalid int value: '1.5'"),
        ("--seed -1", "--seed: -1 is not at least 0"),
        ("--warmup 1", "--warmup: 1 is not at least 0 and below 1"),
        ("--warmup nan", "--warmup: nan is not at least 0"),
        ("--temperature 0", "--temperature: 0 is not above 0"),
        ("--temperature inf", "--temperature: inf is not above 0"),
        ("--which best", "--which: invalid choice: 'best'"),
        ("--targets", "--targets: expected at least one argument"),
        ("--rows 3", "unrecognized arguments: --rows"),
        ("--step 3", "unrecognized arguments: --step; did you mean --steps?"),
        ("--refresh 3", "--refresh was removed: it did harm"),
        ("--refresh=3", "--refresh was removed: it did harm"),
    ],
)
def test_what_a_flag_does_not_take_is_told(text, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse(text)
    *_, line = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and line.startswith("own.py: error: ") and message in line


def test_sections_hold_until_the_next_begins():
    first, second = ["train", "which"], ["test", "targets", "steps", "seed", "warmup", "temperature", "full"]
    assert sections(Settings) == {"what is learnt from": first, "where it is tested": second}
    told = make_parser().format_help().partition("options:")[2]
    assert told.index("what is learnt from:") < told.index("--which {top,all}") < told.index("--test")
    assert "--train FILE" in told and "optimizer steps (default: 1000)" in told and "--rows" not in told


def test_a_command_may_take_some_flags_only(capsys):
    assert parse("--steps 3", only=["steps", "seed"]) == {"steps": 3}
    told = make_parser(["steps"]).format_help()
    assert "--steps N" in told and "what is learnt from" not in told
    with pytest.raises(SystemExit):
        parse("--full", only=["steps", "seed"])


def written(folder, **settings):
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder / "settings.json"


def test_an_earlier_versions_settings(tmp_path, capsys):
    """null stood for "not given"; of the flags that are gone, those that were set are told."""
    path = written(tmp_path, command="train", steps=3, rows=9, temperature=1, which=None, test=["a"])
    assert read_settings(path, Settings) == {"steps": 3, "rows": 9, "temperature": 1, "test": ["a"]}
    assert capsys.readouterr().out == ""
    path = written(tmp_path, steps=3, isolate=True, refresh=None, own=False, every=5)
    assert read_settings(path, Settings) == {"steps": 3}
    told = f"note: {path}: settings that mean nothing any more: isolate=True, every=5\n"
    assert capsys.readouterr().out == told


@pytest.mark.parametrize(
    "name, value",
    [
        ("steps", "3"),
        ("steps", 1.5),
        ("steps", True),
        ("warmup", "0.1"),
        ("warmup", False),
        ("full", 1),
        ("train", 3),
        ("which", "best"),
        ("test", "a"),
        ("test", [3]),
        ("rows", "many"),
    ],
)
def test_a_setting_of_another_type_is_refused(tmp_path, name, value):
    path = written(tmp_path, **{name: value})
    with pytest.raises(InputError) as error:
        read_settings(path, Settings)
    assert str(error.value) == f"{path}: {name} is {value!r}, not what the flag gives"


def test_flags_beside_a_resumed_runs_settings(tmp_path):
    """What says the same is no change; what differs must be asked for."""
    written(tmp_path, steps=3, test=["a"])
    own = {"steps": 3, "test": ["a"]}
    assert resumed(tmp_path, Settings, {"steps": 3, "seed": 0, "train": "b"}, ["train"]) == own
    with pytest.raises(
        InputError, match=r"differs from its settings: --steps 6 \(was 3\), --full True \(was"
    ):
        resumed(tmp_path, Settings, {"steps": 6, "full": True}, ["train"])
    assert resumed(tmp_path, Settings, {"steps": 6, "change_settings": True}, ["change_settings"]) == own


def test_pick_device_and_dtype():
    assert (
        pick_device("cpu").type == "cpu" and pick_device(CPU) is CPU and pick_device() == pick_device("auto")
    )
    assert pick_dtype("auto", CPU)[0] is pick_dtype(None, CPU)[0] is torch.float32
    assert pick_dtype("auto", CPU, width=511)[0] is torch.float32  # not measured
    assert pick_dtype("bfloat16", CPU)[0] is pick_dtype(torch.bfloat16, CPU)[0] is torch.bfloat16
    with pytest.raises(InputError, match="--dtype int8"):
        pick_dtype("int8", CPU)
    with pytest.raises(InputError, match="--device nonsense"):
        pick_device("nonsense")


@pytest.mark.parametrize("gain, dtype", [(2.24, torch.bfloat16), (1.4, torch.float32)])
def test_a_cpu_finds_out_whether_bfloat16_is_faster(gain, dtype, monkeypatch):
    """For real networks only: small ones, and what is asked for, stay as they are."""
    monkeypatch.setattr(launch, "bfloat16_gain", lambda: gain)
    assert pick_dtype("auto", CPU, 512) == (dtype, f"the CPU multiplies bfloat16 {gain:.1f}x as fast")
    assert pick_dtype("float32", CPU, 4096)[0] is torch.float32
    assert pick_dtype(None, CPU, 128)[0] is torch.float32


def test_the_gain_is_a_ratio_that_leaves_the_threads_alone():
    threads = torch.get_num_threads()
    assert 1e-4 < launch.bfloat16_gain() < 1e4
    assert torch.get_num_threads() == threads
