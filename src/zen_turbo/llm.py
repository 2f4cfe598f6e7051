"""The offline interface: load a model, generate, no server and no thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zen_turbo.config import EngineConfig
from zen_turbo.engine.engine import Engine
from zen_turbo.engine.request import Event, Failed, Finished, RequestOutput, SamplingParams

DEFAULT_MODEL = "qwen2.5-coder-0.5b-instruct"


class LLM:
    """A model ready to answer. Keyword arguments are the fields of EngineConfig; an unknown one raises ConfigurationError.

    >>> llm = LLM("qwen2.5-coder-0.5b-instruct")
    >>> llm.chat([{"role": "user", "content": "Say hello."}]).text
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        config: EngineConfig | None = None,
        on_layer: Callable[[int, int], None] | None = None,
        **knobs: Any,
    ) -> None:
        self.engine = Engine(model, EngineConfig.from_dict({**(config.to_dict() if config else {}), **knobs}), on_layer=on_layer)

    def chat(
        self,
        messages: list[dict[str, Any]],
        sampling: SamplingParams | None = None,
        *,
        on_event: Callable[[Event], None] | None = None,
    ) -> RequestOutput:
        """Answer a conversation. messages: OpenAI's shape."""
        return self.generate(self.engine.chat_template.encode(messages), sampling, on_event=on_event)

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        on_event: Callable[[Event], None] | None = None,
    ) -> RequestOutput:
        """Continue a text or token ids. ``on_event`` sees every event as it happens. Raises the error that a request failed with; an
        interrupt from the keyboard aborts the request and is raised again."""
        if isinstance(prompt, str):
            prompt = self.engine.tokenizer.encode(prompt, add_special_tokens=True)
        last: list[Event] = []

        def receive(event: Event) -> None:
            last[:] = [event]
            if on_event is not None:
                on_event(event)

        request_id = self.engine.submit(prompt, sampling, on_event=receive)
        try:
            while not (last and isinstance(last[0], Finished | Failed)):
                self.engine.step()
        except BaseException:
            self.engine.abort(request_id)
            while self.engine.step():
                pass
            raise
        event = last[0]
        if isinstance(event, Failed):
            raise event.error
        assert isinstance(event, Finished)
        return event.output
