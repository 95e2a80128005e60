"""Revela (arXiv 2506.16552): texts of a group help to predict one another; retriever and judge learn.

The rows of a step are the texts of groups of n, each with its first half as query. The weights over the
others of its group are w_ij = softmax_{j != i}(s_ij / tau). The language model reads twice: pass 1 reads each
text by itself and keeps keys and values, in the graph; in pass 2 every head of every layer adds

    sum_{j != i} w_ij b_ij        b_ij = softmax(q_i k_j' / sqrt(D)) v_j, attention to all of text j's tokens

to what a row of text i reads of its own text. The loss is the mean next-token loss over a group's tokens. It
reads no query and no target: groups are made of a row's documents.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attention import exact
from data import Batch, Document, Objective, Piece, PromptBuilder, Row, pad, to_device
from model import Cache, CausalLM, Embedder
from support.files import InputError


class Revela(Objective):
    temperature = 1e-4
    flags = "judge judge_context judge_lr judge_batch group_size normalise_values"
    one_hot = True
    judge_may_learn = judge_learns = documents_only = True

    def __init__(
        self,
        judge: CausalLM,
        builder: PromptBuilder,
        retriever: Embedder,
        together: int = 4,
        group_size: int = 16,
        normalise_values: bool = False,
    ):
        """together: groups that are read at once. normalise_values: as in CrossDocument."""
        self.judge, self.builder, self.retriever, self.together = judge, builder, retriever, together
        self.group_size, self.normalise_values = group_size, normalise_values

    def group(self, rows: list[Row], least: int) -> list[list[Row]]:
        groups = revela_groups(self.retriever, rows, self.group_size, least)
        if len(groups) < least:
            raise InputError(f"--batch {len(rows)}: makes {len(groups)} groups for {least} processes")
        return groups

    def prepare(self, rows: list[Row], seed: tuple[int, ...]) -> list[tuple[Any, int]]:
        read = self.builder.plain([row.target for row in rows], self.retriever.max_length)
        return [(token_ids, 2 * len(token_ids)) for token_ids in read]  # two passes

    def loss(self, piece: Piece, log_weights: Tensor, embeddings: Tensor, batch: Batch) -> Tensor:
        """Each text's share of its group's mean next-token loss, times n; (B,), groups one after another."""
        n, lengths = log_weights.shape[1] + 1, [len(ids) for ids in piece.inputs]
        input_ids, on_device = pad(piece.inputs, log_weights.device)  # (B, T)
        alone = self.judge.model.read(input_ids, on_device)
        own = torch.arange(len(lengths), device=log_weights.device)[:, None] % n  # (B, 1), of each text
        others = torch.arange(n - 1, device=log_weights.device).expand_as(log_weights)  # (B, n - 1)
        others = others + (others >= own)  # their places: all but its own
        weights = log_weights.new_zeros(len(lengths), n).scatter(1, others, log_weights.exp())
        cross = CrossDocument(weights.unflatten(0, (-1, n)), alone, self.normalise_values)
        hidden = self.judge.model(input_ids, change=cross)  # (B, T, C)

        def chunk_loss(rows: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(exact(self.judge.lm_head(rows)), targets, reduction="none")

        owner = [text for text, length in enumerate(lengths) for _ in range(length - 1)]
        place = [position for length in lengths for position in range(length - 1)]
        owners, places = (to_device(torch.tensor(x), input_ids.device) for x in (owner, place))  # (K,)
        chunks = zip(hidden[owners, places].split(512), input_ids[owners, places + 1].split(512), strict=True)
        # Some logits at a time, computed again in the backward pass: 152k words outweigh everything else.
        losses = torch.cat([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks])  # (K,)
        summed = losses.new_zeros(len(lengths)).index_add(0, owners, losses)  # (B,)
        tokens = (on_device - 1).unflatten(0, (-1, n)).sum(1).clamp(min=1)  # (G,), of each group
        return summed * n / tokens.repeat_interleave(n)


@dataclass
class CrossDocument:
    """Revela's second pass as a change of attention: the texts of G groups of n read one another.

    weights (G, n, n) float, row i: how much text i takes from each other one; 0 on the diagonal. alone: keys
    and values of the first pass, (G*n, Hkv, S, D) each. normalise_values: divide what is read by the
    attention-weighted norm of the values, sum_s a_s |v_js| + 1e-6.
    """

    weights: Tensor
    alone: Cache
    normalise_values: bool = False

    def __call__(
        self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, layer: int
    ) -> Tensor:
        """out plus what each row reads of the other texts, (G*n, Hq, T, D); q: (G*n, Hq, T, D)."""
        groups, n = self.weights.shape[:2]
        keys, values = (x[layer].unflatten(0, (groups, n)) for x in (self.alone.keys, self.alone.values))
        real = torch.arange(keys.shape[3], device=q.device) < self.alone.lengths[:, None]  # (G*n, S)
        real = real.unflatten(0, (groups, n))[:, :, None, None]  # (G, n, 1, 1, S)
        # To the keys of one text all else are rows: of every text, and of every head that shares them.
        rows = q.unflatten(1, (keys.shape[2], -1)).flatten(
            2, 3
        )  # (G*n, Hkv, H*T, D), H heads share their keys
        rows = rows.unflatten(0, (groups, n)).transpose(1, 2).flatten(2, 3)  # (G, Hkv, n*H*T, D)
        weights = self.weights.repeat_interleave(rows.shape[2] // n, dim=1)  # (G, n*H*T, n)
        total = torch.zeros_like(exact(rows))
        if self.normalise_values:
            # Beside the values, in 8 columns: fused kernels take no width that 8 does not divide.
            norms = values.norm(dim=-1, keepdim=True)  # (G, n, Hkv, S, 1)
            values = torch.cat([values, norms.expand(*norms.shape[:-1], 8)], dim=-1)
        for j in range(n):
            read = F.scaled_dot_product_attention(rows, keys[:, j], values[:, j], attn_mask=real[:, j])
            if self.normalise_values:
                read = read[..., :-8] / (read[..., -1:] + 1e-6)
            total = total + weights[:, None, :, j, None] * exact(read)  # (G, Hkv, n*H*T, D)
        total = total.to(q.dtype).unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1)  # (G*n, Hkv, H*T, D)
        return out + total.reshape(q.shape)


def revela_groups(retriever: Embedder, rows: list[Row], size: int, least: int = 1) -> list[list[Row]]:
    """Groups of `size` different documents, each as a row: its first half asks for the others.

    A group is a row's candidates, topped up with those of the rows that follow. There are as many groups as
    the retriever's tokens pay for that another objective spends on these rows, and at least `least`: a group
    costs its documents and their first halves.
    """

    def tokens(texts: Iterable[str], kind: str) -> int:
        return sum(map(len, retriever.tokenize(list(dict.fromkeys(texts)), kind)))

    budget = tokens((row.query for row in rows if row.query), "query")
    budget += tokens((document.full_text for row in rows for document in row.documents), "document")
    groups, position, spent = list[list[Row]](), 0, 0
    while position < len(rows):
        first, group = position, dict[Document, None]()
        while len(group) < size and position < first + len(rows):
            group |= dict.fromkeys(rows[position % len(rows)].documents)
            position += 1
        documents = list(group)[:size]
        halves = [first_half(document.full_text) for document in documents]
        spent += tokens(halves, "query") + tokens((d.full_text for d in documents), "document")
        if len(groups) >= least and spent > budget:
            break
        index, where = rows[first].index, rows[first].where
        pairs = zip(halves, documents, strict=True)
        groups.append(
            [
                Row(index, half, d.full_text, [other for other in documents if other is not d], None, where)
                for half, d in pairs
            ]
        )
    return groups


def first_half(text: str) -> str:
    words = text.split()
    return " ".join(words[: (len(words) + 1) // 2])
