"""REPLUG-LSR (arXiv 2301.12652): the retriever's distribution is drawn to that of the judge.

    P = softmax(s / gamma)    Q = softmax(log p_judge(target | d_i, query) / beta)    loss = KL(P || Q)

The judge is frozen and reads one prompt a document. `kl` "reverse" is KL(Q || P).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attention import exact
from data import Batch, Objective, Piece, PromptBuilder, Row, Rows, check_prompts, collate
from model import CausalLM, target_loss


class Replug(Objective):
    flags = "judge judge_template judge_context max_target judge_batch judge_temperature target_likelihood kl"
    temperature = 0.1  # gamma; beta likewise, as in a public reproduction

    def __init__(
        self,
        judge: CausalLM,
        builder: PromptBuilder,
        together: int = 4,
        judge_temperature: float = 0.1,
        likelihood: str = "mean",
        kl: str = "forward",
    ):
        """judge_temperature: beta. likelihood: log p per target token ("mean"), or of all of them ("sum")."""
        self.judge, self.builder, self.together = judge, builder, together
        self.beta, self.likelihood, self.kl = judge_temperature, likelihood, kl

    def check(self, rows: Rows, usable: list[int]) -> None:
        check_prompts(rows, self.builder)

    def prepare(self, rows: list[Row], seed: tuple[int, ...]) -> list[tuple[Any, int]]:
        single = [replace(row, documents=[d], positive=None) for row in rows for d in row.documents]
        prompts = iter(self.builder.build(single))
        read = [[next(prompts) for _ in row.documents] for row in rows]
        return [(own, sum(len(prompt.input_ids) - 1 for prompt in own)) for own in read]

    def loss(self, piece: Piece, log_weights: Tensor, embeddings: Tensor, batch: Batch) -> Tensor:
        missing = log_weights == -torch.inf  # (B, N)
        likelihoods = exact(self.likelihoods(piece, missing))  # (B, N)
        log_q = (likelihoods / self.beta).log_softmax(-1).masked_fill(missing, 0.0)
        log_p = log_weights.masked_fill(missing, 0.0)
        if self.kl == "forward":
            return (log_weights.exp() * (log_p - log_q)).sum(-1)
        return (log_q.exp() * (log_q - log_p)).masked_fill(missing, 0.0).sum(-1)

    @torch.no_grad()
    def likelihoods(self, piece: Piece, missing: Tensor) -> Tensor:
        """log p_judge(target | document, query), (B, N), one prompt a document; -inf where there is none."""
        read = collate([prompt for prompts in piece.inputs for prompt in prompts], missing.device)
        losses = target_loss(self.judge, read)  # (all candidates,)
        losses = losses * read.target_owner.sum(-1) if self.likelihood == "sum" else losses
        return losses.new_full(missing.shape, -torch.inf).masked_scatter(~missing, -losses)
