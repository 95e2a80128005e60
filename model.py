"""The networks: a Qwen/Llama decoder, LoRA, the embedder (the retriever), and how the judge predicts.

One decoder serves the judge and the retriever. Three switches tell the families apart: a bias on q/k/v
(Qwen2), a norm on each head's q and k (Qwen3), neither (Llama, Mistral). Attribute names equal the Hugging
Face tensor names, so that a checkpoint loads strictly and without a key map. The numerics follow transformers
operation by operation: RMSNorm in float32, cast back, then times its weight; RoPE angles in float32,
split-halves pairing.

    RoPE rotates pairs of a head's dimensions. Hugging Face checkpoints pair the halves:
        split halves (used here)   (x0, x4) (x1, x5) (x2, x6) (x3, x7)
        interleaved (the paper's)  (x0, x1) (x2, x3) (x4, x5) (x6, x7)

This file never trains and reads no files; checkpoints come from formats/.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, processors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention import attention, exact
from data import JudgeBatch, longest_token, pad, to_device, token_batches
from support.files import InputError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Padded tokens a batch: on a CPU small batches of equal lengths stay in its caches, a GPU wants to be filled.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}


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


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = exact(x)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


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


# (out, q, k, v, visible, layer) -> out: what is done to a layer's attention, as attention.Injection does it.
Change = Callable[[Tensor, Tensor, Tensor, Tensor, Any, int], Tensor]


@dataclass
class Pass:
    """What the layers of one forward pass share."""

    cos: Tensor  # (B or 1, 1, T, D), of the rows' positions
    sin: Tensor
    visible: Tensor | None = None  # (B, T, S) bool, the keys that each row sees; None: plain causal
    prefix: Cache | None = None  # keys and values that come before the rows
    change: Change | None = None
    store: Cache | None = None  # takes the rows' keys and values

    def of_rows(self, rows: Tensor, num_keys: int) -> "Pass":
        """The same for one row of each text, rows (B,)."""
        cos, sin = (angle[0, 0, rows, None, None] for angle in (self.cos, self.sin))  # (B, 1, 1, D)
        visible = (torch.arange(num_keys, device=rows.device) <= rows[:, None])[:, None]  # (B, 1, S)
        return replace(self, cos=cos, sin=sin, visible=visible)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """One row of each text, (B, 1, C) of x (B, T, C)."""
    return x[torch.arange(len(x), device=x.device), rows, None]


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

    def keys_and_values(self, x: Tensor, shared: Pass) -> tuple[Tensor, Tensor]:
        """Of these rows, (B, Hkv, T, D) each; also left in the pass's store, if it has one."""
        batch, rows, _ = x.shape
        k = self.k_proj(x).view(batch, rows, -1, self.head_dim)  # (B, T, Hkv, D)
        v = self.v_proj(x).view(batch, rows, -1, self.head_dim).transpose(1, 2)  # (B, Hkv, T, D)
        k = self.k_norm(k) if hasattr(self, "k_norm") else k
        k = apply_rope(k.transpose(1, 2), shared.cos, shared.sin)  # (B, Hkv, T, D)
        if shared.store is not None:
            shared.store.keys[self.layer], shared.store.values[self.layer] = k, v
        return k, v

    def forward(self, x: Tensor, shared: Pass, only: Tensor | None = None) -> Tensor:
        """only: (B,) the one row of each text to compute, out of T; None for all."""
        k, v = self.keys_and_values(x, shared)
        if only is not None:
            x, shared = take_rows(x, only), shared.of_rows(only, k.shape[2])
        batch, rows, _ = x.shape
        q = self.q_proj(x).view(batch, rows, -1, self.head_dim)  # (B, T, Hq, D)
        q = self.q_norm(q) if hasattr(self, "q_norm") else q
        q = apply_rope(q.transpose(1, 2), shared.cos, shared.sin)  # (B, Hq, T, D)
        if shared.prefix is not None:
            k = torch.cat((shared.prefix.keys[self.layer], k), dim=2)  # (B, Hkv, P + T, D)
            v = torch.cat((shared.prefix.values[self.layer], v), dim=2)
        out = attention(q, k, v, shared.visible)
        if shared.change is not None:
            out = shared.change(out, q, k, v, shared.visible, self.layer)
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

    def forward(self, x: Tensor, shared: Pass, only: Tensor | None = None) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), shared, only)
        x = attended + (x if only is None else take_rows(x, only))
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

    def forward(self, input_ids: Tensor, prefix: Cache | None = None, change: Change | None = None) -> Tensor:
        """Hidden states (B, T, C) after the final norm, of right-padded rows of token ids (B, T).

        prefix: keys and values that come before the rows; positions go on from each prefix's own length.
        change: what is done to each layer's attention.
        """
        x = self.embed_tokens(input_ids)
        return self.norm(self._through(self.layers, x, self._share(x, prefix, change)))

    def read(self, input_ids: Tensor, lengths: Tensor) -> Cache:
        """The keys and values of right-padded rows of token ids (B, T), lengths (B,): no more is computed."""
        x, store = self.embed_tokens(input_ids), Cache(lengths)
        shared = self._share(x, store=store)
        *layers, last = self.layers
        x = self._through(layers, x, shared)
        assert isinstance(last, Layer)
        last.self_attn.keys_and_values(last.input_layernorm(x), shared)
        return store

    def last(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Each text's last hidden state, (B, C); the last layer computes no other row."""
        x = self.embed_tokens(input_ids)
        shared = self._share(x)
        *layers, last = self.layers
        x = self._through(layers, x, shared)
        return self.norm(self._through([last], x, shared, lengths - 1))[:, 0]

    def _through(
        self, layers: Iterable[nn.Module], x: Tensor, shared: Pass, only: Tensor | None = None
    ) -> Tensor:
        again = self.activation_checkpointing and torch.is_grad_enabled()
        for layer in layers:
            x = checkpoint(layer, x, shared, only, use_reentrant=False) if again else layer(x, shared, only)
        return x

    def _share(
        self, x: Tensor, prefix: Cache | None = None, change: Change | None = None, store: Cache | None = None
    ) -> Pass:
        """What the layers share: the angles of the rows x (B, T, C), what they see, and what is passed on."""
        batch, rows, _ = x.shape
        positions, visible = torch.arange(rows, device=x.device)[None], None  # (1, T)
        if prefix is not None:
            positions = prefix.lengths[:, None] + positions  # (B, T)
            width = prefix.keys[0].shape[2]
            in_prefix = torch.arange(width, device=x.device) < prefix.lengths[:, None]  # (B, P)
            causal = torch.ones(rows, rows, dtype=torch.bool, device=x.device).tril()  # (T, T)
            parts = in_prefix[:, None].expand(-1, rows, -1), causal.expand(batch, -1, -1)
            visible = torch.cat(parts, dim=2)  # (B, T, P + T)
        angles = positions[:, None, :, None].float() * rope_frequencies(self.config, x.device)
        angles = torch.cat((angles, angles), dim=-1)  # (B or 1, 1, T, D)
        return Pass(angles.cos().to(x.dtype), angles.sin().to(x.dtype), visible, prefix, change, store)


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

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        low_rank = F.linear(x, self.lora_A.weight.to(x.dtype)) * self.scaling  # (..., r)
        return y + F.linear(low_rank, self.lora_B.weight.to(x.dtype))


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


def lora_layers(decoder: Decoder) -> dict[str, LoRALinear]:
    return {name: module for name, module in decoder.named_modules() if isinstance(module, LoRALinear)}


def add_token(tokenizer: Tokenizer, form: str, token: str, number: int) -> None:
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
                add_token(tokenizer, f"$A {token}", token, eos)
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
        if (prompt := self.prompts.get(kind)) is None:
            raise InputError(f"{kind!r} is no kind of text here; use {', '.join(map(repr, self.prompts))}")
        encoded = self.tokenizer.encode_batch_fast([(prompt + text)[: self._characters] for text in texts])
        nothing = [self.decoder.config.eos_token_id or 0]  # an empty text still gets an embedding
        return [encoding.ids or nothing for encoding in encoded]

    def embed(self, token_ids: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
        """One forward pass: (B, C) float32 unit vectors on the embedder's device."""
        input_ids, lengths = pad(token_ids, self.device)  # (B, T), (B,)
        mixed = self.dtype != self.decoder.embed_tokens.weight.dtype
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=mixed):
            hidden = self.decoder.last(input_ids, lengths)  # (B, C)
        return F.normalize(exact(hidden), dim=-1)

    @torch.no_grad()
    def embed_all(
        self,
        token_ids: Sequence[Sequence[int] | np.ndarray],
        batch_tokens: int | None = None,
        bar: Any = None,
    ) -> Tensor:
        """Embeddings of any number of texts: (N, C) float32 unit vectors on the embedder's device.

        In batches of similar length whose padded size is at most `batch_tokens` (default: by device); one
        that the device's memory does not hold is halved. A text that repeats is computed once. `bar` counts
        tokens. Raises InputError when an embedding is not finite, or memory does not hold a single text.
        """
        numbers: dict[bytes, int] = {}
        rows = [numbers.setdefault(np.array(ids, np.int32).tobytes(), len(numbers)) for ids in token_ids]
        distinct, repeats = [np.frombuffer(ids, np.int32) for ids in numbers], Counter(rows)
        lengths = [len(ids) for ids in distinct]
        embeddings = torch.empty(len(distinct), self.dim, device=self.device)  # (distinct texts, C)
        training = self.training
        self.eval()  # no dropout, also when asked in the middle of a training
        batches = deque(token_batches(lengths, batch_tokens or BATCH_TOKENS[self.device.type]))
        while batches:
            batch = batches.popleft()
            try:
                embedded = self.embed([distinct[i] for i in batch])  # (B, C)
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    told = str(error).splitlines()[0][:200]
                    raise InputError(
                        f"out of memory with one text of {lengths[batch[0]]} tokens ({told})"
                    ) from error
                half = len(batch) // 2
                batches.extendleft((batch[half:], batch[:half]))
                continue
            embeddings[to_device(torch.tensor(batch), self.device)] = embedded
            if bar is not None:
                bar.update(sum(lengths[i] * repeats[i] for i in batch))
        self.train(training)
        if not embeddings.isfinite().all():
            raise InputError("the model's embeddings are not all finite numbers; try --dtype float32")
        return embeddings[to_device(torch.tensor(rows, dtype=torch.long), self.device)]

    def encode(self, texts: str | list[str], kind: str, batch_tokens: int | None = None) -> Tensor:
        """Embeddings of one text or several, (N, C) float32 unit vectors. kind: query, document."""
        texts = [texts] if isinstance(texts, str) else texts
        return self.embed_all(self.tokenize(texts, kind), batch_tokens)

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


# The judge


def learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def read_prefix(judge: CausalLM, batch: JudgeBatch) -> Cache:
    """Keys and values of all before the injected rows: no score reaches them, so a frozen judge needs no
    graph."""
    with nullcontext() if learns(judge) else torch.no_grad():
        return judge.model.read(batch.prefix_ids, batch.prefix_lengths)


def target_loss(
    judge: CausalLM, batch: JudgeBatch, prefix: Cache | None = None, change: Change | None = None
) -> Tensor:
    """Each prompt's mean next-token loss over its target tokens, (B,) float32, in nats.

    prefix: the batch's, if it was read before. change: what is done to the judge's attention in the suffix.
    """
    prefix = prefix or read_prefix(judge, batch)
    hidden = judge.model(batch.suffix_ids, prefix, change)  # (B, T, C)
    # Only the rows that predict target tokens reach the output projection: 152k words outweigh a layer.
    logits = judge.lm_head(hidden.flatten(0, 1)[batch.target_rows])  # (K, V)
    nll = F.cross_entropy(exact(logits), batch.target_ids, reduction="none")  # (K,)
    owner = batch.target_owner.to(nll.dtype)  # (B, K)
    return owner @ nll / owner.sum(-1)
