"""LiteLLM against a server: python litellm_client.py BASE_URL MODEL. Exits with an error if something is not as a user expects it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch its price list otherwise

import litellm

MESSAGES = [{"role": "user", "content": "The grass is green."}]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"enum": ["Rom"]}}, "required": ["city"]}},
}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"type": "boolean"}}}


def main(base_url: str, name: str) -> None:
    for provider in ("hosted_vllm", "openai"):
        settings: dict[str, Any] = {
            "model": f"{provider}/{name}", "api_base": base_url, "api_key": "none", "temperature": 0, "seed": 1, "num_retries": 0
        }
        whole = litellm.completion(**settings, messages=MESSAGES, max_tokens=12)
        text = whole.choices[0].message.content
        assert whole.usage.completion_tokens == 12 and whole.choices[0].finish_reason == "length", whole
        stream = litellm.completion(**settings, messages=MESSAGES, max_tokens=12, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
        assert chunks[-1].usage.completion_tokens == 12, chunks[-1]

        async def asked(settings: dict[str, Any] = settings) -> str:
            return (await litellm.acompletion(**settings, messages=MESSAGES, max_tokens=12)).choices[0].message.content

        assert asyncio.run(asked()) == text
        formed = litellm.completion(**settings, messages=MESSAGES, max_tokens=50, response_format=FORM)
        assert formed.choices[0].message.content in ("true", "false"), formed
        choice = {"type": "function", "function": {"name": "weather"}}
        called = litellm.completion(**settings, messages=MESSAGES, max_tokens=200, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
        assert called.choices[0].message.tool_calls, called
        (call,) = called.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)["city"]) == ("weather", "Rom"), called
        several = litellm.completion(**{**settings, "temperature": 1}, messages=MESSAGES, max_tokens=12, n=2)
        assert len({choice.message.content for choice in several.choices}) == 2
        try:
            litellm.completion(**settings, messages=[{"role": "user", "content": "x y z " * 5000}])
        except litellm.ContextWindowExceededError:
            pass
        else:
            raise AssertionError("a prompt that is too long was accepted")
    plain = litellm.text_completion(model=f"text-completion-openai/{name}", api_base=base_url, api_key="none", prompt="The", max_tokens=4)
    assert plain.usage.completion_tokens == 4, plain


if __name__ == "__main__":
    main(*sys.argv[1:3])
    print("ok")
