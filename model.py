"""The networks: a Qwen/Llama decoder, LoRA, checkpoints in and out, and the embedder.

One decoder serves the judge and the retriever. Three switches tell the families apart: a bias on q/k/v
(Qwen2), a norm on each head's q and k (Qwen3), neither (Llama, Mistral). Attribute names equal the Hugging
Face tensor names, so that a checkpoint loads strictly and without a key map. The numerics follow transformers
operation by operation: RMSNorm in float32, cast back, then times its weight; RoPE angles in float32,
split-halves pairing.

    RoPE rotates pairs of a head's dimensions. Hugging Face checkpoints pair the halves:
        split halves (used here)   (x0, x4) (x1, x5) (x2, x6) (x3, x7)
        interleaved (the paper's)  (x0, x1) (x2, x3) (x4, x5) (x6, x7)

This file never trains, never tokenises prompts for the judge, and runs no code that comes with a checkpoint.
"""

import difflib
import hashlib
import importlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention import CrossDocument, Injection, attention, attention_to_keys, exact
from data import HUB_NAME, InputError, fetch_repository, inside, longest_token, pad, read_json, write_atomic

CPU = torch.device("cpu")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
DESCRIPTION_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "adapter_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "[0-9]_*/config.json",
    "[0-9]_*/sentence_bert_config.json",
)
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "adapter_model.safetensors",
)
# sentence-transformers' names; only the last is read
POOLINGS = (
    "cls_token",
    "max_tokens",
    "mean_tokens",
    "mean_sqrt_len_tokens",
    "weightedmean_tokens",
    "lasttoken",
)


@dataclass
class Config:
    """The figures of config.json that shape the network; `raw` is the whole file."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    context: int  # positions the model was made for
    rope_theta: float
    rope_scaling: dict | None  # None, or the figures of the llama3 scaling
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    eos_token_id: int | None
    raw: dict = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def read(cls, path: Path) -> "Config":
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

        if raw.get("auto_map"):
            print(f"note: {path} names code of its own (auto_map), which is never run", flush=True)
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
        config = cls(
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

    def to_json(self, architecture: str, dtype: torch.dtype) -> dict:
        """config.json in both dialects, so that transformers 4 and 5 read the same network."""
        rope = {**(self.rope_scaling or {"rope_type": "default"}), "rope_theta": self.rope_theta}
        name = str(dtype).removeprefix("torch.")
        raw = {key: value for key, value in self.raw.items() if key != "_name_or_path"}  # a path of someone's
        return {
            **raw,
            "architectures": [architecture],
            "head_dim": self.head_dim,  # its default is not the same in every version
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "rope_parameters": rope,
            "torch_dtype": name,
            "dtype": name,
        }


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)).to(
            x.dtype
        )


def rope_frequencies(config: Config, device: torch.device) -> Tensor:
    """Angle per position of each pair of dimensions, (head_dim / 2,) float32; with Llama 3's scaling."""
    exponent = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponent
    if config.rope_scaling is None:
        return frequencies
    # Llama 3.1: wavelengths beyond the original context are stretched by `factor`, short ones kept, those
    # between blended.
    s = config.rope_scaling
    context, low, high = s["original_max_position_embeddings"], s["low_freq_factor"], s["high_freq_factor"]
    wavelength = 2 * math.pi / frequencies
    blend = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / s["factor"] + blend * frequencies


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, H, T, D) by the angles of its positions; cos, sin: (B, 1, T, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@dataclass
class Cache:
    """Keys and values of prefixes, layer -> (B, Hkv, P, D), right-padded; lengths: (B,) int64."""

    lengths: Tensor
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Probe:
    """Collects each layer's attention to keys, (B, Hq, S) float32, weighted over rows by (B, T)."""

    row_weights: Tensor
    attention: list[Tensor] = field(default_factory=list)


@dataclass
class Context:
    """What every layer of one forward pass shares."""

    cos: Tensor
    sin: Tensor
    visible: Tensor | None
    prefix: Cache | None
    store: Cache | None
    injection: Injection | CrossDocument | None
    probe: Probe | None


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        size, self.head_dim, self.layer = config.hidden_size, config.head_dim, layer
        q_size, kv_size = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        self.q_proj = nn.Linear(size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def keys_and_values(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Of these rows, (B, Hkv, T, D) each; also left in the context's store, if it has one."""
        batch, rows, _ = x.shape
        k = self.k_proj(x).view(batch, rows, -1, self.head_dim)  # (B, T, Hkv, D)
        v = self.v_proj(x).view(batch, rows, -1, self.head_dim).transpose(1, 2)  # (B, Hkv, T, D)
        k = self.k_norm(k) if hasattr(self, "k_norm") else k
        k = apply_rope(k.transpose(1, 2), context.cos, context.sin)  # (B, Hkv, T, D)
        if context.store is not None:
            context.store.keys[self.layer], context.store.values[self.layer] = k, v
        return k, v

    def forward(self, x: Tensor, context: Context, last: Tensor | None = None) -> Tensor:
        """last: (B,) the one row of each text to compute, out of T; None for all."""
        k, v = self.keys_and_values(x, context)
        cos, sin, visible = context.cos, context.sin, context.visible
        if last is not None:
            x = x[torch.arange(len(x), device=x.device), last, None]  # (B, 1, C)
            cos, sin = (angle[0, 0, last, None, None] for angle in (cos, sin))  # (B, 1, 1, D)
            visible = (torch.arange(k.shape[2], device=x.device) <= last[:, None])[:, None]  # (B, 1, S)
        batch, rows, _ = x.shape
        q = self.q_proj(x).view(batch, rows, -1, self.head_dim)  # (B, T, Hq, D)
        q = self.q_norm(q) if hasattr(self, "q_norm") else q
        q = apply_rope(q.transpose(1, 2), cos, sin)  # (B, Hq, T, D)
        if context.prefix is not None:
            k = torch.cat((context.prefix.keys[self.layer], k), dim=2)  # (B, Hkv, P + T, D)
            v = torch.cat((context.prefix.values[self.layer], v), dim=2)
        if context.probe is not None:
            assert visible is not None  # a probe needs a prefix
            context.probe.attention.append(attention_to_keys(q, k, visible, context.probe.row_weights))
        out = attention(q, k, v, visible, context.injection, self.layer)
        return self.o_proj(out.transpose(1, 2).reshape(batch, rows, -1))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, context: Context, last: Tensor | None = None) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), context, last)
        x = attended + (x if last is None else x[torch.arange(len(x), device=x.device), last, None])
        return x + self.mlp(self.post_attention_layernorm(x))


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # there a draw changes nothing, and imports torch._dynamo: two seconds
            super().reset_parameters()


class Decoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.activation_checkpointing = False  # keep only each layer's input, and compute the rest again

    def forward(
        self,
        input_ids: Tensor,
        prefix: Cache | None = None,
        store: Cache | None = None,
        injection: Injection | CrossDocument | None = None,
        probe: Probe | None = None,
        last: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor | None:
        """Hidden states (B, T, C) after the final norm, of right-padded rows of token ids (B, T).

        prefix: keys and values that come before these rows; positions go on from each prefix's own length.
        store: an empty Cache that takes these rows' keys and values: that is all that is then computed, and
        nothing is returned. probe: needs a prefix. last: (B,) the one row of each text that is wanted; then
        (B, 1, C) is returned, and the last layer computes no other. visible: (B, T, T) bool, the keys that
        each row sees, where that is not all before it. The last two without a prefix only.
        """
        batch, rows = input_ids.shape
        device = input_ids.device
        positions = torch.arange(rows, device=device)[None]  # (1, T)
        if prefix is not None:
            positions = prefix.lengths[:, None] + positions  # (B, T)
            width = prefix.keys[0].shape[2]
            in_prefix = torch.arange(width, device=device) < prefix.lengths[:, None]  # (B, P)
            causal = torch.ones(rows, rows, dtype=torch.bool, device=device).tril()  # (T, T)
            visible = torch.cat(
                (in_prefix[:, None].expand(-1, rows, -1), causal.expand(batch, -1, -1)), dim=2
            )  # (B, T, P + T)
        x = self.embed_tokens(input_ids)
        angles = positions[:, None, :, None].float() * rope_frequencies(
            self.config, device
        )  # (B or 1, 1, T, D/2)
        angles = torch.cat((angles, angles), dim=-1)
        context = Context(
            angles.cos().to(x.dtype), angles.sin().to(x.dtype), visible, prefix, store, injection, probe
        )
        again = self.activation_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            if store is not None and layer is self.layers[-1]:
                assert isinstance(layer, Layer)
                layer.self_attn.keys_and_values(layer.input_layernorm(x), context)
                return None
            only = last if layer is self.layers[-1] else None
            x = checkpoint(layer, x, context, only, use_reentrant=False) if again else layer(x, context, only)
        return self.norm(x)


class CausalLM(nn.Module):
    """A decoder with its output projection: `lm_head(model(input_ids))` are the logits."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight


class LoRALinear(nn.Linear):
    """y = x W' + b + (alpha / r) x A' B'. A subclass, so that the base's tensor names stay.

    A and B are float32 whatever the base's type, and cast for the product: the optimizer never sees half
    precision.
    """

    def __init__(self, base: nn.Linear, r: int, scaling: float, dropout: float = 0.0):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, r, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, device=device, dtype=torch.float32)
        if device.type != "meta":
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B.weight)
        self.scaling = scaling
        self.dropout = dropout
        self.base_weight: Tensor | None = None  # kept while merged

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.base_weight is not None:
            return y
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        low_rank = F.linear(x, self.lora_A.weight.to(x.dtype)) * self.scaling  # (..., r)
        return y + F.linear(low_rank, self.lora_B.weight.to(x.dtype))

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the weight. The base's tensor, which a judge may share, is kept, not changed."""
        if self.base_weight is None:
            delta = self.lora_B.weight @ self.lora_A.weight * self.scaling  # (out, in) float32
            self.base_weight = self.weight.data
            self.weight = nn.Parameter((self.base_weight.float() + delta).to(self.base_weight.dtype), False)

    def unmerge(self) -> None:
        """Undo merge, exactly."""
        if self.base_weight is not None:
            self.weight, self.base_weight = nn.Parameter(self.base_weight, False), None


def add_lora(
    decoder: Decoder,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Iterable[str] = PROJECTIONS,
    rslora: bool = False,
) -> None:
    """Freeze the decoder and give each linear layer named in `targets` an adapter (B = 0: no change yet)."""
    targets = set(targets)
    if unknown := targets - set(PROJECTIONS):
        raise InputError(f"unknown LoRA target {min(unknown)!r}; choose from {', '.join(PROJECTIONS)}")
    decoder.requires_grad_(False)
    scaling = alpha / math.sqrt(r) if rslora else alpha / r
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if name in targets and isinstance(child, nn.Linear):
                setattr(module, name, LoRALinear(child, r, scaling, dropout))


def merge_lora(decoder: Decoder) -> None:
    """Replace every adapter by a plain linear layer that holds the base's weight plus the adapter."""
    for name, layer in lora_layers(decoder).items():
        layer.merge()
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        decoder.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], plain)


def lora_layers(decoder: Decoder) -> dict[str, LoRALinear]:
    return {name: module for name, module in decoder.named_modules() if isinstance(module, LoRALinear)}


def pick_device(name: str = "auto") -> torch.device:
    """The device of a flag; auto is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: not a device; use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: use auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: this machine has no CUDA device; use --device cpu")
    return device


def join_processes() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun started them; (0, 1) for one alone.

    All but the first print nothing. The first call joins the process group: gloo for what is on the CPU, nccl
    for what is on GPUs.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        return 0, 1
    if not torch.distributed.is_initialized():
        # Its functions' defaults keep the group that exists when torch first imports it (as torch._dynamo
        # does): gloo's threads would outlive `leave_processes` and now and then abort the exit.
        importlib.import_module("torch.distributed.nn.functional")
        if torch.cuda.is_available():
            local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= gpus:
                told = f"--nproc-per-node {gpus}, or CUDA_VISIBLE_DEVICES= for processes on the CPU"
                raise InputError(f"torchrun: one process a GPU, and {gpus} are visible; use {told}")
            torch.cuda.set_device(local)
        # Ranks wait for the first while it chooses heads or fetches data: longer than the default allows.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(hours=4))
        if torch.distributed.get_rank():
            sys.stdout = open(os.devnull, "w")
    return torch.distributed.get_rank(), processes


def leave_processes(failed: bool = False, status: int = 0) -> int:
    """End the process group, and with it its threads: one that outlives the interpreter may abort it.

    failed: this process alone does. nccl's groups end together or not at all, and the others may wait for
    this one: it exits at once, with `status`, and torchrun then ends them. Returns `status`.
    """
    if torch.distributed.is_initialized():
        if failed:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        torch.distributed.destroy_process_group()
    return status


def run_command(name: str, work: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """A command's exit status: that of its work, 2 when its input is wrong, 130 after Ctrl-C, 141 when nobody
    reads what it prints (`| head`). What goes wrong is told in one line, without a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # "?" where a terminal has no such letter
    try:
        status = work() or 0
        print(end="", flush=True)  # here a closed pipe can still be told
        return leave_processes(status=status)
    except KeyboardInterrupt:
        told, status = interrupted, 130
    except BrokenPipeError:  # who reads this has read enough: no more goes there, at the end neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return leave_processes(failed=True, status=141)
    except (InputError, OSError, SafetensorError) as error:
        told, status = f"error: {error}", 2
    print(f"{name}: {told}", file=sys.stderr)
    return leave_processes(failed=True, status=status)


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The compute dtype of a flag, and the reason to print beside it."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name in named:
        return named[name], "asked for"
    if name != "auto":
        raise InputError(f"--dtype {name}: use auto, {', '.join(named)}")
    if device.type != "cuda":
        return torch.float32, "a CPU computes it fastest"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the GPU has bfloat16 units"
    return torch.float32, "the GPU has no bfloat16 units, and float16 overflows"


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
            raise _broken(path, error) from error
    return tensors


def _broken(path: Path, error: Exception) -> InputError:
    # In the hub's cache the path is a link: only without its target is the file fetched anew.
    return InputError(f"{path.resolve()}: not a whole safetensors file ({error}); delete it, fetch it again")


def _assign(module: nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    """Fill a module built on the meta device; a missing, extra or misshapen tensor is an error naming it."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"{where}: tensor {name} {shape} is missing")
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

    def __init__(self, folder: str | Path, device: torch.device, dtype: torch.dtype):
        self.folder = find_folder(resolve_run(folder) if Path(folder).is_dir() else folder)
        self.device, self.dtype = device, dtype
        if (self.folder / "adapter_config.json").exists():
            merge = "python -m tools.export --format merged"
            raise InputError(
                f"{self.folder}: holds an adapter, whole weights are needed; merge it first ({merge})"
            )
        self.config = Config.read(self.folder / "config.json")
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


def find_folder(name: str | Path, weights: bool = True) -> Path:
    """The folder of a checkpoint, fetched first if `name` is that of a hub repository. Raises InputError.

    weights: False fetches only what describes the checkpoint, and its tokenizer.
    """
    if Path(name).is_dir():
        return Path(name)
    beside = Path(name).parent
    known = [folder.name for folder in beside.iterdir() if folder.is_dir()] if beside.is_dir() else []
    close = difflib.get_close_matches(Path(name).name, known, 1)
    hint = f"; did you mean the folder {beside / close[0]}?" if close else ""
    if not HUB_NAME.fullmatch(str(name)) or Path(name).parts[0] == "runs":  # where our runs lie
        raise InputError(
            f"{name}: no such folder; give the folder of a checkpoint (config.json, *.safetensors), or a "
            f"Hugging Face name, owner/name or owner/name@revision{hint}"
        )
    try:
        folder = fetch_repository(str(name), [*DESCRIPTION_FILES, *(WEIGHT_FILES if weights else ())])
    except InputError as error:
        raise InputError(f"{error}{hint}") from error
    if weights and not any((folder / file).exists() for file in WEIGHT_FILES):
        raise InputError(
            f"{name}: no safetensors in {folder}: either the repository has none (pickled weights are "
            "not read), or it was not fetched whole; run again while online"
        )
    return folder


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
                _add_token(tokenizer, form.format(token), token, number)
    return tokenizer


def _add_token(tokenizer: Tokenizer, form: str, token: str, number: int) -> None:
    """Put a special token before or behind every text, as part of the tokenizer: so it survives truncation,
    and other libraries that load the tokenizer add it too."""
    # A template before this one hands on its BOS and the text as two pieces: hence the pair.
    pair = form.replace("$A", "$A $B")
    template = processors.TemplateProcessing(single=form, pair=pair, special_tokens=[(token, number)])
    before = tokenizer.post_processor
    tokenizer.post_processor = processors.Sequence([before, template]) if before else template


class Embedder(nn.Module):
    """Text to a unit vector: the last real token's hidden state after the final norm, in float32.

    max_length: tokens a text is cut to. prompts: what is put before a query and a document. append_eos: the
    EOS follows every text, inside max_length. The published DREAM models use 512, no prompts and no EOS.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        max_length: int = 512,
        prompts: dict[str, str] | None = None,
        append_eos: bool = False,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.decoder, self.tokenizer, self.append_eos = decoder, tokenizer, append_eos
        self.prompts = {"query": "", "document": "", **(prompts or {})}
        self.dtype = dtype or decoder.embed_tokens.weight.dtype  # of the computation; weights may be wider
        self.max_length = min(max_length, decoder.config.context)
        if append_eos:
            eos = decoder.config.eos_token_id
            if eos is None or (token := tokenizer.id_to_token(eos)) is None:
                raise InputError(
                    "an EOS was asked for, but config.json's eos_token_id is not in the tokenizer"
                )
            if tokenizer.encode("a").ids[-1] != eos:  # where the tokenizer does not add it by itself
                _add_token(tokenizer, f"$A {token}", token, eos)
        tokenizer.enable_truncation(self.max_length)
        self._characters = (self.max_length + 1) * longest_token(tokenizer)  # of which some will be cut

    @property
    def dim(self) -> int:
        return self.decoder.config.hidden_size

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.weight.device

    def tokenize(self, texts: list[str], kind: str) -> list[list[int]]:
        """Token ids of each text, prompt included, at most max_length, never empty. kind: query, document."""
        prompt = self.prompts[kind]
        encoded = self.tokenizer.encode_batch_fast([(prompt + text)[: self._characters] for text in texts])
        nothing = [self.decoder.config.eos_token_id or 0]  # an empty text still gets an embedding
        return [encoding.ids or nothing for encoding in encoded]

    def embed(self, token_ids: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
        """One forward pass: (B, C) float32 unit vectors on the embedder's device."""
        input_ids, lengths = pad(token_ids, self.device)  # (B, T), (B,)
        mixed = self.dtype != self.decoder.embed_tokens.weight.dtype
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=mixed):
            hidden = self.decoder(input_ids, last=lengths - 1)  # (B, 1, C)
        return F.normalize(exact(hidden[:, 0]), dim=-1)

    def fingerprint(self) -> str:
        """A digest of what decides the embeddings beside `describe`: weights, sizes, tokenizer, the adapters'
        strength."""
        digest = hashlib.blake2b(f"{self.decoder.config}{self.tokenizer.to_str()}".encode(), digest_size=16)
        digest.update(repr([layer.scaling for layer in lora_layers(self.decoder).values()]).encode())
        for name, tensor in sorted(self.decoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def describe(self) -> dict:
        """What decides the embeddings beside the weights."""
        return {
            "max_length": self.max_length,
            "prompts": {kind: self.prompts[kind] for kind in ("query", "document")},
            "append_eos": self.append_eos,
            "pooling": "last token",
            "dim": self.dim,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def resolve_run(folder: str | Path) -> Path:
    """A run's folder stands for its best checkpoint, other folders for themselves."""
    folder = Path(folder)
    listing = folder / "checkpoints.json"
    if listing.exists():
        names = read_json(listing)
        return inside(folder, names.get("best") or names.get("last"), listing)
    if (folder / "settings.json").exists() and not (folder / "config.json").exists():
        raise InputError(f"{folder}: this run has no checkpoint yet")
    return folder


def load_embedder(
    folder: str | Path, device: torch.device, dtype: torch.dtype, max_length: int | None = None
) -> Embedder:
    """An embedder from a training run, one of its checkpoints, a PEFT adapter folder or a plain checkpoint.

    max_length, prompts and EOS are those saved with it; the argument overrides the length. Raises InputError.
    """
    folder = find_folder(resolve_run(folder))
    settings = read_embedding_settings(folder)
    weights = settings.pop("transformer")
    if (weights / "adapter_config.json").exists():
        checkpoint = Checkpoint(adapter_base(weights), device, dtype)
        decoder = checkpoint.decoder()
        load_adapter(decoder, weights)
    else:
        checkpoint = Checkpoint(weights, device, dtype)
        decoder = checkpoint.decoder()
    tokenizer_folder = weights if (weights / "tokenizer.json").exists() else checkpoint.folder
    tokenizer = load_tokenizer(tokenizer_folder, checkpoint.config)
    embedder = Embedder(decoder, tokenizer, max_length or settings["max_length"], settings["prompts"])
    embedder.append_eos = settings["append_eos"]  # the saved tokenizer adds it
    return embedder.eval()


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
    if settings.get("do_lower_case"):
        raise InputError(f"{folder}/sentence_bert_config.json: do_lower_case is not supported")
    max_length = settings.get("max_seq_length") or default_length
    if type(max_length) is not int or max_length < 1:
        path = folder / "sentence_bert_config.json"
        raise InputError(f"{path}: max_seq_length is {max_length!r}, expected a positive number of tokens")
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise InputError(f"{folder}/config_sentence_transformers.json: 'prompts' must be names and texts")
    return {
        "transformer": transformer,
        "max_length": max_length,
        "prompts": prompts,
        "append_eos": bool(config.get("append_eos")),
    }


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
        raise _broken(path, error) from error
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
    text = json.dumps(config.to_json(family + ("ForCausalLM" if causal else "Model"), dtype), indent=1)
    write_atomic(folder / "config.json", text + "\n")


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


def save_embedder(embedder: Embedder, folder: Path, base: str = "", modules: bool = True) -> None:
    """A folder that load_embedder, PEFT and sentence-transformers load: the adapter, or all weights where
    there is none.

    base: the checkpoint that the adapter belongs to. modules: with sentence-transformers' module files;
    without them a merged checkpoint is a plain one that also knows its length and prompts.
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
            "prompts": embedder.prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            "append_eos": embedder.append_eos,
        },
    }
    if modules:
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
