"""From what a user gives to `Request`s: a prompt and its `SamplingParams`, checked against this model and cache.

Invariant: what passes here can run, so nothing is half added. Every error is one line that names the value.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any

from flover.config import ResolvedConfig
from flover.engine.grammar import Vocabulary
from flover.engine.grammar_check import GrammarChecker
from flover.request import ContextLengthError, Request, RowSampling
from flover.sampling_params import SamplingParams, as_list
from flover.show import show
from flover.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]


class InputProcessor:
    """Checks and tokenises. Requests without a seed get one from a generator of its own, in order of preparation."""

    def __init__(self, config: ResolvedConfig, tokenizer: Tokenizer | None, folder: Path) -> None:
        self._scheduler, self._kv, self._model = config.scheduler, config.kv, config.model
        vocabulary = Vocabulary(folder, self._model.vocab_size, self._model.eos_token_ids)
        self._grammars = GrammarChecker(vocabulary)
        self._tokenizer = tokenizer
        self._seeds = random.Random(config.engine.seed)

    def requests(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        priority: int | None,
        cache_salt: str,
        pooling: str = "",
    ) -> tuple[str | None, list[Request]]:
        """-> the prompt's text, if there is one, and a request for each of its n choices."""
        if not isinstance(request_id, str) or not request_id:
            raise ValueError(f"request_id must be a non-empty string, got {show(request_id)}")
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling parameters must be a SamplingParams, got {show(params)}")
        if priority is not None and (isinstance(priority, bool) or not isinstance(priority, int)):
            raise ValueError(f"priority must be an integer, got {show(priority)}")
        if not isinstance(cache_salt, str):
            raise ValueError(f"cache_salt must be a string, got {show(cache_salt)}")
        if pooling not in ("", "last", "mean"):
            raise ValueError(f"pooling must be last or mean, got {show(pooling)}")
        text, ids = self._prompt(prompt)
        self._check(params)
        seed = self._seeds.getrandbits(64) if params.seed is None else params.seed
        grammar = self.grammar(params)
        eos = frozenset() if params.ignore_eos and not grammar else frozenset(self._model.eos_token_ids)
        stop = eos | frozenset(params.stop_token_ids)
        bad_words = self._bad_words(params.bad_words)
        room = max(1, self._scheduler.max_model_len - len(ids))
        if params.max_tokens is None:  # to the limit, which may be the cache's
            room = min(room, max(1, self._kv.room - len(ids) + 1))
        requests: list[Request] = []
        for choice in range(params.n):
            request = Request(
                request_id=f"{request_id}#{choice}" if choice else request_id,
                token_ids=list(ids),
                sampling=self._row_sampling(params, seed, choice, stop, bad_words),
                max_output_tokens=min(params.max_tokens or room, room),
                stop_token_ids=stop,
                eos_token_ids=eos,
                prompt_logprobs=-1 if params.prompt_logprobs is None or choice else params.prompt_logprobs,
                priority=params.priority if priority is None else priority,
                cache_salt=cache_salt,
                grammar=grammar,
                pooling=pooling,
                sibling=requests[0] if requests else None,
                logprobs=None if params.logprobs is None else [],
            )
            requests.append(request)
        return text, requests

    def grammar(self, params: SamplingParams) -> str:
        """What the text must follow, compiled once to see that it can be; "" if it may be anything.

        Raises:
            ValueError: the grammar is none, or costs too much.
        """
        if params.structured_outputs is None:
            return ""
        self._need_tokenizer("structured_outputs")
        grammar = params.structured_outputs.grammar_text()
        self._grammars.check(grammar)
        return grammar

    def close(self) -> None:
        self._grammars.close()

    # ---- prompts ---------------------------------------------------------------------------------------------------

    def _prompt(self, prompt: Any) -> tuple[str | None, list[int]]:
        """-> text if there is one, token ids."""
        text: Any = None
        ids: Any = None
        if isinstance(prompt, str):
            text = prompt
        elif isinstance(prompt, Mapping):
            if not prompt or set(prompt) - {"prompt", "prompt_token_ids"}:
                raise ValueError(f"a prompt has 'prompt' or 'prompt_token_ids', got {sorted(map(str, prompt))}")
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        elif prompt is None:
            raise ValueError("prompt must be text or token ids, got None")
        else:
            ids = prompt
        if text is not None and not isinstance(text, str):
            raise ValueError(f"prompt must be text, got {show(text)}")
        if ids is not None:
            ids = self._token_ids("prompt_token_ids", ids)
        elif text:
            tokenizer = self._need_tokenizer("a text prompt")
            check_length(text, tokenizer, self._scheduler.max_model_len)
            ids = self._token_ids("the tokenised prompt", tokenizer.encode(text))
        if not ids:
            raise ValueError("prompt is empty")
        limit = self._scheduler.max_model_len
        if len(ids) > limit:
            raise ContextLengthError(f"a prompt of {len(ids)} tokens is longer than the context of {limit}")
        return text, ids

    def _token_ids(self, name: str, ids: Any) -> list[int]:
        ids = as_list(ids)
        if isinstance(ids, (str, bytes, Mapping)) or not isinstance(ids, Iterable):
            raise ValueError(f"{name} must be a list of token ids, got {show(ids)}")
        checked = []
        for token_id in ids:
            try:
                value = index(token_id)
            except TypeError:
                value = -1
            if isinstance(token_id, bool) or not 0 <= value < self._model.vocab_size:
                vocabulary = f"the vocabulary of {self._model.vocab_size}"
                raise ValueError(f"{name} holds {show(token_id)}, which is no id of {vocabulary}")
            checked.append(value)
        return checked

    # ---- parameters ------------------------------------------------------------------------------------------------

    def _check(self, params: SamplingParams) -> None:
        """What only the model can tell about the parameters."""
        for name in ("stop_token_ids", "allowed_token_ids"):
            self._token_ids(name, getattr(params, name) or ())
        self._token_ids("logit_bias", list(params.logit_bias or ()))
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self._model.vocab_size:
                raise ValueError(
                    f"{name}={getattr(params, name)} is more than the vocabulary of {self._model.vocab_size}"
                )
        if params.stop:
            self._need_tokenizer("stop")

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError(f"{what} needs a tokenizer, and the model has no tokenizer.json: give token ids")
        return self._tokenizer

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as it is tokenised at the beginning of a text and after a space."""
        sequences: dict[tuple[int, ...], None] = {}
        for word in words:
            tokenizer = self._need_tokenizer("bad_words")
            for spelling in (word.strip(), " " + word.strip()):
                ids = tuple(tokenizer.encode(spelling, add_special_tokens=False))
                if not word.strip() or not ids:
                    raise ValueError(f"bad_words holds {word!r}, which makes no token")
                sequences[tuple(self._token_ids("bad_words", ids))] = None
        return tuple(sequences)

    def _row_sampling(
        self,
        params: SamplingParams,
        seed: int,
        choice: int,
        stop: frozenset[int],
        bad_words: tuple[tuple[int, ...], ...],
    ) -> RowSampling:
        allowed = params.allowed_token_ids
        masked = {i for i in stop if i < self._model.vocab_size} if params.min_tokens else set()
        return RowSampling(
            seed=seed,
            choice=choice,
            temperature=params.temperature,
            top_k=max(params.top_k, 0),
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=tuple((params.logit_bias or {}).items()),
            bad_words=bad_words,
            allowed_token_ids=None if allowed is None else tuple(allowed),
            min_tokens=params.min_tokens,
            stop_token_ids=tuple(sorted(masked)),
            logprobs=-1 if params.logprobs is None else params.logprobs,
            masked=params.structured_outputs is not None,
        )


def check_length(text: str, tokenizer: Tokenizer, limit: int) -> None:
    """Refuse a prompt that cannot fit `limit` tokens before the time to tokenise it is spent.

    Raises:
        ContextLengthError: it is longer than so many of the longest tokens.
    """
    if len(text) > limit * tokenizer.longest_token:
        raise ContextLengthError(f"a prompt of {len(text)} characters is longer than the context of {limit} tokens")
