"""LlmtrainLM: one of our models as a language model of lm-eval (0.4.13).

lm-eval asks three things: the log-likelihood of a continuation after a context, the log-likelihood
of a whole text, and the text that follows a context. Texts are cut into tokens by lm-eval's own
rules (TemplateLM._encode_pair); scoring.py and llmtrain.generate do the rest.

lm-eval's own splitting over ranks is not used (world_size stays 1 towards it): it hands documents
out before few-shot examples are drawn, so that its scores depend on the number of ranks. Here every
rank gets all requests and shares out batches.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections import Counter, defaultdict

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer, decoders
from tqdm import tqdm

from llmtrain.generate import generate
from llmtrain.model.init import keyed_seed
from llmtrain.model.language_model import LanguageModel
from llmtrain_eval import ranks, scoring

log = logging.getLogger(__name__)

MAX_GEN_TOKS = 256  # lm-eval's default where a task does not say; half a context at most


class LlmtrainLM(TemplateLM):
    """model: causal, on its device. tokenizer: the one it was trained with.

    max_length: tokens of a row, at most; what does not fit is dropped on the left, counted in
    `truncated` (task name -> requests) and logged; an error for the tasks named in
    `refuse_truncation`. batch_tokens: tokens of a forward pass, about.
    add_bos: begin each context with the end-of-text token, as documents begin in training.
    seed: for tasks that sample.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        eot_token_id: int,
        max_length: int,
        batch_tokens: int = 16384,
        add_bos: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        mixers = [block.mixer for block in model.stack.blocks]
        if blind := sorted({type(mixer).__name__ for mixer in mixers if not mixer.causal}):
            raise ValueError(
                f"eval: the mixers {', '.join(blind)} see later tokens, expected causal ones; "
                "these likelihoods exist only for models that predict the next token"
            )
        if tokenizer.get_vocab_size() > model.vocab_size:
            raise ValueError(
                f"eval: the tokenizer has {tokenizer.get_vocab_size()} tokens, expected at most "
                f"the model's {model.vocab_size}; use the tokenizer of the model's training"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batch_tokens = batch_tokens
        self.add_bos = add_bos
        self.seed = seed
        self.truncated: Counter[str] = Counter()
        self.refuse_truncation: set[str] = set()
        self._eot = eot_token_id
        self._eot_text = tokenizer.decode([eot_token_id], skip_special_tokens=False)
        self._device = model.embedding.weight.device
        self._pieces: list[str] | None = None

    @property
    def eot_token_id(self) -> int:
        return self._eot

    @property
    def tokenizer_name(self) -> str:
        """Names lm-eval's cache of requests: the same for equal tokenizers only."""
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()[:16]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids, end-of-text first if wanted (None: as add_bos says).

        The name of a special token in a text is ordinary text, as in training (load_tokenizer).
        """
        tokens = self.tokenizer.encode(string, add_special_tokens=False).ids
        wanted = self.add_bos if add_special_tokens is None else add_special_tokens
        return [self._eot, *tokens] if wanted else tokens

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log p(continuation | context), would greedy decoding yield it) of every request."""
        pairs = []
        for request in requests:
            context, continuation = request.args
            if context == "":
                pair = [self._eot], self.tok_encode(continuation, add_special_tokens=False)
            else:
                pair = self._encode_pair(context, continuation)
            self._fits(request.task_name, len(pair[0]) + len(pair[1]) - 1, self.max_length)
            pairs.append((request.args, *pair))
        self._report_truncated()
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
    ) -> list[tuple[float, bool]]:
        """The same for (texts, context tokens, continuation tokens)."""
        with progress("log-likelihoods", len(requests), disable_tqdm) as bar:
            return scoring.score(
                self.model,
                [(context, continuation) for _, context, continuation in requests],
                max_length=self.max_length,
                batch_tokens=self.batch_tokens,
                done=bar.update,
            )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p(text | end-of-text), in disjoint windows of max_length tokens."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in get_rolling_token_windows(tokens, self._eot, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(index)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for index, (score, _) in zip(owners, scores, strict=True):
            totals[index] += score
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to the first of its stop strings.

        A sampled text depends on the seed, its context and how often that came before, only.
        """
        jobs = defaultdict(list)  # (keys of generate, stop strings, repetition) -> (index, prompt)
        seen: Counter[tuple] = Counter()
        for index, request in enumerate(requests):
            context, kwargs = request.args
            options, until = self._generation(request.task_name, kwargs)
            room = self.max_length - options["max_new_tokens"]
            prompt = self.tok_encode(context)
            self._fits(request.task_name, len(prompt), room)
            key = (tuple(options.items()), until)
            seen[key, context] += 1
            jobs[*key, seen[key, context]].append((index, prompt[-room:]))
        self._report_truncated()
        texts: dict[int, str] = {}
        with progress("generation", len(requests), disable_tqdm) as bar:
            for (options, until, repetition), prompts in jobs.items():
                seed = keyed_seed(self.seed, f"repetition/{repetition}")
                texts |= self._generate(prompts, dict(options), until, seed, bar)
        return [texts[i] for i in range(len(requests))]

    def _generation(self, task: str | None, kwargs: dict) -> tuple[dict, tuple[str, ...]]:
        """Keyword arguments of llmtrain.generate, and the stop strings, from a task's kwargs."""
        known = dict(normalize_gen_kwargs(kwargs, min(MAX_GEN_TOKS, self.max_length // 2)))
        until = tuple(dict.fromkeys([*known.pop("until"), self._eot_text]))
        options = {"max_new_tokens": known.pop("max_gen_toks")}
        options["temperature"] = float(known.pop("temperature", 1.0 if known["do_sample"] else 0.0))
        for name in ("top_k", "top_p"):
            value = known.pop(name, None)
            if options["temperature"] > 0:
                options[name] = value
        rest = {k: v for k, v in known.items() if k != "do_sample" and (k, v) != ("num_beams", 1)}
        if rest:
            raise ValueError(
                f"task {task}: generation_kwargs {kwargs} asks for {rest}, expected until, "
                "max_gen_toks, do_sample, temperature, top_k, top_p; remove the others from the "
                "task's file"
            )
        if not 0 < options["max_new_tokens"] < self.max_length:
            raise ValueError(
                f"task {task}: max_gen_toks is {options['max_new_tokens']}, expected 1 to "
                f"{self.max_length - 1}, one less than the model's context; lower max_gen_toks "
                "in the task's file, or raise max_length"
            )
        return options, until

    def _generate(
        self,
        prompts: list[tuple[int, list[int]]],
        options: dict,
        until: tuple[str, ...],
        seed: int,
        bar: tqdm,
    ) -> dict[int, str]:
        """Request index -> text, of prompts that share options."""
        stop_tokens = self._stop_tokens(until)
        new = options["max_new_tokens"]
        part: dict[int, str] = {}
        for batch in ranks.share(
            scoring.cut(prompts, self.batch_tokens, lambda job: len(job[1]) + new)
        ):
            indices, tokens = zip(*batch)
            rows = generate(
                self.model,
                tokens,
                stop_tokens=stop_tokens,
                seed=seed,
                batch=len(batch),
                **options,
            )
            for index, row in zip(indices, rows):
                text = self.tokenizer.decode(row, skip_special_tokens=True)
                part[index] = postprocess_generated_text(text, list(until), None)
            bar.update(ranks.world_size() * len(batch))
        return {index: text for one in ranks.gather(part) for index, text in one.items()}

    def _stop_tokens(self, until: tuple[str, ...]) -> set[int]:
        """Tokens after which a text is certainly complete: they contain a stop string.

        Only byte-level tokenizers promise that a token reads the same alone and in a text; with
        others, and for stop strings of several tokens, rows run on and are cut afterwards.
        """
        if not isinstance(self.tokenizer.decoder, decoders.ByteLevel):
            return {self._eot}
        if self._pieces is None:
            ids = [[i] for i in range(self.tokenizer.get_vocab_size())]
            self._pieces = self.tokenizer.decode_batch(ids, skip_special_tokens=False)
        stops = {i for i, piece in enumerate(self._pieces) if any(s and s in piece for s in until)}
        return stops | {self._eot}

    def _fits(self, task: str | None, length: int, room: int) -> None:
        """Count a request that does not fit; ValueError for tasks that refuse truncation."""
        if length <= room:
            return
        if task in self.refuse_truncation:
            raise ValueError(
                f"task {task}: a request has {length} tokens, expected at most {room}, since the "
                "task means nothing with a shortened context; raise max_length, or ask for "
                "shorter contexts"
            )
        self.truncated[task or "?"] += 1

    def _report_truncated(self) -> None:
        if self.truncated and ranks.rank() == 0:
            counts = ", ".join(f"{task}: {n}" for task, n in self.truncated.items())
            log.warning(
                "contexts cut on the left to fit max_length=%d (requests so far): %s",
                self.max_length,
                counts,
            )


def progress(what: str, total: int, disabled: bool) -> tqdm:
    """A progress bar on rank 0; a line every 10 seconds where the output is no terminal."""
    return tqdm(
        total=total,
        desc=what,
        disable=disabled or ranks.rank() != 0,
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )
