"""The injection against a float64 reference written straight from the equations, and its two fast paths."""

import math

import pytest
import torch
from tiny import config_file, random_lm

import attention as A
import model as M


def reference(q, k, v, weights, spans, first_row, heads, keep_budget):
    """a'_tj = M_t w_i a_tj / sum_{S_i} a_tj: full matrices, loops, no cache. q (Hq, T, D); weights (N,)."""
    group, outputs = q.shape[0] // k.shape[0], []
    for h in range(q.shape[0]):
        logits = q[h] @ k[h // group].T / math.sqrt(q.shape[-1])
        a = logits.masked_fill(~torch.ones_like(logits, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
        rows = []
        for t in range(a.shape[0]):
            row = a[t]
            if h in heads and t >= first_row:
                inside = [row[s:e].sum() for s, e in spans]
                budget = sum(inside) if keep_budget else 1.0
                new = row.clone() if keep_budget else torch.zeros_like(row)
                for (s, e), w, mass in zip(spans, weights, inside, strict=True):
                    new[s:e] = budget * w * row[s:e] / mass
                row = new
            rows.append(row @ v[h // group])
        outputs.append(torch.stack(rows))
    return torch.stack(outputs)


def random_case(seed, dtype=torch.float64):
    """Unequal lengths, unequal numbers of candidates, a few selected heads, large logits."""
    g = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=g))

    batch, kv_heads, group, dim = draw(1, 4), draw(1, 3), draw(1, 4), 2 * draw(2, 6)
    most, spans, first_rows, lengths = draw(2, 6), [], [], []
    for b in range(batch):
        position, own = draw(1, 4), []
        for _ in range(most if b == 0 else draw(1, most + 1)):
            end = position + draw(1, 6)
            own.append((position, end))
            position = end
        order = torch.randperm(len(own), generator=g).tolist()  # candidates stand in any order
        spans.append([own[i] for i in order])
        first_rows.append(position + draw(0, 3))
        lengths.append(first_rows[-1] + draw(1, 5))
    width = max(lengths)
    heads = torch.randperm(kv_heads * group, generator=g)[: draw(1, kv_heads * group + 1)].sort().values
    q = torch.randn(batch, kv_heads * group, width, dim, generator=g, dtype=dtype) * 3
    k, v = (torch.randn(batch, kv_heads, width, dim, generator=g, dtype=dtype) for _ in range(2))
    scores = torch.randn(batch, most, generator=g, dtype=dtype)
    return q, k, v, scores, spans, first_rows, lengths, heads


def make_injection(scores, spans, first_rows, num_keys, heads, keep_budget, layer=0):
    num = scores.shape[1]
    documents = torch.full((len(spans), num_keys), num)
    present = torch.zeros(scores.shape, dtype=torch.bool)
    for b, own in enumerate(spans):
        for i, (s, e) in enumerate(own):
            documents[b, s:e] = i
            present[b, i] = True
    log_weights = (scores / 0.3).masked_fill(~present, -torch.inf).log_softmax(-1)
    first = torch.tensor(first_rows)
    return A.Injection(log_weights, documents, {layer: heads}, keep_budget, first, int(first.min()))


@pytest.mark.parametrize("keep_budget", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_injection_equals_the_equations(seed, keep_budget):
    q, k, v, scores, spans, first_rows, lengths, heads = random_case(seed)
    inputs = [x.requires_grad_() for x in (q, k, v, scores)]
    probe = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(1))

    injection = make_injection(scores, spans, first_rows, q.shape[2], heads, keep_budget)
    ours = A.attention(q, k, v, injection=injection)
    theirs = []
    for b, length in enumerate(lengths):
        weights = (scores[b, : len(spans[b])] / 0.3).softmax(-1)
        out = reference(
            q[b, :, :length],
            k[b, :, :length],
            v[b, :, :length],
            weights,
            spans[b],
            first_rows[b],
            heads.tolist(),
            keep_budget,
        )
        theirs.append(out)
    real = torch.zeros(q.shape[0], 1, q.shape[2], 1, dtype=torch.bool)
    for b, length in enumerate(lengths):
        real[b, :, :length] = True
        torch.testing.assert_close(ours[b, :, :length], theirs[b], rtol=0, atol=1e-10)
    grads = torch.autograd.grad((ours * probe * real).sum(), inputs)
    loss = sum((out * probe[b, :, : lengths[b]]).sum() for b, out in enumerate(theirs))
    for name, mine, twin in zip(
        "q k v scores".split(), grads, torch.autograd.grad(loss, inputs), strict=True
    ):
        torch.testing.assert_close(
            mine, twin, rtol=0, atol=1e-10, msg=lambda m, n=name: f"gradient of {n}: {m}"
        )


@pytest.mark.parametrize("keep_budget", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_suffix_over_a_cached_prefix_equals_the_whole_prompt(seed, keep_budget):
    q, k, v, scores, spans, first_rows, lengths, heads = random_case(seed)
    injection = make_injection(scores, spans, first_rows, q.shape[2], heads, keep_budget)
    whole = A.attention(q, k, v, injection=injection)
    for b, (first, length) in enumerate(zip(first_rows, lengths, strict=True)):
        rows, padding = length - first, 3  # the prefix of a batch is padded; those keys must stay invisible
        pad_keys = [
            torch.cat([x[b : b + 1, :, :first], torch.full_like(x[:1, :, :padding], 9.0)], 2) for x in (k, v)
        ]
        keys, values = (
            torch.cat([p, x[b : b + 1, :, first:length]], 2) for p, x in zip(pad_keys, (k, v), strict=True)
        )
        visible = torch.ones(1, rows, first + padding + rows, dtype=torch.bool)
        visible[:, :, first : first + padding] = False
        visible[0, :, first + padding :] = torch.ones(rows, rows, dtype=torch.bool).tril()
        documents = torch.full((1, first + padding), scores.shape[1])
        documents[0, :first] = injection.documents[b, :first]
        part = A.Injection(injection.log_weights[b : b + 1], documents, {0: heads}, keep_budget)
        cached = A.attention(q[b : b + 1, :, first:length], keys, values, visible, part)
        torch.testing.assert_close(cached[0], whole[b, :, first:length], rtol=0, atol=1e-10)


@pytest.mark.parametrize("keep_budget", [True, False])
def test_three_consecutive_injected_layers_of_a_network(keep_budget, tmp_path):
    """Later injected layers see queries that depend on the scores: a detached logsumexp would fail here."""
    model = random_lm(config_file(tmp_path), dtype=torch.float64)
    decoder, heads = model.model, {0: [1, 4], 1: [0, 2], 2: [3, 5]}
    ids = torch.randint(0, 256, (1, 30), generator=torch.Generator().manual_seed(0))
    spans, first_row = [(9, 14), (2, 6), (6, 9)], 20
    scores = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    injection = make_injection(scores, [spans], [first_row], 30, None, keep_budget)
    injection.heads = {layer: torch.tensor(own) for layer, own in heads.items()}
    ours = decoder(ids, injection=injection)[:, first_row:].sin().sum()

    def slow(q, k, v, visible, injection, layer):
        weights = (scores[0] / 0.3).softmax(-1)
        return reference(q[0], k[0], v[0], weights, spans, first_row, heads.get(layer, []), keep_budget)[None]

    original, M.attention = M.attention, slow
    try:
        twin = decoder(ids)[:, first_row:].sin().sum()
    finally:
        M.attention = original
    torch.testing.assert_close(ours, twin, rtol=0, atol=1e-10)
    mine, theirs = (torch.autograd.grad(loss, scores)[0] for loss in (ours, twin))
    assert theirs.abs().max() > 1e-6
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_rows_sum_to_one_and_the_budget_is_shared_by_weight():
    q, k, v, scores, spans, first_rows, lengths, heads = random_case(3)
    v = torch.eye(k.shape[2], dtype=v.dtype).expand(*k.shape[:2], -1, -1)  # outputs are the attention itself
    injection = make_injection(scores, spans, first_rows, q.shape[2], heads, True)
    before, after = A.attention(q, k, v), A.attention(q, k, v, injection=injection)
    h, row = int(heads[0]), first_rows[0]
    mass = torch.stack([after[0, h, row, s:e].sum() for s, e in spans[0]])
    budget = torch.stack([before[0, h, row, s:e].sum() for s, e in spans[0]]).sum()
    torch.testing.assert_close(after[0, h, row].sum(), torch.ones((), dtype=v.dtype))
    torch.testing.assert_close(mass / budget, injection.log_weights[0].exp())


def test_documents_far_apart_in_logits_do_not_underflow():
    """One document's logits lie 300 below another's: in float32 a shared maximum would make its mass zero."""
    logits = torch.tensor([0.0, 0.0, -300.0, -301.0]).view(1, 1, 1, 4)
    documents = torch.tensor([[0, 0, 1, 1]])
    lse = A.document_logsumexp(logits, documents, 3)[0, 0, 0]
    expected = torch.tensor([math.log(2), -300 + math.log(1 + math.exp(-1)), A.LOG_ZERO])
    torch.testing.assert_close(lse, expected)


def test_whole_weight_on_one_candidate_and_missing_candidates_give_finite_gradients():
    q, k, v, scores, spans, first_rows, lengths, heads = random_case(5, torch.float32)
    scores = (scores * 1e4).requires_grad_()
    injection = make_injection(scores, spans, first_rows, q.shape[2], heads, True)
    A.attention(q.requires_grad_(), k, v, injection=injection).sum().backward()
    assert scores.grad.isfinite().all() and q.grad.isfinite().all()


def test_gradient_reaches_scores_where_nothing_else_requires_one():
    """The first injected layer of a frozen judge: only the bias requires a gradient."""
    q, k, v, scores, spans, first_rows, lengths, heads = random_case(7, torch.float32)
    injection = make_injection(scores.requires_grad_(), spans, first_rows, q.shape[2], heads, True)
    A.attention(q, k, v, injection=injection).square().sum().backward()
    assert scores.grad.abs().sum() > 0


def test_attention_to_keys_is_the_softmax():
    q, k, v, *_ = random_case(2)
    visible = torch.ones(q.shape[0], q.shape[2], k.shape[2], dtype=torch.bool).tril()
    weights = torch.full((q.shape[0], q.shape[2]), 1 / q.shape[2])
    v = torch.eye(k.shape[2], dtype=v.dtype).expand(*k.shape[:2], -1, -1)
    expected = A.attention(q, k, v).mean(2).float()
    torch.testing.assert_close(A.attention_to_keys(q, k, visible, weights), expected)
