"""Has a token come through every member of the ring? Asked of our own llama-server before anybody hears of it."""

from __future__ import annotations

import asyncio

import httpx

from mesh.errors import EngineError

HEALTH_EVERY_S = 0.05


async def first_token(port: int, api_key: str) -> None:
    """Wait until llama-server on loopback ``port`` is healthy, then have it generate one token.

    No deadline of its own: loading takes as long as it takes, the core decides when that is too long.

    Raises:
        EngineError: it answered, but not with a token.
    """
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}",
        headers={"Authorization": f"Bearer {api_key}"},
        timeout=httpx.Timeout(None, connect=5.0),
        trust_env=False,  # a proxy from the environment must never see this
    ) as client:
        await _healthy(client)
        try:
            # Nothing cached: the token has to be computed by the whole ring, now.
            question = {"prompt": "Hello", "n_predict": 1, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
            answer = await client.post("/completion", json=question)
        except httpx.HTTPError as error:
            raise EngineError(f"llama-server broke off before its first token: {error!r}") from error
        if answer.status_code != 200:
            raise EngineError(f"llama-server answered {answer.status_code} to its first prompt: {answer.text[:300]}")
        try:
            tokens = int(answer.json()["tokens_predicted"])
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(f"llama-server's first answer is not one: {answer.text[:300]}") from error
        if tokens < 1:
            raise EngineError("llama-server answered its first prompt without a token")


async def _healthy(client: httpx.AsyncClient) -> None:
    while True:
        try:
            if (await client.get("/health")).status_code == 200:
                return
        except httpx.HTTPError:
            # Not up yet, or down already: the exit of the process tells which.
            pass
        await asyncio.sleep(HEALTH_EVERY_S)
