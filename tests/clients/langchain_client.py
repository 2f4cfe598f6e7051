"""LangChain against a server: python langchain_client.py BASE_URL MODEL. Exits with an error if something is not as a user expects it."""

from __future__ import annotations

import asyncio
import sys
from typing import Literal

from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Weather(BaseModel):
    """Of one day."""

    sunny: bool
    wind: Literal["calm", "storm"]


@tool
def weather(city: Literal["Rom", "Oslo"]) -> str:
    """Says what the weather is."""
    return f"sunny in {city}"


def main(base_url: str, name: str) -> None:
    settings = {"base_url": base_url, "model": name, "api_key": "none", "max_retries": 0, "temperature": 0, "seed": 1, "timeout": 120}
    llm = ChatOpenAI(**settings, max_tokens=12, stream_usage=True)
    whole = llm.invoke("The grass is green.")
    assert whole.usage_metadata["output_tokens"] == 12 and whole.response_metadata["finish_reason"] == "length", whole
    chunks = list(llm.stream("The grass is green."))
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 12

    async def streamed() -> str:
        return "".join([chunk.content async for chunk in llm.astream("The grass is green.")])

    assert asyncio.run(streamed()) == whole.content
    assert len(llm.batch(["a", "b", "c"])) == 3

    long = ChatOpenAI(**settings, max_tokens=300)
    for method in ("json_schema", "function_calling"):
        found = long.with_structured_output(Weather, method=method, include_raw=True).invoke("Say.")
        assert isinstance(found["parsed"], Weather), found
    caller = long.bind_tools([weather], tool_choice="any", parallel_tool_calls=False)
    message = caller.invoke("The weather?")
    (call,) = message.tool_calls
    assert call["name"] == "weather" and call["args"]["city"] in ("Rom", "Oslo"), message
    gathered = None
    for chunk in caller.stream("The weather?"):
        gathered = chunk if gathered is None else gathered + chunk
    assert gathered.tool_calls[0]["args"] == call["args"], gathered
    result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    after = llm.bind_tools([weather]).invoke([HumanMessage("The weather?"), message, result])
    assert after.usage_metadata["input_tokens"] > message.usage_metadata["input_tokens"]

    scored = llm.bind(logprobs=True, top_logprobs=2).invoke("The grass is green.")
    assert len(scored.response_metadata["logprobs"]["content"]) == 12
    del settings["seed"]  # the client's method for this route has none
    responses = ChatOpenAI(**settings, max_tokens=12, use_responses_api=True).invoke("The grass is green.")
    assert responses.text == whole.content, responses
    try:
        llm.invoke("x y z " * 5000)
    except ContextOverflowError:
        pass
    else:
        raise AssertionError("a prompt that is too long was accepted")


if __name__ == "__main__":
    main(*sys.argv[1:3])
    print("ok")
