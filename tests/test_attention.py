"""Attention and the injection against float64 references written straight from the equations, alone and in a
network; on a CPU both ways, plain products up to SHORT keys and the fused kernel above."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import config_file, random_lm, world

from attention import LOG_ZERO, Injection, attention, document_logsumexp, head_tensors
from data import collate
from model import target_loss
from support.launch import CPU


def softmax_attention(q, k, v, visible):
    """The reference: softmax(q k' / sqrt(D)) v over the keys that each row sees, head by head."""
    group = q.shape[1] // k.shape[1]
    outs = []
    for head in range(q.shape[1]):
        own = k[:, head // group], v[:, head // group]
        logits = (q[:, head] @ own[0].mT / math.sqrt(q.shape[-1])).masked_fill(~visible, -torch.inf)
        outs.append(logits.softmax(-1) @ own[1])
    return torch.stack(outs, 1)


def equations(weights, spans, first_row, heads, keep_budget=True):
    """The reference, a change of attention over one whole prompt without a cache: for each selected head and
    each row from first_row on, a'_tj = M_t w_i a_tj / sum_{S_i} a_tj. weights (N,); where they add up to less
    than 1, the other keys get more."""

    def change(out, q, k, v, visible, layer):
        logits = q[0] @ k[0].repeat_interleave(q.shape[1] // k.shape[1], 0).mT / math.sqrt(q.shape[-1])
        maps = list(logits.masked_fill(~torch.ones_like(logits[0]).bool().tril(), -torch.inf).softmax(-1))
        for head in [head for own, head in heads if own == layer]:
            before, a = maps[head].split([first_row, q.shape[2] - first_row])
            inside = [a[:, s:e].sum(-1, keepdim=True) for s, e in spans]
            new, budget = (a.clone(), sum(inside)) if keep_budget else (torch.zeros_like(a), 1.0)
            for (s, e), w, mass in zip(spans, weights, inside, strict=True):
                new[:, s:e] = budget * w * a[:, s:e] / mass
            maps[head] = torch.cat([before, new / new.sum(-1, keepdim=True)])
        return (torch.stack(maps) @ v[0].repeat_interleave(q.shape[1] // k.shape[1], 0))[None]

    return change


class Case:
    """Prompts of unequal lengths and numbers of candidates, a few selected heads, large logits."""

    def __init__(self, seed, dtype=torch.float64):
        g = torch.Generator().manual_seed(seed)

        def draw(low, high):
            return int(torch.randint(low, high, (1,), generator=g))

        batch, kv_heads, group, dim = draw(1, 4), draw(1, 3), draw(1, 4), 2 * draw(2, 6)
        most, self.spans, self.first_rows, self.lengths = draw(2, 6), [], [], []
        for b in range(batch):
            position, own = draw(1, 4), []
            for _ in range(most if b == 0 else draw(1, most + 1)):
                end = position + draw(1, 6)
                own.append((position, end))
                position = end
            order = torch.randperm(len(own), generator=g).tolist()  # candidates stand in any order
            self.spans.append([own[i] for i in order])
            self.first_rows.append(position + draw(0, 3))
            self.lengths.append(self.first_rows[-1] + draw(1, 5))
        width = max(self.lengths)
        heads = torch.randperm(kv_heads * group, generator=g)[: draw(1, kv_heads * group + 1)].tolist()
        self.heads = [(0, head) for head in heads]
        self.q = torch.randn(batch, kv_heads * group, width, dim, generator=g, dtype=dtype) * 3
        self.k, self.v = (torch.randn(batch, kv_heads, width, dim, generator=g, dtype=dtype) for _ in "kv")
        self.scores = torch.randn(batch, most, generator=g, dtype=dtype)

    def injection(self, keep_budget=True):
        documents = torch.full((len(self.spans), max(self.first_rows)), self.scores.shape[1])
        for b, own in enumerate(self.spans):
            for i, (start, end) in enumerate(own):
                documents[b, start:end] = i
        present = torch.arange(self.scores.shape[1]) < torch.tensor([[len(own)] for own in self.spans])
        log_weights = (self.scores / 0.3).masked_fill(~present, -torch.inf).log_softmax(-1)
        return Injection(log_weights, documents, head_tensors(self.heads, log_weights.device), keep_budget)

    def suffix(self):
        """The rows from first_row on over a cached prefix, as a batch: both right-padded with rows of nines,
        which nothing real may see. q (B, Hq, R, D); k, v (B, Hkv, P + R, D); visible (B, R, P + R)."""
        p = max(self.first_rows)
        counts = [length - first for first, length in zip(self.first_rows, self.lengths, strict=True)]
        r = max(counts)

        def rows(x, start, end, width):
            return F.pad(x[:, start:end], (0, 0, 0, width - (end - start)), value=9.0)

        ends = list(enumerate(zip(self.first_rows, self.lengths, strict=True)))
        q = torch.stack([rows(self.q[b], first, end, r) for b, (first, end) in ends])
        k, v = (
            torch.stack([torch.cat([rows(x[b], 0, f, p), rows(x[b], f, end, r)], 1) for b, (f, end) in ends])
            for x in (self.k, self.v)
        )
        prefix = (torch.arange(p) < torch.tensor(self.first_rows)[:, None])[:, None].expand(-1, r, -1)
        causal = torch.ones(r, r).bool().tril().expand(len(counts), -1, -1)
        return q, k, v, torch.cat([prefix, causal], 2), counts

    def injected(self, keep_budget=True):
        """Attention of those rows, injected, without the padding: for each prompt (Hq, its rows, D)."""
        q, k, v, visible, counts = self.suffix()
        out = self.injection(keep_budget)(attention(q, k, v, visible), q, k, v, visible, 0)
        return [own[:, :count] for own, count in zip(out, counts, strict=True)]


# Largest distance from float64, relative to the largest value.
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("rows, prefix", [(11, None), (1, (5, 2, 0)), (3, (9, 4, 0)), (12, (9, 1, 0))])
def test_attention_is_the_softmax(way, rows, prefix, group, dtype):
    """Causal; or rows over right-padded prefixes of unequal lengths, where a first row may see itself alone.
    More rows than a head has dimensions (8) take another way of the fused kernel's."""
    g = torch.Generator().manual_seed(rows + group)
    num_keys = rows + max(prefix or (0,))
    sizes = (3, 2 * group, rows, 8), (3, 2, num_keys, 8), (3, 2, num_keys, 8)
    q, k, v = (torch.randn(size, generator=g).to(dtype) for size in sizes)
    q = q * 3
    causal = torch.ones(rows, rows, dtype=torch.bool).tril().expand(3, -1, -1)
    visible = causal
    if prefix:
        before = torch.arange(max(prefix)) < torch.tensor(prefix)[:, None]  # (B, P)
        visible = torch.cat([before[:, None].expand(-1, rows, -1), causal], 2)
        hidden = F.pad(~before, (0, rows))[:, None, :, None]
        k, v = (x.masked_fill(hidden, 9.0) for x in (k, v))  # nothing may see them
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    own = [x.requires_grad_() for x in (q, k, v)]
    found, expected = attention(*own, visible if prefix else None), softmax_attention(*wide, visible)
    assert found.dtype == dtype
    probe = torch.randn(found.shape, generator=g).to(dtype)
    ours = [found, *torch.autograd.grad(found, own, probe)]
    theirs = [expected, *torch.autograd.grad(expected, wide, probe.double())]
    for name, one, other in zip(("output", "q", "k", "v"), ours, theirs, strict=True):
        distance = (one.double() - other).abs().max() / other.abs().max()
        assert distance <= CLOSE[dtype], f"{name}: {distance:.1e}"


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_of_half_precision_are_float32(autocast):
    """Large ones, which rounding to bfloat16 would move; autocast is how --full computes."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 64, 64, generator=g) for heads in (6, 2, 2))
    q, v = 8 * q, v.bfloat16()
    q, k = (q, k) if autocast else (q.bfloat16(), k.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = attention(q, k, v)
    wide = [x.double() for x in (q, k, v)]
    expected = softmax_attention(*wide, torch.ones(64, 64, dtype=torch.bool).tril()[None])
    assert (found - expected).norm() < 0.004 * expected.norm()


def test_every_row_sees_a_key(tmp_path, monkeypatch):
    """Softmax over no key is NaN one way and 0 the other: it must never be asked for, pads included."""
    judge, _, builder, rows = world(tmp_path)
    seen = []

    def watched(q, k, v, visible=None):
        seen.append(visible is None or bool(visible.any(-1).all()))
        return attention(q, k, v, visible)

    monkeypatch.setattr("model.attention", watched)
    for where in ("target", "suffix"):
        batch = collate(builder.build(rows), CPU, where)
        assert batch.suffix_ids.shape[1] > 1 and len(set(batch.prefix_lengths.tolist())) > 1
        target_loss(judge, batch)
    judge.model.last(batch.prefix_ids, batch.prefix_lengths)
    assert len(seen) > 8 and all(seen)


@pytest.mark.parametrize("keep_budget", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_injection_equals_the_equations(seed, keep_budget):
    case = Case(seed)
    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v, case.scores)]
    ours, theirs = case.injected(keep_budget), []
    for b, (first, length) in enumerate(zip(case.first_rows, case.lengths, strict=True)):
        weights = (case.scores[b, : len(case.spans[b])] / 0.3).softmax(-1)
        change = equations(weights, case.spans[b], first, case.heads, keep_budget)
        own = (x[b : b + 1, :, :length] for x in (case.q, case.k, case.v))
        theirs.append(change(None, *own, None, 0)[0, :, first:])
        torch.testing.assert_close(ours[b], theirs[b], rtol=0, atol=1e-10)
    g = torch.Generator().manual_seed(1)
    probes = [torch.randn(out.shape, dtype=out.dtype, generator=g) for out in ours]
    mine, twin = (
        torch.autograd.grad(sum((o * p).sum() for o, p in zip(out, probes, strict=True)), inputs)
        for out in (ours, theirs)
    )
    for name, own, other in zip("q k v scores".split(), mine, twin, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("keep_budget", [True, False])
def test_three_consecutive_injected_layers_of_a_network(keep_budget, way, tmp_path):
    """Later injected layers see queries that depend on the scores: a detached logsumexp would fail here. Also
    that the suffix over a cached prefix is the whole prompt."""
    decoder = random_lm(config_file(tmp_path), dtype=torch.float64).model
    heads = [(0, 1), (0, 4), (1, 0), (1, 2), (2, 3), (2, 5)]
    ids = torch.randint(0, 256, (1, 30), generator=torch.Generator().manual_seed(0))
    spans, first = [(9, 14), (2, 6), (6, 9)], 20
    documents = torch.full((1, first), 3)
    for i, (start, end) in enumerate(spans):
        documents[0, start:end] = i
    scores = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    tensors = head_tensors(heads, scores.device)
    injection = Injection((scores / 0.3).log_softmax(-1), documents, tensors, keep_budget)
    ours = decoder(ids[:, first:], decoder.read(ids[:, :first], torch.tensor([first])), injection)
    change = equations((scores[0] / 0.3).softmax(-1), spans, first, heads, keep_budget)
    twin = decoder(ids, change=change)[:, first:]
    torch.testing.assert_close(ours, twin, rtol=0, atol=1e-10)
    mine, theirs = (torch.autograd.grad(out.sin().sum(), scores)[0] for out in (ours, twin))
    assert theirs.abs().max() > 1e-6
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_rows_sum_to_one_and_the_budget_is_shared_by_weight():
    case = Case(3)
    q, k, _, visible, _ = case.suffix()
    v = torch.eye(k.shape[2], dtype=k.dtype).expand(*k.shape[:2], -1, -1)  # outputs are the attention itself
    head = case.heads[0][1]
    logits = q[0, head, 0] @ k[0, head // (q.shape[1] // k.shape[1])].T / math.sqrt(q.shape[-1])
    before = logits.masked_fill(~visible[0, 0], -torch.inf).softmax(-1)
    injection = case.injection()
    after = injection(torch.zeros(*q.shape[:3], k.shape[2], dtype=q.dtype), q, k, v, visible, 0)[0, head, 0]
    mass = torch.stack([after[s:e].sum() for s, e in case.spans[0]])
    budget = torch.stack([before[s:e].sum() for s, e in case.spans[0]]).sum()
    torch.testing.assert_close(after.sum(), torch.ones((), dtype=v.dtype))
    torch.testing.assert_close(mass / budget, injection.log_weights[0].exp())


def test_documents_far_apart_in_logits_do_not_underflow():
    """One document's logits lie 300 below another's: in float32 a shared maximum would make its mass zero."""
    logits = torch.tensor([0.0, 0.0, -300.0, -301.0]).view(1, 1, 1, 4)
    documents = torch.tensor([[0, 0, 1, 1]])
    lse = document_logsumexp(logits, documents, 3)[0, 0, 0]
    expected = torch.tensor([math.log(2), -300 + math.log(1 + math.exp(-1)), LOG_ZERO])
    torch.testing.assert_close(lse, expected)


def test_whole_weight_on_one_candidate_and_missing_candidates_give_finite_gradients():
    case = Case(5, torch.float32)
    case.scores = scores = (case.scores * 1e4).requires_grad_()
    assert len({len(own) for own in case.spans}) > 1
    case.q.requires_grad_()
    torch.cat([out.flatten() for out in case.injected()]).sum().backward()
    assert scores.grad.isfinite().all() and case.q.grad.isfinite().all()


def test_gradient_reaches_scores_where_nothing_else_requires_one():
    """The first injected layer of a frozen judge: only the bias requires a gradient."""
    case = Case(7, torch.float32)
    case.scores.requires_grad_()
    torch.cat([out.flatten() for out in case.injected()]).square().sum().backward()
    assert case.scores.grad.abs().sum() > 0
