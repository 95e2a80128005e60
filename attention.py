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


def exact(x: Tensor) -> Tensor:
    """x in float32, where it was half precision: scores, softmaxes and losses are never computed in less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class Injection:
    """What the scores of a batch need on their way through the judge.

    log_weights: (B, N) float, log_softmax(scores / tau) over a query's candidates; -inf where there is none.
    documents:   (B, S') int64, for each key position the document it belongs to, N for keys of no document.
                 Keys after the last position given (the suffix over a cached prefix) belong to no document.
    heads:       layer -> int64 tensor of its selected query heads.
    keep_budget: documents share the attention the judge gave them (True), or get all of it (False).
    first_row:   (B,) int64, the first injected row of each prompt; all later rows are injected too. None: all
                 rows are (of a suffix over a cached prefix). Injected rows must come after the documents.
    start:       a lower bound of first_row, known to the host: earlier rows are not computed again.
    """

    log_weights: Tensor
    documents: Tensor
    heads: dict[int, Tensor]
    keep_budget: bool = True
    first_row: Tensor | None = None
    start: int = 0


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None = None,
    injection: "Injection | CrossDocument | None" = None,
    layer: int = 0,
) -> Tensor:
    """Grouped-query attention of T rows over S keys, with the selected heads of `layer` injected.

    q: (B, Hq, T, D); k, v: (B, Hkv, S, D), Hq a multiple of Hkv; RoPE already applied. visible: (B, T, S)
    bool, which keys a row sees; None is plain causal attention with T = S. Rows padded on the right need no
    mask then: pads come last, so no real row sees them. Returns (B, Hq, T, D) in q's dtype. The injected rows
    are computed in float32 (float64 stays float64).
    """
    if visible is None:
        out = _causal_attention(q, k, v)
    else:
        out = _masked_attention(q, k, v, visible)
    if isinstance(injection, CrossDocument):
        return out + cross_document_attention(q, injection, layer)
    if injection is None or layer not in injection.heads:
        return out
    heads, start = injection.heads[layer], injection.start
    kv_heads = heads // (q.shape[1] // k.shape[1])
    if visible is None:
        keys = torch.arange(k.shape[2], device=q.device)
        visible = (keys <= keys[start:, None])[None]  # (1, R, S)
    else:
        visible = visible[:, start:]  # (B, R, S)
    rows = injected_attention(
        exact(q[:, :, start:].index_select(1, heads)),  # (B, H, R, D), H selected heads, R = T - start rows
        exact(k.index_select(1, kv_heads)),  # (B, H, S, D)
        exact(v.index_select(1, kv_heads)),
        visible,
        injection,
    )
    rows = out[:, :, start:].index_copy(1, heads, rows.to(out.dtype))
    return rows if start == 0 else torch.cat([out[:, :, :start], rows], dim=2)


def injected_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, injection: Injection) -> Tensor:
    """Equations (2) and (3) for heads that are all selected: softmax(logits + b) v.

    q: (B, H, R, D), the rows from injection.start on; k, v: (B, H, S, D); visible: (B or 1, R, S) bool.
    Returns (B, H, R, D). Gradients reach q, k, v and injection.log_weights.
    """
    num_keys, num_documents = k.shape[2], injection.log_weights.shape[1]
    documents = F.pad(injection.documents, (0, num_keys - injection.documents.shape[1]), value=num_documents)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, H, R, S)
    bias = document_bias(logits, documents, injection.log_weights, injection.keep_budget)  # (B, H, R, N)
    # One more column for keys outside documents: (3) leaves them alone; without a budget they are hidden.
    bias = F.pad(bias, (0, 1), value=0.0 if injection.keep_budget else LOG_ZERO)
    bias = bias.gather(-1, documents[:, None, None, :].expand_as(logits))  # (B, H, R, S)
    if injection.first_row is not None:
        row = torch.arange(injection.start, injection.start + q.shape[2], device=q.device)
        injected = row >= injection.first_row[:, None]  # (B, R)
        bias = bias.masked_fill(~injected[:, None, :, None], 0.0)
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


@torch.no_grad()
def attention_to_keys(q: Tensor, k: Tensor, visible: Tensor, row_weights: Tensor) -> Tensor:
    """How much attention each key gets from a weighted mean of rows, per query head: what selects and
    describes heads.

    q: (B, Hq, T, D); k: (B, Hkv, S, D); visible: (B, T, S) bool; row_weights: (B, T) float, each row of it
    summing to 1. Returns (B, Hq, S) float32.
    """
    group = q.shape[1] // k.shape[1]
    logits = (
        q.float() @ k.float().repeat_interleave(group, 1).transpose(-1, -2) * q.shape[-1] ** -0.5
    )  # (B, Hq, T, S)
    probabilities = logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhts,bt->bhs", probabilities, row_weights)


def isolated_documents(documents: Tensor, num_documents: int) -> Tensor:
    """Which keys a causal row sees when no document sees another: (B, S, S) bool.

    documents: (B, S) as in Injection. Rows outside documents (instruction, query) see everything before them.
    """
    causal = torch.ones(documents.shape[1], documents.shape[1], dtype=torch.bool, device=documents.device)
    outside = documents == num_documents  # (B, S)
    same = documents[:, :, None] == documents[:, None, :]  # (B, S, S)
    return causal.tril() & (same | outside[:, :, None] | outside[:, None, :])


# What DREAM is compared with: Revela (arXiv 2506.16552)


@dataclass
class CrossDocument:
    """What the texts of G groups of n need to read one another, in every layer and head, in Revela's second
    pass.

    weights:          (G, n, n) float, row i: how much text i takes from each other one; 0 on the diagonal.
    keys, values:     layer -> (G*n, Hkv, S, D), of the first pass, in which each text was read by itself.
    lengths:          (G*n,) int64; later keys are padding.
    normalise_values: divide what is read by the attention-weighted norm of the values.
    """

    weights: Tensor
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    lengths: Tensor
    normalise_values: bool = False


def cross_document_attention(q: Tensor, cross: CrossDocument, layer: int) -> Tensor:
    """What each row adds to its causal attention: sum_{j != i} w_ij b_ij, for rows of text i.

    b_ij = softmax(q_i k_j' / sqrt(D)) v_j is attention to all of text j's tokens; normalised, it is divided
    by sum_s a_s |v_js| + 1e-6. q: (G*n, Hq, T, D). Returns (G*n, Hq, T, D) in q's dtype; gradients reach q,
    keys, values and weights.
    """
    groups, n = cross.weights.shape[:2]
    keys, values = (x[layer].unflatten(0, (groups, n)) for x in (cross.keys, cross.values))
    real = torch.arange(keys.shape[3], device=q.device) < cross.lengths[:, None]  # (G*n, S)
    real = real.unflatten(0, (groups, n))[:, :, None, None]  # (G, n, 1, 1, S)
    # To the keys of one text all else are rows: of every text, and of every head that shares them.
    rows = q.unflatten(1, (keys.shape[2], -1)).flatten(2, 3)  # (G*n, Hkv, H*T, D), H heads share their keys
    rows = rows.unflatten(0, (groups, n)).transpose(1, 2).flatten(2, 3)  # (G, Hkv, n*H*T, D)
    weights = cross.weights.repeat_interleave(rows.shape[2] // n, dim=1)  # (G, n*H*T, n)
    total = torch.zeros_like(exact(rows))
    if (
        cross.normalise_values
    ):  # beside the values, in 8 columns: fused kernels take no width that 8 does not divide
        norms = values.norm(dim=-1, keepdim=True)  # (G, n, Hkv, S, 1)
        values = torch.cat([values, norms.expand(*norms.shape[:-1], 8)], dim=-1)
    for j in range(n):
        k, v = keys[:, j], values[:, j]  # (G, Hkv, S, D)
        read = F.scaled_dot_product_attention(rows, k, v, attn_mask=real[:, j])  # (G, Hkv, n*H*T, D)
        if cross.normalise_values:
            read = read[..., :-8] / (read[..., -1:] + 1e-6)
        total = total + weights[:, None, :, j, None] * exact(read)
    total = total.to(q.dtype).unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1)  # (G*n, Hkv, H*T, D)
    return total.reshape(q.shape)


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
