"""Training for a given time on fresh stories: Muon for the layers' matrices, AdamW for the rest."""

import math
import sys
import time

import torch
from torch.nn import functional as F

import corpus
from model import Step3
from muon import Muon


def losses(model, batch):
    """The summed loss of a batch's predicted tokens, and their number."""
    inputs, targets = batch[:, :-1].clamp(min=0), batch[:, 1:]
    logits = model(inputs).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"), (targets >= 0).sum()


@torch.no_grad()
def held_out_loss(model, tokenizer, stories, rows=50):
    """Mean negative log likelihood of every token after the first of `<|begin|>story<|end|>`."""
    model.eval()
    ids = sorted((tokenizer.encode(f"{corpus.BEGIN}{story}{corpus.END}").ids for story in stories), key=len)
    parts = [losses(model, corpus.padded(ids[first : first + rows])) for first in range(0, len(ids), rows)]
    model.train()
    return float(sum(loss for loss, _ in parts) / sum(count for _, count in parts)), int(sum(c for _, c in parts))


def train(config, tokenizer, seed, minutes, keep, rows=32, peak=3e-3):
    """A trained model. `keep(model, told)` is called every few minutes with a line about how far it is."""
    torch.manual_seed(seed)
    model = Step3(config)
    layers = list(model.model.layers.parameters())
    outside = [model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight]
    optimisers = [
        Muon([weight for weight in layers if weight.dim() > 1], peak),
        torch.optim.AdamW([weight for weight in layers if weight.dim() == 1] + outside, peak, (0.9, 0.95), weight_decay=0.0),
    ]
    stories = corpus.held_out(1000)
    started, seconds = time.monotonic(), minutes * 60
    kept, seen, warm_up = started, 0, 100
    for number, batch in enumerate(corpus.batches(tokenizer, seed, set(stories), rows)):
        elapsed = time.monotonic() - started
        if elapsed >= seconds:
            break
        share = elapsed / seconds
        rate = peak * min(1.0, (number + 1) / warm_up) * (0.03 + 0.97 * (1 + math.cos(math.pi * share)) / 2)
        for group in (group for optimiser in optimisers for group in optimiser.param_groups):
            group["lr"] = rate
        loss, count = losses(model, batch)
        mean = loss / count
        (mean + 0.01 * model.balance()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        seen += int(count)
        if number % 20 == 0:
            left = (seconds - elapsed) / 60
            speed = seen / max(time.monotonic() - started, 1e-3)
            line = f"{100 * share:5.1f} %  {seen / 1e6:6.2f} M tokens  {speed:6.0f} tokens/s  loss {mean.item():.4f}  {left:.1f} min left"
            print(f"\r{line}", end="", file=sys.stderr, flush=True)
        if time.monotonic() - kept > 240:
            kept = time.monotonic()
            loss, _ = held_out_loss(model, tokenizer, stories[:200])
            keep(model, f"{seen / 1e6:.2f} M tokens, {elapsed / 60:.0f} min: held-out loss {loss:.4f}")
    print(file=sys.stderr)
    return model
