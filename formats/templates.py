"""The chat formats of instruct judges."""

from pathlib import Path

from data import TEMPLATE
from support.files import InputError

_TASK = "Read the documents and answer the question with a few words only.\n\n{documents}Question: {query}"


_CHATML = f"<|im_start|>user\n{_TASK}<|im_end|>\n<|im_start|>assistant\n"


# The chat formats of instruct judges, as their own templates write a first turn; the builder puts the BOS.
TEMPLATES = {
    "plain": TEMPLATE,
    "qwen": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        f"{_CHATML}{{target}}"
    ),
    "qwen3": f"{_CHATML}<think>\n\n</think>\n\n{{target}}",
    "llama": (
        "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{_TASK}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{{target}}"
    ),
}


def read_template(name: str) -> str:
    """A judge template: one of TEMPLATES by its name, a file's content, or the text itself."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if "{documents}" in name:
        return name
    try:
        return Path(name).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, ValueError) as error:
        choices = ", ".join(TEMPLATES)
        raise InputError(f"--judge-template {name}: not {choices}, and not a text file ({error})") from error
