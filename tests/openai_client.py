"""OpenAI's own client against a server on the built-in model: BASE_URL API_KEY.

The server has one slot and a queue of one.
"""

import asyncio
import sys

import openai

base_url, key = sys.argv[1:3]
client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0)
question = [{"role": "user", "content": "Where was Lioba Hartsong born?"}]
answer = "Lioba Hartsong was born in the town of Gullcliff."


def raises(kind, call):
    try:
        call()
    except kind as e:
        return e
    raise AssertionError(f"no {kind.__name__}")


# Models.
models = list(client.models.list())
assert [m.id for m in models] == ["nepenthe-mini"], models
name = models[0].id
assert client.models.retrieve(name).id == name
raises(openai.NotFoundError, lambda: client.models.retrieve("other"))

# Chat, whole.
chat = client.chat.completions.create(
    model=name, messages=question, temperature=0, logprobs=True, top_logprobs=2
)
choice = chat.choices[0]
assert choice.message.content.strip() == answer, chat
assert choice.message.role == "assistant" and choice.finish_reason == "stop"
assert chat.system_fingerprint.startswith("np-")
assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
tokens = choice.logprobs.content
assert "".join(t.token for t in tokens) == choice.message.content
assert all(t.logprob <= 0 and len(t.top_logprobs) == 2 for t in tokens)
assert bytes(b for t in tokens for b in t.bytes).decode() == choice.message.content

# Chat, streamed.
text, finish, usage = "", None, None
for chunk in client.chat.completions.create(
    model=name,
    messages=question,
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
):
    if chunk.choices:
        text += chunk.choices[0].delta.content or ""
        finish = chunk.choices[0].finish_reason or finish
    usage = chunk.usage or usage
assert (text.strip(), finish) == (answer, "stop"), text
assert usage.completion_tokens == chat.usage.completion_tokens

# The client's own accumulating helper.
with client.chat.completions.stream(model=name, messages=question, temperature=0) as stream:
    final = stream.get_final_completion()
assert final.choices[0].message.content.strip() == answer

# Completions, whole and streamed, with a stop string and log-probabilities.
whole = client.completions.create(
    model=name, prompt="Lioba Hartsong was", temperature=0, max_tokens=8, logprobs=1, stop="."
)
logprobs = whole.choices[0].logprobs
assert "".join(logprobs.tokens) == whole.choices[0].text, whole
assert len(logprobs.token_logprobs) == len(logprobs.text_offset) == len(logprobs.tokens)
parts = client.completions.create(
    model=name, prompt="Lioba Hartsong was", temperature=0, max_tokens=8, stop=".", stream=True
)
assert "".join(p.choices[0].text for p in parts) == whole.choices[0].text
two = client.completions.create(model=name, prompt=["Lioba", "Question:"], max_tokens=4, seed=1)
assert len(two.choices) == 2

# Refusals become the client's exceptions.
e = raises(
    openai.BadRequestError,
    lambda: client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": "word " * 4000}]
    ),
)
assert e.code == "context_length_exceeded" and e.param == "messages", e
e = raises(
    openai.BadRequestError,
    lambda: client.chat.completions.create(
        model=name, messages=question, response_format={"type": "json_object"}
    ),
)
assert e.param == "response_format", e
wrong = openai.OpenAI(base_url=base_url, api_key="guess", max_retries=0)
raises(openai.AuthenticationError, lambda: wrong.models.list())


# A full server, and the client's own retries.
async def crowd(retries):
    many = openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=retries)
    calls = [
        many.completions.create(
            model=name,
            prompt="Lioba",
            temperature=0,
            max_tokens=300,
            extra_body={"repeat_penalty": 0.1},
        )
        for _ in range(6)
    ]
    return await asyncio.gather(*calls, return_exceptions=True)


found = asyncio.run(crowd(0))
assert any(isinstance(r, openai.RateLimitError) for r in found), found
assert len({r.choices[0].text for r in found if not isinstance(r, Exception)}) == 1, found
found = asyncio.run(crowd(10))
assert not any(isinstance(r, Exception) for r in found), found

# A stream that is left frees its slot.
stream = client.completions.create(
    model=name,
    prompt="Lioba",
    temperature=0,
    max_tokens=1900,
    stream=True,
    extra_body={"repeat_penalty": 0.1},
)
next(iter(stream))
stream.close()
again = client.with_options(max_retries=5).chat.completions.create(
    model=name, messages=question, temperature=0
)
assert again.choices[0].message.content.strip() == answer
print("all passed")
