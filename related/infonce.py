"""InfoNCE (arXiv 1807.03748): the cross-entropy of softmax(s / tau) with the marked document.

    loss = -log( exp(s_+ / tau) / sum_j exp(s_j / tau) )

over the row's candidates, or, with in-batch negatives, over all documents of the step, of all processes;
equal texts count once. Needs the label that DREAM does without, and no judge.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attention import log_softmax_scores
from data import Batch, Objective, Piece, Row, Rows, to_device
from support.files import InputError
from support.launch import join_processes
from support.show import progress


class InfoNCE(Objective):
    needs_judge = False
    flags = "in_batch_negatives"

    def __init__(self, in_batch_negatives: bool = False, together: int = 1 << 30):
        self.in_batch_negatives, self.together = in_batch_negatives, together

    def check(self, rows: Rows, usable: list[int]) -> None:
        for index in progress(usable, desc="check", unit="row", hidden=len(rows) < 50_000):
            if (row := rows[index]).positive is None:
                raise InputError(
                    f"{row.where}: --objective infonce needs 'positive', the index of the relevant document, "
                    f"among the first {rows.num_candidates} (--candidates)"
                )

    def prepare(self, rows: list[Row], seed: tuple[int, ...]) -> list[tuple[Any, int]]:
        return [(None, 0) for _ in rows]

    def loss(self, piece: Piece, log_weights: Tensor, embeddings: Tensor, batch: Batch) -> Tensor:
        positives = to_device(piece.positives[:, 1:], log_weights.device)  # (B, 1): every row has one
        return -log_weights.gather(1, positives)[:, 0]


class InBatch:
    """In-batch negatives: a row's softmax is over its candidates and all other documents of the step.

    InfoNCE tells the relevant one from all of them. DREAM's judge reads the row's candidates alone, and their
    weights add up to W < 1. With M_t and a_tj of attention.py, where the softmax makes up for the rest:

        a'_tj = M_t w_i a_tj / sum_{j' in S_i} a_tj' / Z_t     keys j of document i;  Z_t = 1 - M_t + M_t W
        a'_tj = a_tj / Z_t                                     all other keys

    So weight on other rows' documents is attention that the row's own lose: the loss rises where they help.
    """

    def __init__(self, embeddings: Tensor, batch: Batch):
        """embeddings: (U, C), of the batch's texts, a leaf."""
        self.embeddings, self.num_queries = embeddings, batch.num_queries
        self.own = to_device(batch.digests, embeddings.device)  # (D,)
        self.gathered = gather_rows(embeddings[batch.num_queries :])  # (M, C), of all processes
        # A leaf: here the pieces' gradients add up, and processes exchange them once.
        self.documents = self.gathered.detach().requires_grad_()
        self.digests = gather_rows(self.own[:, None])[:, 0]  # (M,)
        self.first = ~(self.digests[:, None] == self.digests).tril(-1).any(1)  # (M,), of equal texts

    def log_share(
        self, scores: Tensor, present: Tensor, queries: Tensor, candidates: Tensor, temperature: float
    ) -> Tensor:
        """log of the weight that a row's own candidates have together, (B, 1).

        scores, present: (B, N); queries (B,), candidates (B, N): their numbers among the batch's texts.
        """
        digests = self.own[candidates - self.num_queries]  # (B, N)
        others = self.first & (digests[..., None] != self.digests).all(1)  # (B, M)
        scores = torch.cat([scores, self.embeddings[queries] @ self.documents.T], 1)
        log_weights = log_softmax_scores(scores, torch.cat([present, others], 1), temperature)
        return log_weights[:, : present.shape[1]].logsumexp(1, keepdim=True)

    def backward(self) -> None:
        """Send the documents' gradient on to the embeddings."""
        self.gathered.backward(self.documents.grad)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rank, processes = join_processes()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(processes)]  # by gloo: no GPU waits
        torch.distributed.all_gather(lengths, torch.tensor([len(rows)]))
        counts = torch.cat(lengths).tolist()
        padded = F.pad(rows, (0, 0, 0, max(counts) - len(rows)))
        parts = [torch.empty_like(padded) for _ in range(processes)]
        torch.distributed.all_gather(parts, padded)
        ctx.own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient)
        return gradient[ctx.own]


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, (M, C); each process gets back the gradient of its own."""
    return _GatherRows.apply(rows) if join_processes()[1] > 1 else rows
