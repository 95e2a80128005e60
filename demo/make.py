"""
Make everything in this folder: the rows, the two BEIR folders, the tokenizer and the checkpoint.

    python demo/make.py            # about ten minutes on two CPU cores
    python demo/make.py --rows     # the texts alone, in a second

One seed decides everything: on the same machine it gives the same files again.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that `python demo/make.py` finds the modules beside this folder

from data import TEMPLATE, Document, document_block, pad  # noqa: E402
from demo import world  # noqa: E402
from formats.checkpoints import read_config, save_weights  # noqa: E402
from model import CausalLM, Config  # noqa: E402

INSTRUCTION, rest = TEMPLATE.split("{documents}")
QUESTION = rest.removesuffix(" {target}")

EOS = "<|endoftext|>"
CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 1500,
    "hidden_size": 128,
    "intermediate_size": 224,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "bos_token_id": None,
    "eos_token_id": 0,
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": EOS,
    "pad_token": EOS,
    "model_max_length": CONFIG["max_position_embeddings"],
    "clean_up_tokenization_spaces": False,
}


def draw_facts(rng: random.Random) -> tuple[dict[str, list[world.Fact]], set[str], set[str]]:
    """The facts of each split, the names of the seen entities, and all names of entities.

    A dev or test entity shows four of its five attributes there. The fifth goes to the training rows if it
    is one of the *seen* entities, half of all, and nowhere if it is not.
    """
    keys, seen, taken = {"train": [], "dev": [], "test": []}, set(), set()
    for split, number in (("train", 160), ("dev", 76), ("test", 152)):
        for index in range(number):
            kind = list(world.NAMES)[index % 4]
            name = world.draw_name(kind, rng, taken)
            taken.add(name)
            if split == "train" or index % 8 < 4:
                seen.add(name)
            attributes = rng.sample(list(world.ATTRIBUTES[kind]), 5)
            shown = 5 if split == "train" else 4
            keys[split] += [(kind, name, attribute) for attribute in attributes[:shown]]
            if name in seen:
                keys["train"] += [(kind, name, attribute) for attribute in attributes[shown:]]
    # The answers come last: an answer that is a name must be nobody's of those above.
    facts = {split: [world.draw_fact(*key, rng, taken) for key in keys[split]] for split in keys}
    return facts, seen, taken


def choose_candidates(
    fact: world.Fact, facts: list[world.Fact], rng: random.Random, number: int = 8, shuffle: bool = True
) -> list[world.Fact]:
    """The fact and others: up to two of its entity, three of its attribute, the rest at random."""
    others = [other for other in facts if other != fact]
    same_entity = [other for other in others if other.name == fact.name]
    topic = (fact.kind, fact.attribute)
    same_attribute = [other for other in others if (other.kind, other.attribute) == topic]
    chosen = [fact, *rng.sample(same_entity, min(2, len(same_entity))), *rng.sample(same_attribute, 3)]
    chosen += rng.sample([other for other in others if other not in chosen], number - len(chosen))
    if shuffle:
        rng.shuffle(chosen)
    return chosen


def make_row(fact: world.Fact, query: str, candidates: list[world.Fact], write) -> dict:
    """A training row; `write` turns a fact into a document."""
    return {
        "query": query,
        "target": fact.answer,
        "documents": [write(candidate) for candidate in candidates],
        "positive": candidates.index(fact),
    }


def write_jsonl(path: Path, items: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def write_texts(seed: int) -> set[str]:
    """Write the rows and the BEIR folders; returns the entities' names, which pretraining must not use."""
    rng = random.Random(seed)
    facts, seen, taken = draw_facts(rng)
    pool = facts["train"]
    asked = [(fact, query) for fact in pool for query in world.questions(fact, "train")]
    rows = [
        make_row(
            fact, query, choose_candidates(fact, pool, rng), lambda each: world.write_document(each, rng)
        )
        for fact, query in rng.sample(asked, 2000)
    ]
    write_jsonl(HERE / "train.jsonl", rows)
    for split, number in (("dev", 150), ("test", 300)):
        pool = facts[split][: 2 * number]
        rng.shuffle(pool)  # so that an id tells nothing about its document
        ids = {fact: f"d{index:03}" for index, fact in enumerate(pool)}
        documents = {fact: world.write_document(fact, rng) for fact in pool}
        asked = rng.sample(pool, number)
        queries = [
            {
                "_id": f"q{index:03}",
                "text": rng.choice(world.questions(fact, split)),
                "target": fact.answer,
                "metadata": {"entity": "seen" if fact.name in seen else "unseen"},
            }
            for index, fact in enumerate(asked)
        ]
        write_jsonl(HERE / split / "corpus.jsonl", [{"_id": ids[fact], **documents[fact]} for fact in pool])
        write_jsonl(HERE / split / "queries.jsonl", queries)
        qrels = HERE / split / "qrels" / f"{split}.tsv"
        qrels.parent.mkdir(exist_ok=True)
        lines = [f"{query['_id']}\t{ids[fact]}\t1\n" for query, fact in zip(queries, asked, strict=True)]
        qrels.write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
        if split == "dev":
            rows = [
                make_row(fact, query["text"], choose_candidates(fact, pool, rng), documents.get)
                for query, fact in zip(queries, asked, strict=True)
            ]
            write_jsonl(HERE / "dev.jsonl", rows)
    return taken


def write_context(rng: random.Random, taken: set[str], documents: int) -> list[tuple[str, bool]]:
    """A judge's prompt on facts drawn on the spot, as pieces (text, is an answer).

    Most documents share one to three attributes of one kind among as few entities as will do, so that neither
    a name nor the sort of answer is enough. Up to five questions follow: each is a lesson in reading.
    """
    kind = rng.choice(list(world.NAMES))
    attributes = rng.sample(list(world.ATTRIBUTES[kind]), rng.choice((1, 1, 1, 2, 3)))
    strangers = rng.randint(0, documents // 4)
    keys = {}  # a dict for its order; names may repeat
    while len(keys) < max(documents - strangers, 2 * len(attributes)):
        name = world.draw_name(kind, rng, taken)
        keys |= {(kind, name, attribute): None for attribute in attributes}
    keys = dict.fromkeys(rng.sample(list(keys), documents - strangers))
    while len(keys) < documents:
        other = rng.choice(list(world.NAMES))
        keys[other, world.draw_name(other, rng, taken), rng.choice(list(world.ATTRIBUTES[other]))] = None
    facts = [world.draw_fact(*key, rng, taken) for key in keys]
    rng.shuffle(facts)
    pieces = [(INSTRUCTION, False)]
    for fact in facts:
        pieces.append((document_block(Document(**world.write_document(fact, rng))), False))
    for number, fact in enumerate(rng.sample(facts, min(5, documents))):
        query = rng.choice(world.questions(fact, rng.choice(("train", "test"))))
        pieces.append(("\n\n" * (number > 0) + QUESTION.format(query=query), False))
        pieces.append((" " + fact.answer, True))
    return pieces


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE, as Qwen's: every text survives it. Trained on contexts of one document."""
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [piece for _ in range(6000) for piece, _ in write_context(rng, set(), documents=1)]
    # A retriever's text begins with the title and no space before it.
    texts += [text.removeprefix("Document: ") for text in texts if text.startswith("Document: ")]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def draw_batch(
    rng: random.Random, tokenizer: Tokenizer, taken: set[str], documents: int, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts of so many documents, about `tokens` in all: ids, is a token, is in an answer; (B, T) each."""
    per_context = 36 * documents + 21 * min(5, documents) + 10
    contexts = [write_context(rng, taken, documents) for _ in range(max(2, tokens // per_context))]
    encoded = iter(tokenizer.encode_batch_fast([text for context in contexts for text, _ in context]))
    rows, answers = [], []
    for context in contexts:
        pieces = [(next(encoded).ids, is_answer) for _, is_answer in context]
        rows.append([token for ids, _ in pieces for token in ids])
        answers.append([int(is_answer) for ids, is_answer in pieces for _ in ids])
    input_ids, lengths = pad(rows, torch.device("cpu"))
    is_token = torch.arange(input_ids.shape[1]) < lengths[:, None]
    return input_ids, is_token, pad(answers, torch.device("cpu"))[0].bool()


def pretrain(config: Config, tokenizer: Tokenizer, taken: set[str], seed: int, steps: int) -> CausalLM:
    """Train from scratch to read: one to three documents at first, then up to eight, now and then sixteen."""
    torch.set_num_threads(2)  # the order of sums, and so the weights, would differ with another number
    torch.manual_seed(seed)
    rng = random.Random(seed + 1)
    network = CausalLM(config)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            std = 0.02 if "embed_tokens" in name else 0.7 * parameter.shape[1] ** -0.5
            torch.nn.init.normal_(parameter, std=std)
    with torch.no_grad():
        # Queries begin as keys do, so that words attend to their like (as in mimetic initialization):
        # to match the name in a question with a document's is what takes descent longest to find.
        for layer in network.model.layers:
            heads = layer.self_attn.k_proj.weight.view(-1, config.head_dim, config.hidden_size)
            group = config.num_attention_heads // config.num_key_value_heads
            layer.self_attn.q_proj.weight.copy_(heads.repeat_interleave(group, dim=0).flatten(0, 1))
    matrices = [p for p in network.model.layers.parameters() if p.ndim == 2]
    others = [p for p in network.parameters() if not any(p is matrix for matrix in matrices)]
    # Muon learns to read in about half of AdamW's steps.
    optimizers = [
        torch.optim.Muon(matrices, lr=5e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    def share(step: int) -> float:  # of the learning rate: warm-up, constant, linear to almost nothing
        return min(1.0, (step + 1) / 20, 0.02 + (1 - step / steps) / 0.6)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]
    progress = tqdm(range(steps), desc="pretraining")
    latest = {}  # number of documents -> answer loss
    for step in progress:
        done = step / steps
        largest = 3 if done < 0.3 else 8
        documents = 16 if done > 0.6 and rng.random() < 0.1 else rng.randint(1, largest)
        input_ids, is_token, is_answer = draw_batch(rng, tokenizer, taken, documents, tokens=6000)
        # A quarter of the other words is enough: the logits are a good part of what a step costs.
        is_other = is_token & ~is_answer & (torch.rand(is_token.shape) < 0.25)
        predicted = (is_answer | is_other)[:, 1:]  # (B, T - 1)
        hidden = network.model(input_ids[:, :-1])[predicted]  # (rows, C)
        losses = F.cross_entropy(network.lm_head(hidden), input_ids[:, 1:][predicted], reduction="none")
        in_answer = is_answer[:, 1:][predicted]  # (rows,)
        answer_loss = losses[in_answer].mean()
        loss = answer_loss + 0.3 * losses[~in_answer].mean()
        network.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        latest[documents] = answer_loss.item()
        progress.set_postfix_str(" ".join(f"{n}:{latest[n]:.2f}" for n in sorted(latest)), refresh=False)
    return network


def write_checkpoint(seed: int, steps: int, taken: set[str]) -> None:
    folder = HERE / "checkpoint"
    folder.mkdir(exist_ok=True)
    tokenizer = train_tokenizer(seed)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    network = pretrain(read_config(folder / "config.json"), tokenizer, taken, seed, steps)
    save_weights(network, folder, torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="decides everything (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1200, help="steps of pretraining (default: %(default)s)")
    parser.add_argument("--rows", action="store_true", help="write the texts alone")
    args = parser.parse_args()
    taken = write_texts(args.seed)
    if not args.rows:
        write_checkpoint(args.seed, args.steps, taken)


if __name__ == "__main__":
    main()
