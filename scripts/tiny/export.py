"""A trained model as a HuggingFace-layout checkpoint in block FP8, and what PyTorch makes of that checkpoint."""

import copy
import json
import random
import re

import torch
from safetensors.torch import load_file, save_file

import corpus
import grammar
from model import Config, Experts, Linear, Step3
from train import held_out_loss

BLOCK = 128
LARGEST = 448.0
SMALLEST_MAGNITUDE = 1e-10
# The router is never quantised, nor are embeddings, norms and the output head.
QUANTISED = re.compile(r"(self_attn\.(q|k|v|o)_proj|self_attn\.wq|(mlp|moe|share_expert)\.(gate|up|down)_proj)\.weight$")


def blocks(matrix):
    """`[.., rows, cols]` as `[.., row blocks, 128, column blocks, 128]`, filled up with zeros."""
    rows, cols = matrix.shape[-2:]
    wide = torch.nn.functional.pad(matrix, (0, -cols % BLOCK, 0, -rows % BLOCK))
    return wide.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))


def quantise(weight):
    """E4M3 codes, and the scale of each block of 128 x 128."""
    wide = blocks(weight.float())
    scale = wide.abs().amax((-3, -1)).clamp(min=SMALLEST_MAGNITUDE) / LARGEST
    codes = (wide / scale[..., :, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    codes = codes.flatten(-4, -3).flatten(-2, -1)[..., : weight.shape[-2], : weight.shape[-1]]
    return codes.contiguous(), scale.contiguous()


def dequantise(codes, scale):
    wide = blocks(codes.float()) * scale[..., :, None, :, None]
    return wide.flatten(-4, -3).flatten(-2, -1)[..., : codes.shape[-2], : codes.shape[-1]]


def quantise_activations(x):
    """What is left of activations after FP8 with a scale for each token and 128 elements."""
    width = x.shape[-1]
    groups = torch.nn.functional.pad(x.float(), (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_MAGNITUDE) / LARGEST
    codes = (groups / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return (codes.float() * scale).flatten(-2)[..., :width].to(x.dtype)


def write_checkpoint(model, tokenizer, directory):
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, weight in model.state_dict().items():
        if QUANTISED.search(name):
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(weight)
        else:
            tensors[name] = weight.to(torch.bfloat16).contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    begin, end, _, turn_end = (tokenizer.token_to_id(token) for token in corpus.SPECIAL)
    ids = {"bos_token_id": begin, "eos_token_id": [end, turn_end]}
    quantisation = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
    }

    def write(name, value):
        (directory / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")

    write("config.json", model.config.json() | ids | {"quantization_config": quantisation})
    write("generation_config.json", ids)
    write("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": corpus.BEGIN, "eos_token": corpus.END,
        "model_max_length": model.config.max_position_embedding, "chat_template": corpus.CHAT_TEMPLATE,
    })
    tokenizer.save(str(directory / "tokenizer.json"))


def read_checkpoint(directory):
    """The checkpoint's model with dequantised weights, in f32."""
    fields = json.loads((directory / "config.json").read_text())
    config = Config(**{name: fields[name] for name in Config.__dataclass_fields__})
    stored = load_file(directory / "model.safetensors")
    weights = {
        name: dequantise(weight, stored[f"{name}_scale_inv"]) if f"{name}_scale_inv" in stored else weight.float()
        for name, weight in stored.items() if not name.endswith("_scale_inv")
    }
    model = Step3(config)
    model.load_state_dict(weights)
    return model.eval()


def w8a8(model):
    """The same model with the inputs of its quantised layers quantised too."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, Experts) or isinstance(module, Linear) and QUANTISED.search(f"{name}.weight"):
            module.quantised = quantise_activations
    return model


@torch.no_grad()
def continuation(model, ids, most, ends, choose=lambda logits: int(logits.argmax())):
    """Tokens after `ids`, each chosen from its logits, up to an end token or `most` of them."""
    caches = [{} for _ in model.model.layers]
    logits, out = model(torch.tensor([ids]), 0, caches)[0, -1], []
    while len(out) < most:
        out.append(choose(logits))
        if out[-1] in ends:
            break
        logits = model(torch.tensor([[out[-1]]]), len(ids) + len(out) - 1, caches)[0, -1]
    return out


def sampled(model, tokenizer, count, ends, seed=5, temperature=0.8, top_p=0.95):
    """Stories of the model's own."""
    generator = torch.Generator().manual_seed(seed)
    turn = tokenizer.token_to_id(corpus.TURN)

    def choose(logits):
        logits[turn] = -torch.inf  # a story, not a conversation
        probabilities, order = (logits.float() / temperature).softmax(-1).sort(descending=True)
        probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
        return int(order[torch.multinomial(probabilities, 1, generator=generator)])

    begin = [tokenizer.token_to_id(corpus.BEGIN)]
    return [tokenizer.decode(continuation(model, begin, 250, ends, choose)) for _ in range(count)]


def write_golden(directory, tokenizer, count=200):
    """What PyTorch makes of the checkpoint: held-out losses, greedy continuations, how many stories parse."""
    model = read_checkpoint(directory)
    ends = json.loads((directory / "config.json").read_text())["eos_token_id"]
    stories = corpus.held_out(count)
    (directory / "heldout.txt").write_text("\n".join(stories) + "\n", encoding="utf-8")
    loss, tokens = held_out_loss(model, tokenizer, stories)
    half = copy.deepcopy(model).to(torch.bfloat16)
    rng = random.Random(3)
    prompts = [" ".join(rng.choice(stories).split()[:length]) for length in (4, 9, 15)] + ["Once there was a girl named"]
    greedy = []
    for prompt in prompts:
        ids = [tokenizer.token_to_id(corpus.BEGIN), *tokenizer.encode(prompt).ids]
        greedy.append({"prompt": prompt, "ids": ids, "continuation": continuation(model, ids, 48, ends)})
    told = sampled(model, tokenizer, count, ends)
    golden = {
        "torch": torch.__version__,
        "heldout": {
            "stories": count, "tokens": tokens, "loss_f32": loss,
            "loss_bf16": held_out_loss(half, tokenizer, stories)[0],
            "loss_w8a8": held_out_loss(w8a8(model), tokenizer, stories)[0],
            "entropy": corpus.entropy(tokenizer, count),
        },
        "sampled": {
            "stories": count, "in_grammar": sum(grammar.check(text, strict=False) is None for text in told),
            "names_straight": sum(grammar.check(text) is None for text in told),
        },
        "greedy": greedy,
    }
    (directory / "golden.json").write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
    return golden, told
