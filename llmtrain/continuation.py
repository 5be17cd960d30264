"""`llmtrain generate`: texts in, continued texts out, with the model of a checkpoint."""

from __future__ import annotations

import logging

from llmtrain_data.tokenizer import Existing, load_tokenizer
from llmtrain_eval import ranks

from llmtrain.build import DTYPES
from llmtrain.checkpoint import load_model
from llmtrain.generate import generate
from llmtrain.speculative import speculate

log = logging.getLogger(__name__)

KNOBS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")


def continuations(config: dict) -> list[tuple[str, str]]:
    """(prompt, continuation), `samples` of them for each prompt, of a resolved generate.yaml.

    ValueError when a prompt and its continuation are longer than the model's context, and for a
    depth that the model does not have.
    """
    device = ranks.device(config["device"])
    loaded = load_model(config["checkpoint"], device, DTYPES[config["precision"]])
    loaded.model.stack.set_depth(repeats=config["repeats"], exit_threshold=config["exit_threshold"])
    tokenizer = load_tokenizer(loaded.tokenizer_file)
    spec = Existing(path=str(loaded.tokenizer_file), eot=loaded.config["tokenizer"].get("eot"))
    # It opens every document, so it stands before a prompt; generated, it ends the text.
    end = tokenizer.token_to_id(spec.document_token(tokenizer))
    prompts = config["prompt"] if isinstance(config["prompt"], list) else [config["prompt"]]
    prompts = [prompt for prompt in prompts for _ in range(config["samples"])]
    tokens = [[end, *tokenizer.encode(prompt).ids] for prompt in prompts]
    context = loaded.config["model"]["max_seq_len"]
    longest = max(map(len, tokens), default=0)
    if longest + config["max_new_tokens"] > context:
        raise ValueError(
            f"max_new_tokens: got {config['max_new_tokens']} after a prompt of {longest} tokens, "
            f"expected at most {context} together (model.max_seq_len of the checkpoint); shorten "
            "either"
        )
    knobs = {name: config[name] for name in KNOBS}
    if config["speculate"] is None:
        made = generate(loaded.model, tokens, stop_tokens=(end,), **knobs)
    else:
        made, gain = speculate(
            loaded.model, tokens, drafts=config["speculate"], stop_tokens=(end,), **knobs
        )
        log.info(gain.describe())
    return [(prompt, tokenizer.decode(ids)) for prompt, ids in zip(prompts, made)]
