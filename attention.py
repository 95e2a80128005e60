"""The method: a retriever's document weights, injected into the attention of a frozen language model.

This file knows tensors only: no tokens, no configurations, no files. Read it alone if you know softmax
attention.

A language model (the judge) reads N candidate documents, then a query, then the target output. In a few
selected heads, and only in the rows that predict the target, the retriever decides how the attention on
documents is shared out. With l_tj the logits (pre-softmax) of such a head at row t, a_tj = softmax_j(l_tj),
S_i the keys of document i, and w = softmax(scores / tau) the retriever's weights over the candidates:

    M_t   = sum_i sum_{j in S_i} a_tj                   the documents' attention budget at this row    (1)
    a'_tj = M_t * w_i * a_tj / sum_{j' in S_i} a_tj'    for keys j of document i                       (2)
    a'_tj = a_tj                                        for all other keys                             (3)

*Which document* is read is the retriever's choice; *which tokens of it* stays the judge's; every row still
sums to 1. The same thing as a bias on the logits, which is the form computed here, exact and not an
approximation:

    b_ti  = log w_i + logsumexp_{all documents}(l_t.) - logsumexp_{S_i}(l_t.)                          (4)

With `keep_budget=False` documents get all the attention, M_t = 1: b_ti = log w_i - logsumexp_{S_i}(l_t.), and
every other key is hidden. Gradients flow through both logsumexps: later injected layers see queries that
already depend on the scores, and a detached logsumexp would give the right output and a wrong gradient.

    keys j ->  instruction | document 1 | document 2 | ... | document N | query | target
              +------------+------------+------------+-----+------------+-------+--------+
    rows t    |            |                                            |                |
    documents |   causal   |       causal: documents never see          |                |
              |            |       the scores, so their keys and        |                |
              |            |       values are computed once             |                |
    query     |            |                                            | causal         |
              +------------+============+============+=====+============+----------------+
    rows that |            # b_t1       | b_t2       | ... | b_tN       #                |
    predict   |  unbiased  # one number per (row, head, document),      #  unbiased      |
    target    |            # the same for all tokens of the document    #     causal     |
              +------------+============+============+=====+============+----------------+

Source: DREAM (arXiv 2606.24667). That the budget is kept, and that only rows which predict the target are
injected, are choices of this implementation; both have a switch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Stands in for log 0: exp(-1e4) is exactly 0 in every float type, and unlike -inf it has no NaN gradients.
LOG_ZERO = -1e4
SHORT = 512  # keys; up to here a CPU trains faster without the fused kernel
Heads = list[tuple[int, int]]  # (layer, query head)


def exact(x: Tensor) -> Tensor:
    """x in float32, where it was half precision: scores, softmaxes and losses are never computed in less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def head_tensors(heads: Heads, device: torch.device) -> dict[int, Tensor]:
    """layer -> its heads, as the injection wants them; made once, so that no step waits for a copy."""
    layers = sorted({layer for layer, _ in heads})
    return {la: torch.tensor(sorted(h for other, h in heads if other == la), device=device) for la in layers}


def log_softmax_scores(scores: Tensor, present: Tensor, temperature: float) -> Tensor:
    """log w = log_softmax(s / tau) over each query's candidates, (B, N) float32; -inf where there is none."""
    return (exact(scores) / temperature).masked_fill(~present, -torch.inf).log_softmax(-1)


@dataclass
class Injection:
    """What the scores of a batch need on their way through the judge: a change of its attention.

    All rows of the suffix over a cached prefix are injected; the documents are in the prefix.
    log_weights: (B, N) float, log w; -inf where there is no candidate. In-batch negatives take part of the 1.
    documents:   (B, P) int64, for each key of the prefix the document it belongs to, N for keys of none.
                 Later keys, the suffix's own, belong to no document.
    heads:       layer -> int64 tensor of its selected query heads.
    keep_budget: documents share the attention the judge gave them (True), or get all of it (False).
    """

    log_weights: Tensor
    documents: Tensor
    heads: dict[int, Tensor]
    keep_budget: bool = True

    def __call__(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, layer: int) -> Tensor:
        """The layer's attention `out` (B, Hq, T, D) with its selected heads computed anew, in float32."""
        if layer not in self.heads:
            return out
        heads = self.heads[layer]
        kv_heads = heads // (q.shape[1] // k.shape[1])
        rows = injected_attention(
            exact(q.index_select(1, heads)),  # (B, H, T, D), H selected heads
            exact(k.index_select(1, kv_heads)),  # (B, H, S, D)
            exact(v.index_select(1, kv_heads)),
            visible,
            self,
        )
        return out.index_copy(1, heads, rows.to(out.dtype))


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Grouped-query attention of T rows over S keys.

    q: (B, Hq, T, D); k, v: (B, Hkv, S, D), Hq a multiple of Hkv; RoPE already applied. visible: (B, T, S)
    bool, which keys a row sees; None is plain causal attention with T = S. Rows padded on the right need no
    mask then: pads come last, so no real row sees them. Returns (B, Hq, T, D) in q's dtype.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled() and k.shape[2] <= SHORT:
        return _short_attention(q, k, v, visible)
    return _causal_attention(q, k, v) if visible is None else _masked_attention(q, k, v, visible)


def injected_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, injection: Injection) -> Tensor:
    """Equations (2) and (3) for heads that are all selected: softmax(logits + b) v.

    q: (B, H, R, D); k, v: (B, H, S, D); visible: (B, R, S) bool. Returns (B, H, R, D);
    gradients reach q, k, v and injection.log_weights.
    """
    num_keys, num_documents = k.shape[2], injection.log_weights.shape[1]
    documents = F.pad(injection.documents, (0, num_keys - injection.documents.shape[1]), value=num_documents)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, H, R, S)
    bias = document_bias(logits, documents, injection.log_weights, injection.keep_budget)  # (B, H, R, N)
    # One more column for keys outside documents: (3) leaves them alone; without a budget they are hidden.
    bias = F.pad(bias, (0, 1), value=0.0 if injection.keep_budget else LOG_ZERO)
    bias = bias.gather(-1, documents[:, None, None, :].expand_as(logits))  # (B, H, R, S)
    bias = bias.masked_fill(~visible[:, None], -torch.inf)
    if bias.requires_grad and not q.requires_grad:
        # The first injected layer of a frozen judge: a fused kernel's backward wants a gradient of q beside
        # the mask's.
        q = q.detach().requires_grad_()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def document_bias(logits: Tensor, documents: Tensor, log_weights: Tensor, keep_budget: bool = True) -> Tensor:
    """Equation (4): the bias b of each (row, head, document).

    logits: (B, H, R, S), finite, not masked; documents: (B, S) as in Injection; log_weights: (B, N).
    Returns (B, H, R, N); columns of missing candidates hold a number that no key will ever get.
    """
    lse = document_logsumexp(logits, documents, log_weights.shape[1])  # (B, H, R, N)
    log_weights = log_weights.to(logits.dtype).clamp(min=LOG_ZERO)[:, None, None, :]
    budget = lse.logsumexp(-1, keepdim=True) if keep_budget else 0.0  # empty documents add exp(LOG_ZERO) = 0
    return log_weights + budget - lse


def document_logsumexp(logits: Tensor, documents: Tensor, num_documents: int) -> Tensor:
    """logsumexp of a row's logits over the keys of each document; LOG_ZERO for a document without keys.

    logits: (B, H, R, S); documents: (B, S). Returns (B, H, R, N). One pass over the keys however many
    documents there are; the largest logit of *each* document is taken out first, so that none underflows
    beside a louder one.
    """
    index = documents[:, None, None, :].expand_as(logits)
    shape = (*logits.shape[:-1], num_documents + 1)  # the last column collects the keys outside documents
    peak = logits.new_full(shape, LOG_ZERO).scatter_reduce(
        -1, index, logits.detach(), "amax", include_self=False
    )
    mass = logits.new_zeros(shape).scatter_add(-1, index, torch.exp(logits - peak.gather(-1, index)))
    empty = mass == 0
    return (peak + mass.masked_fill(empty, 1.0).log())[..., :num_documents]


def _short_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Either kind as plain products with a graph, (B, Hq, T, D): on a CPU the fused kernel's backward is
    slower where texts are short, three times at 70 tokens. The heads of a group are rows of one."""
    batch, num_heads, num_rows, dim = q.shape
    kv_heads, num_keys = k.shape[1:3]
    if visible is None:
        visible = torch.ones(1, num_rows, num_keys, dtype=torch.bool).tril()
    mask = exact(q.new_zeros(1)).masked_fill(~visible, -torch.inf)[:, None, None]  # (B, 1, 1, T, S)
    mask = mask.expand(batch, kv_heads, num_heads // kv_heads, -1, -1)
    q, k, v = exact(q.reshape(batch * kv_heads, -1, dim)), exact(k.flatten(0, 1)), v.flatten(0, 1)
    with torch.autocast("cpu", enabled=False):  # of --full: it would round the logits
        logits = torch.baddbmm(mask.reshape(*q.shape[:2], num_keys), q, k.transpose(1, 2), alpha=dim**-0.5)
    return (logits.softmax(-1).to(v.dtype) @ v).view(batch, num_heads, num_rows, -1)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain causal attention, (B, Hq, T, D). On CUDA no fused float32 kernel knows groups: there the keys are
    repeated, or all logits would be held at once."""
    if q.is_cuda and q.dtype == torch.float32 and not torch.is_autocast_enabled("cuda"):
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Attention under an explicit mask, (B, Hq, T, D). No fused kernel with a mask knows groups: the heads of
    a group become rows of one, or, where its mask would then outgrow the keys, the keys are repeated."""
    batch, num_heads, num_rows, dim = q.shape
    group = num_heads // k.shape[1]
    if num_rows > dim:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None])
    q = q.reshape(batch, k.shape[1], group * num_rows, dim)  # (B, Hkv, G*T, D)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.repeat(1, group, 1)[:, None])
    return out.reshape(batch, num_heads, num_rows, dim)  # (B, Hq, T, D)
