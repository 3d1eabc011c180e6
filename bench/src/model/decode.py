"""Decodes prompts of the same length greedily, with a key/value cache, in one process; prints tokens a second.

    decode.py version
    decode.py run DIR DTYPE THREADS BATCH PROMPT_TOKENS NEW_TOKENS
"""

import json
import sys
import time
from pathlib import Path

BLOCK = 128


def dequantised(codes, scale):
    blocks = scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return codes.float() * blocks[..., : codes.shape[-2], : codes.shape[-1]]


def load(directory, dtype):
    from safetensors.torch import load_file

    fields = json.loads((directory / "config.json").read_text())
    config = Config(**{name: fields[name] for name in Config.__dataclass_fields__ if name in fields})
    stored = {}
    for file in sorted(directory.glob("*.safetensors")):
        stored |= load_file(file)
    scale = "_scale_inv"
    weights = {
        name: dequantised(weight, stored[name + scale]) if name + scale in stored else weight.float()
        for name, weight in stored.items()
        if not name.endswith(scale)
    }
    model = Step3(config)
    model.load_state_dict(weights)
    return model.to(dtype).eval()


def run(directory, dtype, threads, batch, prompt_tokens, new_tokens):
    torch.set_num_threads(int(threads))
    model = load(Path(directory), getattr(torch, {"bf16": "bfloat16", "f32": "float32"}[dtype]))
    batch, prompt_tokens, new_tokens = int(batch), int(prompt_tokens), int(new_tokens)
    vocabulary = model.config.vocab_size
    prompts = torch.tensor([[(7 * row + 3 * at) % vocabulary for at in range(prompt_tokens)] for row in range(batch)])
    with torch.inference_mode():
        for timed in (False, True):
            caches = [{} for _ in model.model.layers]
            tokens = model(prompts, 0, caches)[:, -1:].argmax(-1)
            started, count = time.perf_counter(), new_tokens - 1 if timed else 4
            for step in range(count):
                tokens = model(tokens, prompt_tokens + step, caches)[:, -1:].argmax(-1)
            rate = batch * count / (time.perf_counter() - started)
    print(json.dumps({"tokens_per_s": rate}))


if __name__ == "__main__":
    import safetensors
    import torch

    if sys.argv[1] == "version":
        print(torch.__version__)
    else:
        run(*sys.argv[2:])
