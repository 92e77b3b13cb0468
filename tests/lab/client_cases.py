"""What programs ask through an SDK, each as a function of its client: it checks the form of what comes back, and
returns what two servers with the same model must agree on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import anthropic
import openai
from pydantic import BaseModel, ConfigDict, Field

TOKENS = 24
QUESTION = "Three machines under one roof agreed"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
GREEDY: dict[str, Any] = {"model": "default", "temperature": 0}
SOBER: dict[str, Any] = {"model": "default", "extra_body": {"temperature": 0}}
"""The same in the words of Anthropic's SDK, which has none for it."""


class Forecast(BaseModel):
    """What the tool takes, and what structured answers are made of."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Oslo", "Rome"]
    days: int = Field(ge=1, le=5)


SCHEMA = Forecast.model_json_schema()
FUNCTION = {"name": "forecast", "description": "Tells the weather.", "parameters": SCHEMA}
TOOL: Any = {"type": "function", "function": FUNCTION}
ANTHROPIC_TOOL: Any = {"name": "forecast", "description": "Tells the weather.", "input_schema": SCHEMA}


def _begins_json(client: openai.OpenAI) -> dict[str, int]:
    """A bias towards the tokens that a JSON object begins with: a model without sense needs to be pushed."""
    ask = client.with_options(base_url=str(client.base_url).removesuffix("v1/"))
    tokens = set()
    for text in ("{", "a{", '{"', 'a{"'):
        answer = ask.post("tokenize", body={"content": text, "with_pieces": True}, cast_to=object)
        tokens |= {t["id"] for t in answer["tokens"] if t["piece"] in ("{", '{"')}  # type: ignore[index]
    assert tokens
    return {str(token): 100 for token in tokens}


# -- OpenAI ----------------------------------------------------------------------------------------------------------


def chat(client: openai.OpenAI) -> Any:
    whole = client.chat.completions.create(messages=MESSAGES, max_tokens=TOKENS, **GREEDY)
    [choice] = whole.choices
    assert choice.finish_reason == "length" and choice.message.role == "assistant"
    assert whole.usage is not None and whole.usage.completion_tokens == TOKENS
    chunks = list(
        client.chat.completions.create(
            messages=MESSAGES, max_tokens=TOKENS, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].id != whole.id
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert [delta.role for delta in deltas if delta.role] == ["assistant"], "one preamble"
    assert len(deltas) > TOKENS // 2, "it came in pieces"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens == TOKENS
    assert usage.prompt_tokens == whole.usage.prompt_tokens
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content
    return choice.message.content, usage.prompt_tokens


def chat_details(client: openai.OpenAI) -> Any:
    whole = client.chat.completions.create(messages=MESSAGES, max_tokens=8, logprobs=True, top_logprobs=2, **GREEDY)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert all(len(token.top_logprobs) == 2 for token in logprobs.content)
    third = logprobs.content[2].token
    stopped = client.chat.completions.create(messages=MESSAGES, max_tokens=8, stop=[third], **GREEDY)
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == "".join(token.token for token in logprobs.content[:2])
    two = client.chat.completions.create(messages=MESSAGES, max_tokens=4, n=2, **GREEDY)
    assert [choice.index for choice in two.choices] == [0, 1]
    return [token.token for token in logprobs.content], [choice.message.content for choice in two.choices]


def completions(client: openai.OpenAI) -> Any:
    whole = client.completions.create(prompt=QUESTION, max_tokens=TOKENS, **GREEDY)
    chunks = list(client.completions.create(prompt=QUESTION, max_tokens=TOKENS, stream=True, **GREEDY))
    assert len({chunk.id for chunk in chunks}) == 1
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert whole.choices[0].finish_reason == "length"
    return whole.choices[0].text


def responses(client: openai.OpenAI) -> Any:
    whole = client.responses.create(input=QUESTION, max_output_tokens=TOKENS, **GREEDY)
    events = list(client.responses.create(input=QUESTION, max_output_tokens=TOKENS, stream=True, **GREEDY))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    with client.responses.stream(input=QUESTION, max_output_tokens=TOKENS, **GREEDY) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        assert stream.get_final_response().output_text == whole.output_text == snapshots[-1]
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert kinds.count("response.output_item.added") == 1 == kinds.count("response.output_item.done")
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    final = next(event.response for event in events if event.type == "response.completed")
    assert "".join(deltas) == final.output_text == whole.output_text and final.id == events[0].response.id
    assert len(deltas) > TOKENS // 2, "it came in pieces"
    return whole.output_text


def tools(client: openai.OpenAI) -> Any:
    forced: dict[str, Any] = {
        "tools": [TOOL],
        "tool_choice": "required",
        "logit_bias": _begins_json(client),
        "max_tokens": 100,
        **GREEDY,
    }
    whole = client.chat.completions.create(messages=MESSAGES, **forced)
    assert whole.choices[0].finish_reason == "tool_calls"
    [call] = whole.choices[0].message.tool_calls or []
    assert call.type == "function" and call.function.name == "forecast" and call.id
    wanted = Forecast.model_validate_json(call.function.arguments)
    with client.chat.completions.stream(messages=MESSAGES, **forced) as stream:
        parts = sum(event.type == "tool_calls.function.arguments.delta" for event in stream)
        said = stream.get_final_completion().choices[0]
    assert said.finish_reason == "tool_calls" and parts > 3
    [streamed] = said.message.tool_calls or []
    assert Forecast.model_validate_json(streamed.function.arguments) == wanted
    # And on with what the tool says.
    history: list[Any] = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump(exclude_none=True)]},
    ]
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    after = client.chat.completions.create(messages=[*history, result], max_tokens=8, **GREEDY)
    assert after.choices[0].message.content
    return None


def structured(client: openai.OpenAI) -> Any:
    parsed = client.chat.completions.parse(messages=MESSAGES, response_format=Forecast, max_tokens=100, **GREEDY)
    assert parsed.choices[0].finish_reason == "stop"
    assert isinstance(parsed.choices[0].message.parsed, Forecast)
    with client.chat.completions.stream(
        messages=MESSAGES, response_format=Forecast, max_tokens=100, **GREEDY
    ) as stream:
        parts = sum(event.type == "content.delta" for event in stream)
        streamed = stream.get_final_completion().choices[0].message.parsed
    assert streamed == parsed.choices[0].message.parsed and parts > 3
    some_json = client.completions.create(
        prompt=QUESTION, max_tokens=20, extra_body={"grammar": 'root ::= "yes" | "no"'}, **GREEDY
    )
    assert some_json.choices[0].text in ("yes", "no")
    return None


def embeddings(client: openai.OpenAI) -> Any:
    both = client.embeddings.create(model="default", input=[QUESTION, "Hello"])
    assert [entry.index for entry in both.data] == [0, 1] and both.usage.prompt_tokens > 0
    [alone] = client.embeddings.create(model="default", input="Hello", encoding_format="float").data
    assert all(abs(a - b) < 1e-4 for a, b in zip(both.data[1].embedding, alone.embedding, strict=True))
    return [[round(number, 3) for number in entry.embedding] for entry in both.data]


def responses_tools(client: openai.OpenAI) -> Any:
    tool: Any = {"type": "function", "strict": True, **FUNCTION}
    forced: dict[str, Any] = {
        "tools": [tool],
        "tool_choice": "required",
        "max_output_tokens": 100,
        "extra_body": {"logit_bias": _begins_json(client)},
        **GREEDY,
    }
    whole = client.responses.create(input=QUESTION, **forced)
    [call] = whole.output
    assert call.type == "function_call" and call.name == "forecast"
    with client.responses.stream(input=QUESTION, **forced) as stream:
        kinds = [event.type for event in stream]
        [streamed] = stream.get_final_response().output
    assert kinds.count("response.function_call_arguments.delta") > 3 and kinds[-1] == "response.completed"
    assert streamed.type == "function_call"
    assert Forecast.model_validate_json(streamed.arguments) == Forecast.model_validate_json(call.arguments)
    return None


def responses_structured(client: openai.OpenAI) -> Any:
    asked: dict[str, Any] = {"input": QUESTION, "text_format": Forecast, "max_output_tokens": 100, **GREEDY}
    parsed = client.responses.parse(**asked)
    assert isinstance(parsed.output_parsed, Forecast)
    with client.responses.stream(**asked) as stream:
        parts = sum(event.type == "response.output_text.delta" for event in stream)
        assert stream.get_final_response().output_parsed == parsed.output_parsed and parts > 3
    return None


OPENAI: dict[str, Callable[[openai.OpenAI], Any]] = {
    case.__name__: case
    for case in (
        chat,
        chat_details,
        completions,
        responses,
        tools,
        responses_tools,
        responses_structured,
        structured,
        embeddings,
    )
}


# -- Anthropic -------------------------------------------------------------------------------------------------------


def messages(client: anthropic.Anthropic) -> Any:
    asked: dict[str, Any] = {"messages": MESSAGES, "max_tokens": TOKENS, **SOBER}
    whole = client.messages.create(**asked)
    [block] = whole.content
    assert block.type == "text" and whole.stop_reason == "max_tokens" and whole.usage.output_tokens == TOKENS
    with client.messages.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert kinds.count("message_start") == kinds.count("content_block_start") == kinds.count("message_delta") == 1
    assert kinds.count("text") > TOKENS // 2, "it came in pieces"
    [streamed] = final.content
    assert streamed.type == "text" and streamed.text == block.text
    assert final.stop_reason == "max_tokens" and final.usage.output_tokens == TOKENS
    return block.text


def message_tools(client: anthropic.Anthropic) -> Any:
    begun = {"role": "assistant", "content": "\n{"}
    asked: dict[str, Any] = {
        "messages": [*MESSAGES, begun],
        "tools": [ANTHROPIC_TOOL],
        "tool_choice": {"type": "any"},
        "max_tokens": 100,
        **SOBER,
    }
    whole = client.messages.create(**asked)
    assert whole.stop_reason == "tool_use"
    [call] = [block for block in whole.content if block.type == "tool_use"]
    assert call.name == "forecast"
    with client.messages.stream(**asked) as stream:
        parts = sum(event.type == "input_json" for event in stream)
        final = stream.get_final_message()
    [streamed] = [block for block in final.content if block.type == "tool_use"]
    assert parts > 3 and final.stop_reason == "tool_use"
    assert Forecast.model_validate(streamed.input) == Forecast.model_validate(call.input)
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}]}
    history: list[Any] = [*MESSAGES, {"role": "assistant", "content": [call.model_dump(exclude_none=True)]}, result]
    after = client.messages.create(messages=history, max_tokens=8, **SOBER)
    assert after.content[0].type == "text"
    return None


def count_tokens(client: anthropic.Anthropic) -> Any:
    return client.messages.count_tokens(model="default", messages=MESSAGES).input_tokens


ANTHROPIC: dict[str, Callable[[anthropic.Anthropic], Any]] = {
    case.__name__: case for case in (messages, message_tools, count_tokens)
}
