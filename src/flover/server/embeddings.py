"""/v1/embeddings: the model's last hidden states of each input, pooled and of length 1."""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np

from flover.sampling_params import SamplingParams
from flover.server.answers import Answer, Completion
from flover.server.errors import invalid
from flover.server.protocol import GenerationRequest, prompts_of

ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0)  # of which nothing is told


class EmbeddingRequest(GenerationRequest):
    """`pooling` is ours: the last token's state, or the mean of all."""

    input: Any
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    pooling: Literal["last", "mean"] | None = None

    subject = "input"

    def check(self) -> None:
        super().check()
        if self.dimensions is not None:
            raise invalid(f"dimensions cannot be chosen for this model, got {self.dimensions}", "dimensions")
        if self.stream:
            raise invalid("stream must not be true for embeddings", "stream")

    def sampling_params(self, base: SamplingParams) -> SamplingParams:
        return ONE_TOKEN

    def prompts(self) -> list[Any]:
        return prompts_of("input", self.input)


class EmbeddingAnswer(Completion):
    prefix = "embd-"
    request: EmbeddingRequest

    def so_far(self) -> Answer:
        data = [
            {"object": "embedding", "index": i, "embedding": self._encoded(output.embedding or [])}
            for i, output in sorted(self._newest.items())
        ]
        tokens = self._usage()["prompt_tokens"]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"id": self.id, "object": "list", **self._head, "data": data, "usage": usage}

    def _encoded(self, embedding: list[float]) -> list[float] | str:
        if self.request.encoding_format != "base64":
            return embedding
        return base64.b64encode(np.array(embedding, dtype="<f4").tobytes()).decode()
