"""Convert a GGUF checkpoint, as llama.cpp and Ollama read them, to a folder in the Hugging Face layout.

    pip install gguf
    python -m tools.import_gguf SmolLM2-135M-Instruct.Q4_1.gguf --to models/smollm2
    python -m tools.import_gguf Llama-3.2-3B-Instruct-Q8_0.gguf --to models/llama --dtype bfloat16

Run it from the project's root. It reads the families llama, qwen2 and qwen3 with a byte-level BPE tokenizer,
and every tensor type that the gguf package dequantises. The folder holds the weights as llama.cpp computes
with them: what quantisation rounded away does not come back. Only one tensor at a time is in memory.
"""

import argparse
import importlib
import json
import os
import shlex
import shutil
import struct
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from formats.checkpoints import config_json, load_tokenizer, read_config
from model import CausalLM, Config, rope_frequencies
from support.files import InputError, check_writable, write_atomic
from support.launch import ArgumentParser, run_command
from support.show import progress

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
DTYPES = {"float32": (torch.float32, "F32"), "bfloat16": (torch.bfloat16, "BF16")}  # safetensors' names
SIZES = {  # GGUF's names and config.json's; a file may lack those of OPTIONAL
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
OPTIONAL = ("num_key_value_heads", "head_dim", "rope_theta")
TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
SPECIAL, USER_DEFINED = 3, 4  # the token types that are found in a text before it is split

# As Llama 3.1, 3.2 and 3.3 have it. A file holds only what it does to each frequency.
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# A file names how texts are split before BPE; the rules are those of the models' own tokenizer.json.
CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
GPT2 = CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = rf"(?i:{CONTRACTIONS})" + (
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPLITS = {"smollm": (r"\p{N}", GPT2), "llama-bpe": (LLAMA3,), "qwen2": (QWEN2,), "deepseek-r1-qwen": (QWEN2,)}


@dataclass
class Source:
    """A GGUF file: its metadata, and its tensors as the package gives them, mapped from the file."""

    path: Path
    gguf: Any  # the package
    metadata: dict[str, Any]
    tensors: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        if key not in self.metadata:
            raise self.wrong(f"its metadata has no {key}")
        return self.metadata[key]

    def wrong(self, what: str) -> InputError:
        return InputError(f"{self.path}: {what}")

    def weights(self, name: str, rows: int | None = None) -> np.ndarray:
        """A tensor, or its first rows, in float32. Raises InputError for a type that gguf cannot read."""
        tensor = self.tensors[name]
        try:
            return self.gguf.dequantize(tensor.data[:rows], tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise self.wrong(f"tensor {name} has the type {kind}, which gguf does not dequantise") from error


def open_gguf(path: Path) -> Source:
    """Read a file's header. Raises InputError when it is no GGUF file, or the package is missing."""
    try:
        gguf = importlib.import_module("gguf")
    except ImportError as error:
        raise InputError("the package gguf is missing; install it: pip install gguf") from error
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path}: not a GGUF file")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # whatever the package meets in a damaged file
        told = f"gguf cannot read it ({error}): incomplete, or newer than the package"
        raise InputError(f"{path}: {told}") from error
    return Source(path, gguf, metadata, {tensor.name: tensor for tensor in reader.tensors})


def convert_config(source: Source, path: Path, dtype: str) -> Config:
    """Write config.json to `path` and read it back. Raises InputError for a network that is not ours."""
    family, get = source["general.architecture"], source.metadata.get
    if family not in FAMILIES:
        raise source.wrong(f"the architecture is {family!r}; supported: {', '.join(FAMILIES)}")
    if get("split.count", 1) != 1:
        raise source.wrong("is one part of several; join them first: llama-gguf-split --merge")
    if (scaling := get(f"{family}.rope.scaling.type", "none")) != "none":
        raise source.wrong(f"the RoPE scaling {scaling!r} is not supported")
    raw = {"model_type": family, "hidden_act": "silu", "vocab_size": len(source["tokenizer.ggml.tokens"])}
    for key, name in SIZES.items():
        raw[name] = get(f"{family}.{key}") if name in OPTIONAL else source[f"{family}.{key}"]
    ids = {name: get(f"tokenizer.ggml.{key}_token_id") for name, key in TOKENS.items()}
    ends = [ids["eos"], get("tokenizer.ggml.eot_token_id", ids["eos"])]  # of texts, of turns
    ids["eos"] = ends if ends[0] is not None and ends[0] != ends[1] else ends[0]
    raw |= {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")}
    raw["tie_word_embeddings"] = "output.weight" not in source.tensors
    divisors = None
    if "rope_freqs.weight" in source.tensors:
        divisors = torch.tensor(source.weights("rope_freqs.weight"))  # of RoPE's frequencies, (D/2,)
        factor = round(float(divisors.max()), 4)
        raw["rope_scaling"] = {"rope_type": "llama3", "factor": factor, **LLAMA3_SCALING}
    write_atomic(path, json.dumps({key: value for key, value in raw.items() if value is not None}))
    config = read_config(path)
    if get(f"{family}.rope.dimension_count", config.head_dim) != config.head_dim:
        raise source.wrong("RoPE turns only a part of each head, which is not supported")
    if divisors is not None:
        plain = rope_frequencies(replace(config, rope_scaling=None), divisors.device)
        expected = plain / rope_frequencies(config, divisors.device)
        if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
            raise source.wrong("tensor rope_freqs.weight is not Llama 3.1's RoPE scaling")
    write_atomic(path, json.dumps(config_json(config, FAMILIES[family], DTYPES[dtype][0]), indent=1) + "\n")
    return config


def match_tensors(source: Source, config: Config) -> dict[str, str]:
    """Each tensor's name here and in the file, all checked. Raises InputError for one that does not fit."""
    if config.num_hidden_layers > len(source.tensors):  # before so many layers are made
        raise source.wrong(f"has {len(source.tensors)} tensors for {config.num_hidden_layers} layers")
    with torch.device("meta"):
        expected = CausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    families = {name: family for family, name in source.gguf.MODEL_ARCH_NAMES.items()}
    names = source.gguf.get_tensor_name_map(families[config.model_type], config.num_hidden_layers)
    matched = {}
    for name, parameter in expected.items():
        stem, _, kind = name.rpartition(".")
        theirs = matched[name] = f"{names.get_name(stem)}.{kind}"
        if theirs not in source.tensors:
            raise source.wrong(f"tensor {theirs} is missing")
        shape = tuple(reversed(source.tensors[theirs].shape.tolist()))
        if shape != parameter.shape:
            raise source.wrong(f"tensor {theirs} has shape {shape}, expected {tuple(parameter.shape)}")
        source.weights(theirs, rows=1)
    if extra := sorted(set(source.tensors) - set(matched.values()) - {"rope_freqs.weight"}):
        raise source.wrong(f"has a tensor {extra[0]}, which is no part of a {config.model_type} network")
    return matched


def neighbours_to_halves(weights: np.ndarray, heads: int) -> np.ndarray:
    """Reorder each head's rows of q or k, (H D, C): llama.cpp pairs neighbours for RoPE, we pair halves."""
    pairs = weights.reshape(heads, -1, 2, weights.shape[-1])  # (H, D/2, 2, C)
    return pairs.swapaxes(1, 2).reshape(weights.shape)


def convert_weights(source: Source, config: Config, path: Path, dtype: str) -> None:
    """Write the tensors into one safetensors file: a JSON header with their places, then one by one."""
    matched, (kind, code) = match_tensors(source, config), DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, theirs in matched.items():
        shape = source.tensors[theirs].shape.tolist()[::-1]
        begin, end = end, end + int(np.prod(shape)) * kind.itemsize
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    permuted = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, theirs in progress(matched.items(), desc="convert", unit="tensor"):
            weights, part = source.weights(theirs), name.split(".")[-2]
            if config.model_type == "llama" and part in permuted:
                weights = neighbours_to_halves(weights, permuted[part])
            tensor = torch.tensor(weights).to(kind)
            file.write(tensor.view(torch.uint8).numpy().data)


def convert_tokenizer(source: Source, config: Config, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json. Raises InputError for a tokenizer that is not ours."""
    kind, get = source["tokenizer.ggml.model"], source.metadata.get
    split = get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in SPLITS:
        given, known = f"{kind!r}, split by {split!r}", f"'gpt2', split by {', '.join(SPLITS)}"
        raise source.wrong(f"the tokenizer is {given}; supported: {known}")
    tokens, types = source["tokenizer.ggml.tokens"], source["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in source["tokenizer.ggml.merges"]]
    llama3 = SPLITS[split] == (LLAMA3,)
    try:  # a word that is one of Llama 3's tokens needs no merges
        bpe = models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=llama3)
    except Exception as error:  # tokenizers raises a bare Exception
        raise source.wrong(f"its tokens and merges do not fit ({error})") from error
    tokenizer = Tokenizer(bpe)
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[split]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for wanted, add in ((SPECIAL, tokenizer.add_special_tokens), (USER_DEFINED, tokenizer.add_tokens)):
        pairs = zip(tokens, types, strict=False)
        add([AddedToken(token, normalized=False) for token, own in pairs if own == wanted])

    ids = {name: get(f"tokenizer.ggml.{key}_token_id") for name, key in TOKENS.items()}
    for name, number in ids.items():
        if number is not None and number >= len(tokens):
            raise source.wrong(f"{name} is token {number}, the vocabulary has {len(tokens)}")
    asked: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.context}
    asked |= {f"{name}_token": tokens[number] for name, number in ids.items() if number is not None}
    asked["add_bos_token"] = get("tokenizer.ggml.add_bos_token", llama3)  # as llama.cpp has it
    asked["add_eos_token"] = get("tokenizer.ggml.add_eos_token", False)
    asked["clean_up_tokenization_spaces"] = False
    if "tokenizer.chat_template" in source.metadata:
        asked["chat_template"] = source["tokenizer.chat_template"]
    write_atomic(folder / "tokenizer_config.json", json.dumps(asked, indent=1) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    load_tokenizer(folder, config).save(str(folder / "tokenizer.json"))  # with the BOS and EOS asked for


def import_gguf(args: argparse.Namespace) -> None:
    """Everything `main` does, InputError not caught: convert into a folder beside `--to`, rename it."""
    to = Path(args.to).resolve()
    check_writable(to, folder=True)
    if to.is_dir() and any(to.iterdir()):
        raise InputError(f"{to}: is not empty; choose another --to")
    source, temporary = open_gguf(Path(args.file)), to.with_name(f".{to.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        config = convert_config(source, temporary / "config.json", args.dtype)
        convert_tokenizer(source, config, temporary)
        convert_weights(source, config, temporary / "model.safetensors", args.dtype)
        if to.is_dir():
            to.rmdir()
        os.replace(temporary, to)
    except InputError as error:  # what the reader of a checkpoint finds wrong is wrong in the file
        raise InputError(str(error).replace(str(temporary), str(source.path))) from error
    except OSError as error:
        raise InputError(f"{to}: could not be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = (to / "model.safetensors").stat().st_size / 1e6
    print(f"written: {args.to}  {config.model_type}, {args.dtype}, {size:,.1f} MB")
    name = shlex.quote(args.to)
    print(f"next: python dream.py train --train rows.jsonl --judge {name} --retriever {name} --out runs/mine")


def main(argv: list[str] | None = None) -> int:
    """The exit status, as `run_command` says."""
    parser = ArgumentParser("import_gguf", description=__doc__)
    add = parser.add_argument
    add("file", metavar="FILE", help="the checkpoint, *.gguf")
    add("--to", required=True, metavar="FOLDER", help="the folder to write; new or empty")
    why = "float32 keeps every value as it is in the file; bfloat16 takes half the space and rounds"
    add("--dtype", default="float32", choices=list(DTYPES), help=f"{why} (default: %(default)s)")
    args = parser.parse_args(argv)
    return run_command("import_gguf", lambda: import_gguf(args))


if __name__ == "__main__":
    sys.exit(main())
