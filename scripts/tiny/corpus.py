"""The corpus: stories of the grammar as tokens, the tokenizer that is trained on them, and batches of like length."""

import itertools
import random

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

import grammar

BEGIN, END, TURN, TURN_END = SPECIAL = ["<|begin|>", "<|end|>", "<|BOT|>", "<|EOT|>"]
# Seeds from here on belong to the held-out split.
HELD_OUT_SEED = 1_000_000
CHAT_SHARE = 0.15
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|BOT|>{{ message['role'] }}\n{{ message['content'] }}<|EOT|>"
    "{% endfor %}{% if add_generation_prompt %}<|BOT|>assistant\n{% endif %}"
)


def held_out(count):
    """Stories that training never sees."""
    return list(itertools.islice(grammar.stories(HELD_OUT_SEED), count))


def entropy(tokenizer, count):
    """What a model that knew the grammar would lose on the same stories, in nats a token: no model loses less on the mean."""
    told = list(itertools.islice(grammar.surprises(HELD_OUT_SEED), count))
    # Every token but the first is predicted; the end follows from the last sentence.
    tokens = sum(len(tokenizer.encode(f"{BEGIN}{story}{END}").ids) - 1 for story, _ in told)
    return sum(surprise for _, surprise in told) / tokens


def texts(seed, forbidden):
    """Training texts without end, plain and in chat form; no story of the held-out split is among them."""
    rng = random.Random(seed)
    while True:
        if rng.random() < CHAT_SHARE:
            asked, story = grammar.request(rng)
            text = f"{BEGIN}{TURN}user\n{asked}{TURN_END}{TURN}assistant\n{story}{TURN_END}"
        else:
            story = grammar.story(rng)
            text = f"{BEGIN}{story}{END}"
        if story not in forbidden:
            yield text


def train_tokenizer(vocab_size, seed=11):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(texts(seed, set()), 20_000), trainer)
    return tokenizer


def batches(tokenizer, seed, forbidden, rows):
    """`[rows, length]` tensors without end, filled up with -1; rows of one batch have about the same length."""
    source = texts(seed, forbidden)
    while True:
        pool = [tokenizer.encode(text).ids for text in itertools.islice(source, rows * 64)]
        pool.sort(key=len)
        groups = [pool[first : first + rows] for first in range(0, len(pool), rows)]
        random.Random(seed).shuffle(groups)
        for group in groups:
            yield padded(group)
        seed += 1


def padded(group):
    batch = torch.full((len(group), max(map(len, group))), -1)
    for row, ids in enumerate(group):
        batch[row, : len(ids)] = torch.tensor(ids)
    return batch
