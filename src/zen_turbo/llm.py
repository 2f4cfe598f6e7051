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
        (output,) = self.generate_many([prompt], sampling, on_event=None if on_event is None else lambda _, event: on_event(event))
        return output

    def generate_many(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_event: Callable[[int, Event], None] | None = None,
    ) -> list[RequestOutput]:
        """Continue several prompts side by side, each as it would be continued alone: answers are decoded in one batch, and what prompts begin
        with alike is read once. sampling: for all, or one for each. ``on_event`` sees a prompt's number and event. Raises ValueError for
        another number of samplings, and the error of the first request that fails; the others are aborted then."""
        each = [sampling] * len(prompts) if sampling is None or isinstance(sampling, SamplingParams) else list(sampling)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many samplings, not {len(each)}.")
        ends: dict[int, Finished | Failed] = {}
        request_ids: list[str] = []

        def receiver(number: int) -> Callable[[Event], None]:
            def receive(event: Event) -> None:
                if isinstance(event, Finished | Failed):
                    ends[number] = event
                if on_event is not None:
                    on_event(number, event)

            return receive

        try:
            for number, (prompt, params) in enumerate(zip(prompts, each, strict=True)):
                tokens = self.engine.tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
                request_ids.append(self.engine.submit(tokens, params, on_event=receiver(number)))
            while len(ends) < len(prompts):
                self.engine.step()
                for end in ends.values():
                    if isinstance(end, Failed):
                        raise end.error
        except BaseException:
            for request_id in request_ids:
                self.engine.abort(request_id)
            while self.engine.step():
                pass
            raise
        return [end.output for _, end in sorted(ends.items()) if isinstance(end, Finished)]
