"""Checkpoints in the Hugging Face layout: config.json, safetensors, tokenizer.json, in and out."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from data import PromptBuilder
from model import CausalLM, Config, Decoder, add_token
from support.files import InputError, inside, read_json, write_atomic

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def read_config(path: Path) -> Config:
    """Read config.json in the dialect of transformers 4 (rope_theta) or 5 (rope_parameters)."""
    raw = read_json(path)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"{path}: model_type is {family!r}; supported: {', '.join(FAMILIES)}")

    def number(key: str, default: float | None = None, kind: type[float] = int, given: dict = raw) -> Any:
        value = given.get(key, default) if given.get(key) is not None else default
        largest = 1 << 31 if kind is int else 1e15
        if isinstance(value, bool) or not isinstance(value, int | kind) or not 0 < value < largest:
            raise InputError(f"{path}: {key} is {value!r}, expected a positive number")
        return value

    if any(str(name).startswith("AutoModel") for name in raw.get("auto_map") or ()):  # LLM2Vec's way
        told = "names network code of its own (auto_map), which is never run and may not be causal"
        raise InputError(f"{path}: {told}; if it is plain {family}, remove auto_map from a local copy")
    if raw.get("is_causal") is False or raw.get("use_bidirectional_attention"):
        raise InputError(f"{path}: the attention is bidirectional, only causal networks are supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"{path}: hidden_act is {raw['hidden_act']!r}, only silu is supported")
    if raw.get("quantization_config"):
        raise InputError(f"{path}: a quantised checkpoint, which is not supported")
    own = raw.get("rope_parameters") or {}
    rope = raw.get("rope_scaling") or own  # in this order, as transformers has it
    if not isinstance(rope, dict) or not isinstance(own, dict):
        raise InputError(f"{path}: rope_parameters is {own!r}, rope_scaling {rope!r}, expected objects")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise InputError(f"{path}: rope_type is {rope_type!r}; supported: default, llama3")
    if rope_type == "llama3":
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            number(key, kind=float, given=rope)
    theta = 1e4
    for given in (own, raw, rope):  # the last that names one decides
        theta = number("rope_theta", theta, float, given)
    heads = number("num_attention_heads")
    context = number("max_position_embeddings", 2048)
    # Within the window, sliding-window attention is plain attention: allow no more than that.
    window = raw.get("sliding_window", 4096 if family == "mistral" else None)
    if window and (family == "mistral" or family != "llama" and raw.get("use_sliding_window")):
        context = min(context, number("sliding_window", 4096))
    eos = raw.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if eos is not None and (type(eos) is not int or eos < 0):
        raise InputError(f"{path}: eos_token_id is {eos!r}, expected a token id")
    bias = bool(raw.get("attention_bias", False))
    config = Config(
        model_type=family,
        vocab_size=number("vocab_size"),
        hidden_size=number("hidden_size"),
        intermediate_size=number("intermediate_size"),
        num_hidden_layers=number("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", number("hidden_size") // heads),
        rms_norm_eps=number("rms_norm_eps", 1e-6, float),
        context=context,
        rope_theta=float(theta),
        rope_scaling=dict(rope) if rope_type == "llama3" else None,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias and family != "qwen2",
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        eos_token_id=eos,
        raw=raw,
    )
    if config.head_dim % 2:
        raise InputError(f"{path}: head_dim is {config.head_dim}, RoPE needs an even number")
    if config.num_attention_heads % config.num_key_value_heads:
        raise InputError(f"{path}: num_attention_heads is not a multiple of num_key_value_heads")
    return config


def config_json(config: Config, architecture: str, dtype: torch.dtype) -> dict:
    """config.json in both dialects, so that transformers 4 and 5 read the same network."""
    rope = {**(config.rope_scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta}
    name = str(dtype).removeprefix("torch.")
    raw = {key: value for key, value in config.raw.items() if key != "_name_or_path"}  # a path of someone's
    return {
        **raw,
        "architectures": [architecture],
        "head_dim": config.head_dim,  # its default is not the same in every version
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "rope_parameters": rope,
        "torch_dtype": name,
        "dtype": name,
    }


def read_tensors(folder: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json names, in one
    dtype.

    Files are memory-mapped: a tensor already in `dtype` on the CPU is a view of the file, not a copy.
    """
    index = folder / "model.safetensors.index.json"
    where: dict[str, list[str]] = {}
    if (folder / "model.safetensors").exists():
        where["model.safetensors"] = []
    elif index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise InputError(f"{index}: weight_map is missing, or no object of tensor names and files")
        for name, shard in shards.items():
            inside(folder, shard, index)
            where.setdefault(shard, []).append(name)
    if not where:
        raise InputError(
            f"{folder}: neither model.safetensors nor model.safetensors.index.json with a weight_map"
        )
    tensors = {}
    for shard, names in where.items():
        path = folder / shard
        if not path.exists():
            raise InputError(f"{index}: names the shard {shard}, which is not in {folder}; fetch it again")
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                present = set(file.keys())
                for name in names or sorted(present):
                    if name not in present:
                        raise InputError(f"{path}: has no tensor {name}, although {index.name} says so")
                    tensors[name] = file.get_tensor(name).to(device=device, dtype=dtype)
        except (SafetensorError, OSError) as error:
            raise broken(path, error) from error
    return tensors


def broken(path: Path, error: Exception) -> InputError:
    # In the hub's cache the path is a link: only without its target is the file fetched anew.
    return InputError(f"{path.resolve()}: not a whole safetensors file ({error}); delete it, fetch it again")


def _assign(module: nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    """Fill a module built on the meta device; a missing, extra or misshapen tensor is an error naming it."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name, shape in expected.items():
        if name not in tensors:
            biases = "; config.json says mlp_bias: true, set it to false if the network has none"
            told = biases if ".mlp." in name and name.endswith(".bias") else ""
            raise InputError(f"{where}: tensor {name} {shape} is missing{told}")
        if tuple(tensors[name].shape) != shape:
            raise InputError(
                f"{where}: tensor {name} has shape {tuple(tensors[name].shape)}, config.json implies {shape}"
            )
    if extra := sorted(set(tensors) - set(expected)):
        raise InputError(
            f"{where}: unexpected tensor {extra[0]}; config.json does not describe this checkpoint"
        )
    module.load_state_dict(tensors, strict=True, assign=True)
    module.requires_grad_(False)


class Checkpoint:
    """A folder with config.json and safetensors. Every model built from one Checkpoint shares its tensors."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype):
        self.folder, self.device, self.dtype = Path(folder), device, dtype
        if (self.folder / "adapter_config.json").exists():
            merge = "python -m tools.export --format merged"
            raise InputError(
                f"{self.folder}: holds an adapter, whole weights are needed; merge it first ({merge})"
            )
        self.config = read_config(self.folder / "config.json")
        tensors = read_tensors(self.folder, device, dtype)
        if self.config.num_hidden_layers > len(tensors):  # before so many layers are made
            raise InputError(
                f"{self.folder}: num_hidden_layers is {self.config.num_hidden_layers}, tensors {len(tensors)}"
            )
        self.head = tensors.pop("lm_head.weight", None)
        # Base-model exports have no leading "model."; some old checkpoints store RoPE's constants.
        self.tensors = {
            name.removeprefix("model."): tensor
            for name, tensor in tensors.items()
            if not name.endswith("rotary_emb.inv_freq")
        }

    def decoder(self) -> Decoder:
        """The network up to the final norm, frozen."""
        with torch.device("meta"):
            decoder = Decoder(self.config)
        _assign(decoder, self.tensors, self.folder)
        return decoder.eval()

    def causal_lm(self) -> CausalLM:
        """The network with its output projection, frozen."""
        tied = self.config.tie_word_embeddings
        head = self.tensors.get("embed_tokens.weight") if tied else self.head
        if tied and head is not None and self.head is not None and not torch.equal(head, self.head):
            told = "config.json ties lm_head and embed_tokens, and the weights hold two different ones"
            raise InputError(f"{self.folder}: {told}; set tie_word_embeddings to false, or drop lm_head")
        if head is None:
            raise InputError(
                f"{self.folder}: tensor lm_head.weight is missing; a judge needs its output projection"
            )
        with torch.device("meta"):
            model = CausalLM(self.config)
        tensors = {f"model.{name}": tensor for name, tensor in self.tensors.items()}
        _assign(model, {**tensors, "lm_head.weight": head}, self.folder)
        if tied:  # assigning untied them
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.eval()


def load_tokenizer(folder: Path, config: Config) -> Tokenizer:
    """tokenizer.json, checked against the size of the embedding table; with the BOS and EOS around texts that
    tokenizer_config.json asks for; tokenizer.json alone may lack them (Mistral's embedding models).
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise InputError(f"{folder}: no tokenizer.json; checkpoints need a fast tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a bare Exception
        raise InputError(f"{path}: not a tokenizer ({error})") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config.vocab_size:
        raise InputError(f"{path}: has token id {largest}, config.json has vocab_size {config.vocab_size}")
    if config.eos_token_id is not None and config.eos_token_id >= config.vocab_size:
        raise InputError(f"{folder}/config.json: eos_token_id is {config.eos_token_id}, not below vocab_size")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    asked = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    for name, place, form in (("bos", 0, "{} $A"), ("eos", -1, "$A {}")):
        token = asked.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if asked.get(f"add_{name}_token") and token:
            number = tokenizer.token_to_id(token) if isinstance(token, str) else None
            if number is None:
                raise InputError(f"{folder / 'tokenizer_config.json'}: {name}_token {token!r} has no id")
            ids = tokenizer.encode("a").ids
            if not ids or ids[place] != number:
                add_token(tokenizer, form.format(token), token, number)
    return tokenizer


def missing_bos(folder: Path) -> str:
    """The BOS of a language model whose tokenizer does not add it, as text; "" where there is none to add.

    Language models rest the attention that no word needs on the first token they read (attention sinks, arXiv
    2309.17453), whichever it is. Where every text begins with a word of its own, training can push one such
    word out of that role, and the gradients of texts that begin with it become hundreds of times too large
    (measured in studies/smollm2).
    """
    config = read_config(folder / "config.json")
    tokenizer, bos = load_tokenizer(folder, config), config.raw.get("bos_token_id")
    token = tokenizer.id_to_token(bos) if isinstance(bos, int) and 0 <= bos < config.vocab_size else None
    added, plain = (tokenizer.encode(f"{start}a").ids[:1] == [bos] for start in (token or "", ""))
    return token if token and added and not plain else ""


def make_builder(folder: Path, template: str, context: int = 0, max_target: int = 32) -> PromptBuilder:
    """The prompts of the judge in `folder`, in its own tokens; a BOS where its tokenizer puts one.

    context: tokens of a prompt, at most the judge's; 0 for that, or 8192.
    """
    config = read_config(folder / "config.json")
    tokenizer = load_tokenizer(folder, config)
    with_own, plain = (tokenizer.encode("a", add_special_tokens=own).ids for own in (True, False))
    bos = with_own[0] if with_own[:1] != plain[:1] else None
    return PromptBuilder(tokenizer, min(context or 8192, config.context), max_target, template, bos)


def save_weights(module: CausalLM | Decoder, folder: Path, dtype: torch.dtype) -> None:
    """config.json and model.safetensors under Hugging Face names; a tied lm_head is not written twice."""
    config = module.config
    causal = isinstance(module, CausalLM)
    family = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[config.model_type]
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in module.state_dict().items()}
    if causal and config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config_json(config, family + ("ForCausalLM" if causal else "Model"), dtype), indent=1)
    write_atomic(folder / "config.json", text + "\n")
