"""
Train a small language model that copies answers out of documents: a judge for real text, from scratch.

    python demo/reader.py --corpus qa/corpus.jsonl --train qa/train.jsonl --dev qa/dev.jsonl \\
        --text wikipedia.jsonl.xz --out runs/reader --minutes 60

Needs passages {_id, title, text}, questions {query, answers, passage_id} of two splits and plain text
{title, text}, all JSON lines (.gz and .xz too). An answer is the first of `answers`, if it stands in the
passage; other passages are plain text. The dev split's passages are used for nothing, and plain text of the
same titles neither. Each piece of --minutes ends with a checkpoint OUT/step-NNNNN that `--judge` and
`--retriever` take, and the same command goes on where the last one stopped, until --steps; another --steps
stretches or shrinks what is left. 1,600 steps are about 5.5 million tokens: an hour on one CPU core. For a
given number of steps and threads the seed decides every weight, however the work is cut into pieces.

What made reading learnable in minutes: weights that begin with the circuit of copying (`initialise`),
nonsense to repeat before any text, and then several questions after each context, many of them drawn on the
spot (`draw_cloze`): a sentence without some of its words, the words in front of them, or a handful of the
words around them behind a question word. What was left out is the answer.

What an hour gives, on people's questions about new passages: the later tokens of an answer are copied nearly
for sure, but its first one is hardly better foretold with the passage than with another. Such a judge tells
documents that hold the answer's words from those that do not; it does not answer questions.
"""

import argparse
import json
import math
import os
import pickle
import random
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that `python demo/reader.py` finds the modules beside this folder

from data import (  # noqa: E402
    Document,
    InputError,
    JsonLines,
    PromptBuilder,
    Row,
    collate,
    document_block,
    pad,
    sync,
    token_batches,
    write_atomic,
)
from demo import make  # noqa: E402
from dream import read_prefix, target_loss  # noqa: E402
from model import CausalLM, Config, rope_frequencies, run_command, save_weights  # noqa: E402

CPU = torch.device("cpu")
CONFIG = {
    **make.CONFIG,
    "vocab_size": 8000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
TEMPLATE, DOCUMENT, QUESTION, ANSWER = range(4)  # kinds of pieces
# Of each kind: the share of its tokens that is predicted, and the weight of their mean loss. Some are enough,
# as the logits are a good part of what a step costs.
PREDICTED = (0.0, 0.15, 0.3, 1.0)
WEIGHTS = (0.0, 0.3, 0.5, 1.0)
WORD = re.compile(r"\w(?:[\w'’.-]*\w)?")
SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass
class Passage:
    title: str
    sentences: list[str]
    questions: list[tuple[str, str]] = field(default_factory=list)  # (query, answer)


@dataclass
class Library:
    passages: list[Passage]  # with questions
    plain: list[Passage]  # without
    held: list[Passage]  # kept out of training, to measure on
    common: set[str] = field(default_factory=set)  # words too frequent to be asked for
    words: list[str] = field(default_factory=list)  # words of one token, for nonsense


def split(text: str) -> list[str]:
    return [sentence for sentence in SENTENCE.split(" ".join(text.split())) if sentence]


def read_library(
    corpus: Path, train: Path, dev: Path, plain_text: Path | None, paragraphs: int = 60000, held: int = 40
) -> Library:
    """Passages of the training split alone, and paragraphs of plain text; every `held`th passage is held out.

    Raises InputError.
    """
    lines = JsonLines(corpus)
    found = {}  # _id -> title, text
    for index, value in enumerate(lines):
        text = " ".join(lines.text(index, value, "text", default="").split())
        found[lines.text(index, value, "_id")] = (lines.text(index, value, "title", default=""), text)
    asked = JsonLines(dev)
    hidden = {asked.text(i, v, "passage_id") for i, v in enumerate(asked)} & set(found)
    hidden_titles = {found[key][0].lower() for key in hidden} - {""}
    hidden_texts = {found[key][1] for key in hidden}
    passages: dict[str, Passage] = {}
    asked = JsonLines(train)
    for index, value in enumerate(asked):
        key = asked.text(index, value, "passage_id")
        if key not in found:
            raise InputError(f"{asked.where(index)}: passage_id {key!r} is not in {corpus}")
        title, content = found[key]
        if key in hidden or content in hidden_texts or not content:
            continue
        passage = passages.setdefault(key, Passage(title, split(content)))
        answers = value.get("answers") or [""]
        answer = answers[0] if isinstance(answers, list) else answers
        if not isinstance(answer, str):
            raise InputError(f"{asked.where(index)}: 'answers' must be a text or a list of texts")
        if (answer := answer.strip()) and answer in content:
            passage.questions.append((asked.text(index, value, "query"), answer))
    kept = [passage for passage in passages.values() if passage.questions]
    plain = [passage for passage in passages.values() if not passage.questions]
    if len(kept) < 2:
        raise InputError(f"{train}: fewer than two passages hold the answer to a question of theirs")
    if plain_text is not None:
        articles = JsonLines(plain_text)
        each = math.ceil(paragraphs / max(len(articles), 1))
        for index, value in enumerate(tqdm(articles, total=len(articles), desc="plain text", unit="article")):
            title = articles.text(index, value, "title", default="")
            if title.lower() in hidden_titles:
                continue
            text = articles.text(index, value, "text")
            long = (p for p in text.split("\n") if 200 < len(p) < 2000 and p.strip())
            plain += [
                Passage(title, split(paragraph)) for paragraph, _ in zip(long, range(each), strict=False)
            ]
    library = Library([p for i, p in enumerate(kept) if i % held], plain, kept[::held])
    counts = Counter(
        word.lower()
        for passage in library.passages + library.plain[:20000]
        for sentence in passage.sentences
        for word in WORD.findall(sentence)
    )
    library.common = {word for word, _ in counts.most_common(200)}
    return library


def draw_window(rng: random.Random, passage: Passage, sentences: int, words: int) -> tuple[str, list]:
    """Some sentences in a row, cut to so many words unless one is longer, and the questions they answer."""
    first = rng.randrange(max(1, len(passage.sentences) - sentences + 1))
    window = passage.sentences[first : first + sentences]
    while len(window) > 1 and sum(len(sentence.split()) for sentence in window) > words:
        window.pop()
    text = " ".join(window)
    return text, [question for question in passage.questions if question[1] in text]


def draw_cloze(rng: random.Random, text: str, common: set[str], worn: float) -> tuple[str, str] | None:
    """A question about one to four words of a text, and these words; None where no words will do.

    worn: the share of questions that are a handful of words in no order, more like people's questions.
    """
    sentence = rng.choice(split(text))
    words = list(WORD.finditer(sentence))
    if len(words) < 5:
        return None
    first = rng.randrange(len(words))
    last = min(first + rng.choice((0, 0, 0, 1, 1, 2, 3)), len(words) - 1)
    # Nothing but blanks between the words of an answer, and no word at its ends that stands everywhere.
    while last > first and sentence[words[last - 1].end() : words[last].start()] != " ":
        last -= 1
    span = sentence[words[first].start() : words[last].end()]
    if {words[first][0].lower(), words[last][0].lower()} & common:
        return None
    before, after = sentence[: words[first].start()].strip(), sentence[words[last].end() :].strip()
    if any(c.isdigit() for c in span):
        asking = rng.choice(("how many", "when", "what", "how much"))
    elif span[0].isupper() and first:
        asking = rng.choice(("who", "what", "where", "which"))
    else:
        asking = rng.choice(("what", "what", "how", "why"))
    if rng.random() < worn:
        near = [w[0] for w in words[max(0, first - 7) : first] + words[last + 1 : last + 8]]
        near = [w for w in near if rng.random() < (0.4 if w.lower() in common else 0.75)]
        query = " ".join([asking, *near]) + "?"
        query = query.lower() if rng.random() < 0.5 else query
    elif rng.random() < 0.4 and first >= 4:
        query = " ".join(before.split()[-12:])
    else:
        query = f"{before} {asking}{'' if after[:1] in ',.;:!?)' else ' '}{after}".strip()
    return None if span.lower() in query.lower() else (query, span)


def draw_nonsense(rng: random.Random, words: list[str], number: int) -> str:
    return " ".join(rng.choices(words, k=number)) + "."


def draw_context(rng: random.Random, library: Library, done: float) -> list[tuple[str, int]]:
    """A judge's prompt with several questions, as pieces (text, kind); done: share of the training, 0 to 1.

    First of all, nonsense to be said again: no statistics of words help there, so that copying is learned at
    once. Then documents, some still nonsense, which grow from a sentence to whole passages and from one to
    eight, with questions that turn from drawn ones to people's.
    """
    if done < 0.06:
        text = " " + draw_nonsense(rng, library.words, rng.randint(6, 23))
        return [(text, DOCUMENT), (text, ANSWER), (text, ANSWER)]
    documents = rng.choice((1,) if done < 0.3 else (1, 1, 2, 3) if done < 0.65 else (1, 1, 2, 4, 8))
    longest = 2 if done < 0.2 else 4 if done < 0.4 else 8
    nonsense = 0.6 if done < 0.16 else 0.1 if done < 0.4 else 0.0
    real = min(0.7, max(0.0, 2 * (done - 0.16)))
    sources = []
    for _ in range(documents):
        if rng.random() < nonsense:
            sentences = [draw_nonsense(rng, library.words, rng.randint(8, 20)) for _ in range(longest)]
            sources.append(Passage("", sentences))
        else:
            with_questions = not library.plain or rng.random() < real + 0.1
            sources.append(rng.choice(library.passages if with_questions else library.plain))
    windows = []
    for passage in sources:
        text, questions = draw_window(rng, passage, rng.randint(1 + longest // 4, longest), 140)
        windows.append((Document(passage.title, text), questions))
    pieces = [(make.INSTRUCTION, TEMPLATE)]
    pieces += [(document_block(document), DOCUMENT) for document, _ in windows]
    asked: dict[str, str] = {}  # query -> answer
    for _ in range(3 * (wanted := 5 + documents)):
        document, questions = rng.choice(windows)
        if questions and rng.random() < real:
            drawn = rng.choice(questions)
        else:
            drawn = draw_cloze(rng, document.text, library.common, worn=min(0.6, 2 * done))
        if drawn and len(asked) < wanted:
            asked.setdefault(*drawn)
    for number, (query, answer) in enumerate(asked.items()):
        pieces.append(("\n\n" * (number > 0) + make.QUESTION.format(query=query), QUESTION))
        pieces.append((" " + answer, ANSWER))
    return pieces


def train_tokenizer(library: Library, vocab_size: int) -> Tokenizer:
    """Byte-level BPE, as Qwen's: every text survives it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[make.EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        yield make.INSTRUCTION
        for passage in library.passages + library.plain[:20000]:
            yield document_block(Document(passage.title, " ".join(passage.sentences)))
            for query, answer in passage.questions:
                yield make.QUESTION.format(query=query) + " " + answer

    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def single_words(tokenizer: Tokenizer) -> list[str]:
    """The words that are one token each, with a blank in front."""
    vocabulary = sorted(tokenizer.get_vocab())
    return [token[1:] for token in vocabulary if token[0] == "Ġ" and token[1:].isalpha() and len(token) > 3]


def draw_batches(
    rng: random.Random, library: Library, tokenizer: Tokenizer, done: float, tokens: int
) -> list[tuple[Tensor, Tensor]]:
    """Contexts of about `tokens` tokens, in batches of similar length: ids and kinds, (B, T) each."""
    rows, kinds, total = [], [], 0
    while total < tokens:
        pieces = draw_context(rng, library, done)
        encoded = tokenizer.encode_batch_fast([text for text, _ in pieces], add_special_tokens=False)
        rows.append([token for encoding in encoded for token in encoding.ids])
        kinds.append(
            [kind for encoding, (_, kind) in zip(encoded, pieces, strict=True) for _ in encoding.ids]
        )
        total += len(rows[-1])
    batches = token_batches([len(row) for row in rows], max(tokens // 3, 1))
    return [(pad([rows[i] for i in b], CPU)[0], pad([kinds[i] for i in b], CPU)[0]) for b in batches]


@torch.no_grad()
def initialise(network: CausalLM, seed: int) -> None:
    """Random weights that already form, in rough, the circuit of copying: what follows a word that recurs.

    After mimetic initialization (arXiv 2305.09828) and induction heads (arXiv 2209.11895): heads of the first
    layer look one word back, by biases that RoPE turns by just so much, and leave a mark of that word; heads
    of the second look for the mark of the word they stand on; outputs of all later layers undo values, so
    that what is attended to is what is predicted. Elsewhere queries begin as keys do.
    """
    config, size, width = network.config, network.config.head_dim, network.config.hidden_size
    group = config.num_attention_heads // config.num_key_value_heads
    generator = torch.Generator().manual_seed(seed)

    def draw(parameter: Tensor, std: float) -> None:
        parameter.normal_(std=std, generator=generator)

    draw(network.model.embed_tokens.weight, 0.05)
    for number, layer in enumerate(network.model.layers):
        attention = layer.self_attn
        draw(attention.k_proj.weight, 0.7 * width**-0.5)
        draw(attention.v_proj.weight, width**-0.5)
        draw(layer.mlp.gate_proj.weight, 0.7 * width**-0.5)
        draw(layer.mlp.up_proj.weight, 0.7 * width**-0.5)
        draw(layer.mlp.down_proj.weight, 0.02 * config.intermediate_size**-0.5)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.bias.zero_()
        keys = attention.k_proj.weight.view(-1, size, width)  # (Hkv, D, C)
        attention.q_proj.weight.copy_(keys.repeat_interleave(group, dim=0).flatten(0, 1))
        values = attention.v_proj.weight.view(-1, size, width).repeat_interleave(group, dim=0)  # (Hq, D, C)
        if number:
            attention.o_proj.weight.copy_(0.15 * values.flatten(0, 1).T)
        else:
            draw(attention.o_proj.weight, 0.02 * width**-0.5)
    first, second = (layer.self_attn for layer in network.model.layers[:2])
    angles = rope_frequencies(config, CPU)  # (D / 2,)
    strength = 5.0 * (angles > 1e-2)  # slower pairs do not tell neighbours apart
    for head in range(max(1, config.num_key_value_heads * 3 // 4)):
        rows = slice(head * size, (head + 1) * size)
        mark = torch.randn(width, size, generator=generator) * width**-0.5  # (C, D)
        first.k_proj.weight[rows] *= 0.1
        first.k_proj.bias[rows] = torch.cat((strength, torch.zeros_like(strength)))
        second.k_proj.weight[rows] = 2.0 * mark.T
        for query in range(head * group, (head + 1) * group):
            columns = slice(query * size, (query + 1) * size)
            first.q_proj.weight[columns] *= 0.1
            first.q_proj.bias[columns] = torch.cat((strength * angles.cos(), -strength * angles.sin()))
            first.o_proj.weight[:, columns] = 0.1 * mark
            second.q_proj.weight[columns] = 2.0 * first.v_proj.weight[rows]


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with match_rms_adamw, but in float32: bfloat16 is slow on most CPUs."""

    def __init__(self, groups: list[dict], momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                mean = self.state[parameter].setdefault("momentum", torch.zeros_like(gradient))
                mean.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(mean, group["momentum"])
                wide = update.T if update.shape[0] > update.shape[1] else update
                x = wide / wide.norm().clamp(min=1e-7)
                for _ in range(5):  # Newton-Schulz: singular values go to about 1
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
                update = x.T if wide is not update else x
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-0.2 * group["lr"] * max(update.shape) ** 0.5)


def make_optimizers(network: CausalLM) -> list[torch.optim.Optimizer]:
    """Each group's `peak` is the learning rate that the schedule shares out."""
    matrices = [p for p in network.model.layers.parameters() if p.ndim == 2]
    vectors = [p for p in network.parameters() if p.ndim == 1]
    embeddings = {"params": [network.model.embed_tokens.weight], "peak": 3e-3}
    return [
        Muon([{"params": matrices, "peak": 5e-3}]),
        torch.optim.AdamW(
            [embeddings, {"params": vectors, "peak": 1e-3}], betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    ]


def learn(
    network: CausalLM,
    optimizers: list[torch.optim.Optimizer],
    batches: list[tuple[Tensor, Tensor]],
    share: float,
    seed: int,
) -> float:
    """One step at `share` of the learning rates; returns the answers' mean loss, nats per token."""
    generator = torch.Generator().manual_seed(seed)
    chances = torch.tensor(PREDICTED)
    drawn = [torch.rand(kinds.shape, generator=generator) < chances[kinds] for _, kinds in batches]
    drawn = [mask[:, 1:] for mask in drawn]  # (B, T - 1): what is predicted from the token before
    counts = sum(
        torch.bincount(kinds[:, 1:][mask], minlength=4)
        for (_, kinds), mask in zip(batches, drawn, strict=True)
    )
    weights = torch.tensor(WEIGHTS) / counts.clamp(min=1)
    answers = 0.0
    network.zero_grad()
    for (ids, kinds), mask in zip(batches, drawn, strict=True):
        hidden = network.model(ids[:, :-1])[mask]  # (rows, C)
        losses = F.cross_entropy(network.lm_head(hidden), ids[:, 1:][mask], reduction="none")
        kinds = kinds[:, 1:][mask]  # (rows,)
        (losses * weights[kinds]).sum().backward()
        answers += losses.detach()[kinds == ANSWER].sum().item()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]
        optimizer.step()
    return answers / max(int(counts[ANSWER]), 1)


@torch.no_grad()
def measure(network: CausalLM, tokenizer: Tokenizer, held: list[Passage], number: int = 96) -> dict:
    """Loss of held-out answers, nats per token, with the passage and with another one, real and drawn."""
    rng = random.Random(0)
    builder = PromptBuilder(tokenizer, network.config.context)
    report = {}
    for kind in ("real", "cloze"):
        rows, others = [], []
        for index in range(number):
            passage, other = held[index % len(held)], held[(index + 1) % len(held)]
            text = " ".join(passage.sentences)
            drawn = rng.choice(passage.questions) if kind == "real" else None
            for _ in range(100):
                drawn = drawn or draw_cloze(rng, text, set(), worn=0.5)
            if drawn is None:  # not one long sentence
                continue
            for found, chosen in ((rows, passage), (others, other)):
                document = Document(chosen.title, " ".join(chosen.sentences))
                found.append(Row(index, *drawn, [document], 0))
        if not rows:
            continue
        losses = []
        for some in (rows, others):
            prompts = builder.build(some)
            batches = token_batches([len(p.input_ids) for p in prompts], 4000)
            found = [collate([prompts[i] for i in batch], CPU) for batch in batches]
            losses.append(torch.cat([target_loss(network, b, read_prefix(network, b)) for b in found]).mean())
        report[kind] = {"relevant": losses[0].item(), "random": losses[1].item()}
    return report


def share_of_rate(step: int, steps: int) -> float:
    """Of the learning rates: warm-up, constant, linear to almost nothing over the last 40%."""
    return min(1.0, (step + 1) / 20, 0.02 + (1 - step / steps) / 0.4)


def save(
    out: Path, network: CausalLM, tokenizer: Tokenizer, optimizers: list[torch.optim.Optimizer], state: dict
) -> Path:
    """OUT/step-NNNNN, a checkpoint, and OUT/state.pt, from which training goes on; each appears whole."""
    folder = out / f"step-{state['step']:05}"
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save_weights(network, temporary, torch.bfloat16)
    tokenizer.save(str(temporary / "tokenizer.json"))
    limits = {**make.TOKENIZER_CONFIG, "model_max_length": network.config.context}
    write_atomic(temporary / "tokenizer_config.json", json.dumps(limits, indent=1) + "\n")
    sync(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    optimizer_states = [optimizer.state_dict() for optimizer in optimizers]
    state = {**state, "network": network.state_dict(), "optimizers": optimizer_states}
    torch.save({**state, "tokenizer": tokenizer.to_str()}, out / "state.tmp")
    os.replace(out / "state.tmp", out / "state.pt")
    return folder


def read_state(path: Path, settings: dict) -> dict | None:
    """What `save` left, or None. Raises InputError where it belongs to other settings."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True)
        begun_with = state["settings"]
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError, pickle.PickleError) as error:
        told = f"cannot be read ({type(error).__name__})"  # torch's own words advise to trust the file
        raise InputError(f"{path}: {told}; delete it or choose another --out") from error
    if begun_with != settings:
        raise InputError(f"{path}: belongs to a run with {begun_with}; choose another --out")
    return state


def run(args: argparse.Namespace, library: Library, shape: dict) -> Path:
    """Train until --steps or --minutes; `shape` is config.json. Returns the last checkpoint's folder."""
    end = time.monotonic() + 60 * args.minutes
    out, settings = Path(args.out), {"seed": args.seed, "tokens": args.tokens}
    out.mkdir(parents=True, exist_ok=True)
    state = read_state(out / "state.pt", settings)
    write_atomic(out / "config.json", json.dumps(shape, indent=1) + "\n")
    network = CausalLM(Config.read(out / "config.json"))
    optimizers = make_optimizers(network)
    if state:
        tokenizer = Tokenizer.from_str(state["tokenizer"])
        network.load_state_dict(state["network"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    else:
        tokenizer = train_tokenizer(library, shape["vocab_size"])
        initialise(network, args.seed)
    library.words = single_words(tokenizer)
    step, tokens, minutes = (state[key] if state else 0 for key in ("step", "tokens", "minutes"))
    progress = tqdm(total=args.steps, initial=step, desc="training", unit="step")
    saved_at, folder, losses = time.monotonic(), out / f"step-{step:05}", []
    while step < args.steps:
        done = step / args.steps
        rng = random.Random(f"{args.seed} {step}")  # of this step alone, so that a later piece draws the same
        size = round(args.tokens * min(1.0, 0.4 + 3 * done))  # early lessons are simple
        batches = draw_batches(rng, library, tokenizer, done, size)
        losses.append(learn(network, optimizers, batches, share_of_rate(step, args.steps), step))
        tokens += sum(int((ids != 0).sum()) for ids, _ in batches)
        step += 1
        progress.update()
        progress.set_postfix_str(f"answers {losses[-1]:.2f}", refresh=False)
        over = step == args.steps or time.monotonic() >= end
        if over or time.monotonic() - saved_at > 60 * args.every:
            minutes += (time.monotonic() - saved_at) / 60
            report = {"step": step, "tokens": tokens, "minutes": round(minutes, 1)}
            report |= {"answers": sum(losses) / len(losses), **measure(network, tokenizer, library.held)}
            with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(report) + "\n")
            progress.write(json.dumps(report))
            kept = {"settings": settings, "step": step, "tokens": tokens, "minutes": minutes}
            folder = save(out, network, tokenizer, optimizers, kept)
            saved_at, losses = time.monotonic(), []
        if over:
            break
    progress.close()
    return folder


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="passages of both splits, .jsonl")
    parser.add_argument("--train", type=Path, required=True, help="questions to learn from, .jsonl")
    parser.add_argument(
        "--dev", type=Path, required=True, help="questions whose passages are left out, .jsonl"
    )
    parser.add_argument("--text", type=Path, help="plain text, .jsonl (default: none)")
    parser.add_argument("--out", required=True, help="folder of the checkpoints")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of this piece (default: no limit)")
    parser.add_argument("--every", type=float, default=5.0, help="minutes between checkpoints (default: 5)")
    parser.add_argument("--steps", type=int, default=1600, help="of the whole training (default: 1600)")
    parser.add_argument("--tokens", type=int, default=3500, help="of a step, about, at most (default: 3500)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="decides everything (default: 0)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)  # with another number the order of sums, and so the weights, differ

    def work() -> None:
        library = read_library(args.corpus, args.train, args.dev, args.text)
        print(
            f"{len(library.passages):,} passages with questions, {len(library.plain):,} of plain text, "
            f"{len(library.held)} held out"
        )
        print(f"written: {run(args, library, CONFIG)}")

    return run_command("reader.py", work)


if __name__ == "__main__":
    sys.exit(main())
