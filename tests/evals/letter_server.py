"""A server on loopback with a model's log probabilities, in the forms that real servers have."""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import torch
from evals.endpoint_server import Handler, Server

from qwenq.evals.model import LocalModel


class LetterServer(Server):
    """Serves a local model; ``manner`` selects whose interface it follows.

    ``vllm``: at most 20 likely tokens, and echo. ``llama``: any number of them in the newer form, no echo.
    ``logits_all``: refuses log probabilities with status 500, as llama-cpp-python does by default.
    ``silent``: ignores the options. ``merging``: echoes prompt and continuation as one token.
    """

    MOST: ClassVar[dict[str, int]] = {"vllm": 20, "merging": 5}

    def __init__(self, model: LocalModel, manner: str) -> None:
        super().__init__()
        self.RequestHandlerClass = LetterHandler
        self.model, self.manner = model, manner
        self.turn = threading.Lock()

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Return log softmax [tokens, vocabulary] of a text."""
        with self.turn, torch.inference_mode():
            engine = self.model.engine
            (found,) = engine.logits([ids], engine.new_cache(1, len(ids)))
            return found.float().log_softmax(-1)


class LetterHandler(Handler):
    server: LetterServer

    def _answer(self, asked: dict[str, Any], trouble: str) -> None:
        manner, most = self.server.manner, LetterServer.MOST.get(self.server.manner, 1 << 30)
        top = asked.get("logprobs", 0)
        if manner == "logits_all" and top:
            said = "logprobs is not supported for models created with logits_all=False"
            self._send(500, {"error": {"message": said}})
        elif manner == "llama" and asked.get("echo"):
            self._send(400, {"error": {"message": "Only no echo is supported"}})
        elif top > most:
            said = f"Requested sample logprobs of {top}, which is greater than max allowed: {most}"
            self._send(400, {"error": {"message": said}})
        else:
            self._send(200, self._reply(asked, top))

    def _reply(self, asked: dict[str, Any], top: int) -> dict[str, Any]:
        tokenizer = self.server.model.tokenizer
        ids = tokenizer.encode(asked["prompt"])
        scores = self.server.logits(ids)
        ranked = scores[-1].topk(min(max(top, 1), scores.shape[-1]))
        likely = [
            (tokenizer.decode([token]), value)
            for token, value in zip(ranked.indices.tolist(), ranked.values.tolist(), strict=True)
            if token < tokenizer.vocab_size
        ]
        tokens, values = [likely[0][0]], [likely[0][1]]
        if asked.get("echo"):
            before = [scores[place, token].item() for place, token in enumerate(ids[1:])]
            tokens, values = [tokenizer.decode([one]) for one in ids] + tokens, [None, *before, *values]
            if self.server.manner == "merging":
                tokens[-3:-1], values[-3:-1] = ["".join(tokens[-3:-1])], [values[-2]]
        logprobs: dict[str, Any] | None = {"tokens": tokens, "token_logprobs": values}
        if self.server.manner == "llama":
            listed = [{"token": text, "logprob": value} for text, value in likely]
            logprobs = {"content": [{**listed[0], "top_logprobs": listed}]}
        elif self.server.manner == "silent":
            logprobs = None
        elif not asked.get("echo"):
            assert logprobs is not None
            logprobs["top_logprobs"] = [dict(likely)]
        choice = {"text": likely[0][0], "finish_reason": "length", "logprobs": logprobs}
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": 1}}
