"""Embedders on disk: PEFT adapters and sentence-transformers folders, in and out."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from formats.checkpoints import Checkpoint, broken, load_tokenizer, missing_bos, read_config, save_weights
from model import PROJECTIONS, Decoder, Embedder, add_lora, lora_layers
from support.files import InputError, inside, read_json, write_atomic
from support.hub import HUB_NAME
from support.launch import pick_device, pick_dtype
from support.runs import locate

# sentence-transformers' names; only the last is read
POOLINGS = "cls_token max_tokens mean_tokens mean_sqrt_len_tokens weightedmean_tokens lasttoken".split()


def load_embedder(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    max_length: int | None = None,
) -> Embedder:
    """An embedder from a training run, one of its checkpoints, a PEFT adapter, a plain checkpoint; or by its
    name on the hub, owner/name[@revision].

    device, dtype: picked when not given. max_length, prompts and EOS are those saved with it; the argument
    overrides the length. Raises InputError.

        >>> embedder = load_embedder("runs/demo")
    """
    folder = locate(name)
    device = pick_device(device)
    settings = read_embedding_settings(folder)
    weights = settings.pop("transformer")
    adapted = (weights / "adapter_config.json").exists()
    base = base_folder(weights) if adapted else weights
    dtype, _ = pick_dtype(dtype, device, read_config(base / "config.json").hidden_size)
    checkpoint = Checkpoint(base, device, dtype)
    decoder = checkpoint.decoder()
    if adapted:
        load_adapter(decoder, weights)
    tokenizer_folder = weights if (weights / "tokenizer.json").exists() else checkpoint.folder
    tokenizer = load_tokenizer(tokenizer_folder, checkpoint.config)
    embedder = Embedder(decoder, tokenizer, max_length or settings["max_length"], settings["prompts"])
    embedder.append_eos = settings["append_eos"]  # the saved tokenizer adds it
    return embedder.eval()


def hidden_size(name: str | Path) -> int:
    """Of an embedder's or a language model's network, by its configuration alone. Raises InputError."""
    folder = read_embedding_settings(locate(name, weights=False))["transformer"]
    if (folder / "adapter_config.json").exists():
        folder = base_folder(folder, weights=False)
    return read_config(folder / "config.json").hidden_size


def read_embedding_settings(folder: Path) -> dict:
    """How a checkpoint wants texts embedded: {"transformer": the folder of its network, "max_length",
    "prompts", "append_eos"}.

    Reads sentence-transformers' files in the layouts of 5.x and 6.x; without them 512 tokens, no prompts.
    Raises InputError for modules or poolings other than the last token's, normalised.
    """

    def read(name: str) -> dict:
        return read_json(folder / name) if (folder / name).exists() else {}

    config = read("config_sentence_transformers.json")
    transformer, default_length = folder, 512
    modules = folder / "modules.json"
    if modules.exists():
        try:
            kinds = [entry["type"].rsplit(".", 1)[-1] for entry in read_json(modules, list)]
            paths = [entry["path"] for entry in read_json(modules, list)]
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{modules}: expected a list of objects with 'path' and 'type'") from error
        if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
            raise InputError(
                f"{modules}: modules {', '.join(kinds)}; supported: Transformer, Pooling, Normalize"
            )
        for path in paths:
            inside(folder, path, modules)
        pooling = read_json(folder / paths[1] / "config.json")
        modes = pooling.get("pooling_mode")
        if modes is None:  # 5.x and before: one flag a mode
            modes = [name.removeprefix("pooling_mode_") for name, value in pooling.items() if value is True]
            modes = [name for name in modes if name in POOLINGS]
        if modes not in ("lasttoken", ["lasttoken"]):
            path = folder / paths[1] / "config.json"
            raise InputError(f"{path}: the pooling is {modes}, only lasttoken is supported")
        similarity = config.get("similarity_fn_name") or "cosine"
        if kinds[2:] == [] and similarity != "cosine":
            raise InputError(
                f"{modules}: no Normalize, and similarity {similarity!r}; only cosine is supported"
            )
        transformer = folder / paths[0]
        tokenizer = transformer / "tokenizer_config.json"
        known = read_json(tokenizer).get("model_max_length") if tokenizer.exists() else None
        if known is not None and (not isinstance(known, int | float) or not known >= 1):
            raise InputError(f"{tokenizer}: model_max_length is {known!r}, expected a positive number")
        default_length = int(min(known or 512, 1 << 20))  # 1e30 there means none
    limits = transformer / "sentence_bert_config.json"  # beside the weights, wherever they lie
    settings = read_json(limits) if limits.exists() else read("sentence_bert_config.json")
    where = limits if limits.exists() else folder / "sentence_bert_config.json"
    if settings.get("do_lower_case"):
        raise InputError(f"{where}: do_lower_case is not supported")
    if "message" in (settings.get("modality_config") or {}):  # sentence-transformers 6, a base for chats
        raise InputError(
            f"{where}: its texts go through a chat template (modality_config has 'message'), which is not "
            "supported; remove 'message' there to embed the bare texts"
        )
    if config.get("truncate_dim"):
        told = f"truncate_dim is {config['truncate_dim']!r}, and shortened embeddings are not supported"
        raise InputError(f"{folder}/config_sentence_transformers.json: {told}; remove it to get all columns")
    max_length = settings.get("max_seq_length") or default_length
    if type(max_length) is not int or max_length < 1:
        raise InputError(f"{where}: max_seq_length is {max_length!r}, expected a positive number of tokens")
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise InputError(f"{folder}/config_sentence_transformers.json: 'prompts' must be names and texts")
    return {
        "transformer": transformer,
        "max_length": max_length,
        "prompts": prompts,
        "append_eos": bool(config.get("append_eos")),
    }


def as_saved(folder: Path, given: dict) -> dict:
    """The settings of a training that `given` leaves open, as the checkpoint in `folder` was saved with them.

    max_length, query_prompt, document_prompt, append_eos; what is not the default is printed. Texts of a
    bare language model begin with its BOS, where its tokenizer does not add it.
    """
    saved, defaults = read_embedding_settings(folder), (512, "", "", False)
    own = {"max_length": saved["max_length"]}
    own |= {f"{kind}_prompt": saved["prompts"].get(kind, "") for kind in ("query", "document")}
    own |= {"append_eos": saved["append_eos"]}
    how = f"as {folder} was saved"
    if not any((folder / name).exists() for name in ("modules.json", "adapter_config.json")):
        own |= dict.fromkeys(("query_prompt", "document_prompt"), missing_bos(folder))
        how = "one token begins all texts and takes the attention that no word needs"
    own = {name: value for name, value in own.items() if given[name] in (0, None, False)}
    told = [f"{n}={v!r}" for (n, v) in own.items() if v not in defaults]
    if told:
        print(f"{how}: {', '.join(told)}", flush=True)
    return own


def adapter_base(folder: Path) -> str:
    """The base that an adapter names: a folder, or owner/name, with @revision where it gives one."""
    where = folder / "adapter_config.json"
    config = read_json(where)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{where}: base_model_name_or_path is missing")
    if HUB_NAME.fullmatch(base) and config.get("revision") and not Path(base).is_dir():
        return f"{base}@{config['revision']}"
    return base


def base_folder(folder: Path, weights: bool = True) -> Path:
    """The folder of an adapter's base, fetched first where it is a hub's. Raises InputError."""
    try:
        return locate(adapter_base(folder), weights)
    except InputError as error:
        told = f"the adapter's base is not there: {error}; if it has moved, change base_model_name_or_path"
        raise InputError(f"{folder / 'adapter_config.json'}: {told}") from error


def load_adapter(decoder: Decoder, folder: Path) -> None:
    """Add the PEFT LoRA adapter of a folder; names in base-model or CausalLM form. Raises InputError."""
    where = folder / "adapter_config.json"
    config = read_json(where)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{where}: peft_type is {config.get('peft_type')!r}, only LORA is supported")
    unsupported = (
        "use_dora modules_to_save rank_pattern alpha_pattern layers_to_transform lora_bias exclude_modules "
        "fan_in_fan_out layer_replication trainable_token_indices alora_invocation_tokens"
    )
    for key in unsupported.split():
        if config.get(key):
            raise InputError(f"{where}: {key} is set, which is not supported")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in ("gaussian", "eva", "orthogonal"):
        raise InputError(
            f"{where}: init_lora_weights is {start!r}, which changes the base; convert it to plain LoRA"
        )
    if config.get("bias", "none") != "none":
        raise InputError(f"{where}: bias is {config['bias']!r}, only none is supported")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or any(name not in PROJECTIONS for name in targets):
        known = ", ".join(PROJECTIONS)
        raise InputError(f"{where}: target_modules is {targets!r}, expected a list out of {known}")
    r: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    if type(r) is not int or not 0 < r <= 1 << 16 or type(alpha) not in (int, float) or not 0 < alpha < 1e9:
        raise InputError(f"{where}: r is {r!r} and lora_alpha {alpha!r}, expected two positive numbers")
    add_lora(decoder, r, alpha, config.get("lora_dropout") or 0.0, targets, config.get("use_rslora", False))
    path = folder / "adapter_model.safetensors"
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            loaded = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise broken(path, error) from error
    loaded = {name.removeprefix("base_model.model.").removeprefix("model."): t for name, t in loaded.items()}
    own = {name: tensor for name, tensor in decoder.state_dict().items() if ".lora_" in name}
    for name, tensor in own.items():
        if name not in loaded:
            raise InputError(f"{path}: tensor {name} is missing")
        if loaded[name].shape != tensor.shape:
            raise InputError(
                f"{path}: tensor {name} has shape {tuple(loaded[name].shape)}, the base model needs "
                f"{tuple(tensor.shape)}; is this an adapter for another base?"
            )
        tensor.copy_(loaded[name])
    if extra := sorted(set(loaded) - set(own)):
        raise InputError(f"{path}: unexpected tensor {extra[0]}; is this an adapter for another base?")


def save_adapter(decoder: Decoder, folder: Path, base: str) -> None:
    """The decoder's LoRA adapters in PEFT's files. base: the checkpoint that they belong to."""
    folder.mkdir(parents=True, exist_ok=True)
    adapters = lora_layers(decoder)
    some = next(iter(adapters.values()))
    name, _, revision = (base, "", "") if Path(base).is_dir() else base.partition("@")
    r = some.lora_A.out_features
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": name,
        "revision": revision or None,
        "r": r,
        "lora_alpha": some.scaling * r,
        "lora_dropout": some.dropout,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in adapters}),
        "bias": "none",
        "inference_mode": True,
    }
    write_atomic(folder / "adapter_config.json", json.dumps(config, indent=1) + "\n")
    state = decoder.state_dict()
    tensors = {f"base_model.model.{name}": t.contiguous() for name, t in state.items() if ".lora_" in name}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def save_embedder(embedder: Embedder, folder: Path, base: str = "") -> None:
    """A folder that load_embedder, PEFT and sentence-transformers load: the adapter, or all weights where
    there is none.

    base: the checkpoint that the adapter belongs to. sentence-transformers' module files are always there:
    without them it would pool by the mean and not normalise.
    """
    if lora_layers(embedder.decoder):
        save_adapter(embedder.decoder, folder, base)
    else:
        save_weights(embedder.decoder, folder, embedder.decoder.embed_tokens.weight.dtype)
    tokenizer = Tokenizer.from_str(embedder.tokenizer.to_str())
    tokenizer.no_truncation()  # max_length is saved below, where other libraries look for it
    tokenizer.save(str(folder / "tokenizer.json"))
    # As padding, which no real token sees. transformers cuts texts where it stands: not an ordinary token.
    eos = tokenizer.id_to_token(embedder.decoder.config.eos_token_id or 0)
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    eos = eos if eos in special else next(iter(special), eos)
    prompts = embedder.prompts
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": eos,
            "pad_token": eos,
            "padding_side": "right",
            "model_max_length": embedder.max_length,
        },
        "sentence_bert_config.json": {"max_seq_length": embedder.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": prompts,
            # What callers get who do not say whether a text is a query.
            "default_prompt_name": "document" if prompts["query"] == prompts["document"] != "" else None,
            "similarity_fn_name": "cosine",
            "append_eos": embedder.append_eos,
        },
    }
    files |= _module_files(embedder.dim)
    (folder / "2_Normalize").mkdir(exist_ok=True)
    for name, content in files.items():
        write_atomic(folder / name, json.dumps(content, indent=1) + "\n")


def _module_files(dim: int) -> dict:
    """What makes a checkpoint a sentence-transformers folder, in the layout that 5.x and 6.x both load."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    return {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": dim,
            **{f"pooling_mode_{kind}": kind == "lasttoken" for kind in POOLINGS},
            "include_prompt": True,
        },
    }
