"""The official `openai` client against `stepmesh serve`: run with the binary's path as the only argument."""

import re
import subprocess
import sys

import openai


def main(binary):
    server = subprocess.Popen(
        [binary, "serve", "--port", "0", "--model-name", "story"], stdout=subprocess.PIPE, text=True
    )
    try:
        line = server.stdout.readline()
        base = re.fullmatch(r"serving (http://\S+)\n", line)
        assert base, line
        check(openai.OpenAI(base_url=base[1], api_key="none", max_retries=0))
    finally:
        server.terminate()
        assert server.wait(timeout=30) == 0
    print("the openai client", openai.__version__, "is served")


def check(client):
    assert [model.id for model in client.models.list()] == ["story"]
    assert client.models.retrieve("story").owned_by == "stepmesh"

    prompt = "Once there was a girl named Anna who lived by the"
    ask = {"model": "story", "prompt": prompt, "max_tokens": 60, "temperature": 0}
    whole = client.completions.create(**ask)
    text = whole.choices[0].text
    assert "Anna" in text and whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    pieces = list(client.completions.create(**ask, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == text and len(pieces) > 10
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason

    messages = [{"role": "user", "content": "Tell me a story about Tom and a key."}]
    ask = {"model": "story", "messages": messages, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    said = whole.choices[0].message
    assert said.role == "assistant" and "Tom" in said.content and whole.choices[0].finish_reason == "stop", whole
    pieces = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == said.content
    assert pieces[-1].usage == whole.usage

    again = [client.completions.create(model="story", prompt="Tom", seed=5, max_tokens=20, n=2) for _ in range(2)]
    assert [choice.text for choice in again[0].choices] == [choice.text for choice in again[1].choices]

    for wrong, kind in [
        ({"model": "gpt", "prompt": "x"}, openai.NotFoundError),
        ({"model": "story", "prompt": "x", "max_tokens": 5000}, openai.BadRequestError),
        ({"model": "story", "prompt": "x", "temperature": 9}, openai.BadRequestError),
    ]:
        try:
            client.completions.create(**wrong)
        except kind as error:
            assert error.body["message"], error
        else:
            raise AssertionError(f"{wrong} was taken")

    # A reader that leaves early is no trouble for the next one.
    with client.completions.create(model="story", prompt=prompt, max_tokens=200, stream=True) as stream:
        next(iter(stream))
    assert client.completions.create(model="story", prompt="Tom is a", max_tokens=4, stop=["\n"]).choices[0].text


if __name__ == "__main__":
    main(sys.argv[1])
