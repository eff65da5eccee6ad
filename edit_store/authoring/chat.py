"""Texts and prompts as a model sees them."""

from __future__ import annotations

from typing import Any


def asked(tokenizer: Any, question: str, *, begins: str = "") -> str:
    """A user's question in the model's chat template, up to its answer, which begins with `begins`.

    The question itself for a model without a template. A token for the beginning of a text is left out where the
    tokenizer adds it by itself.
    """
    if tokenizer.chat_template is None:
        return question
    messages = [{"role": "user", "content": question}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    first = tokenizer.bos_token
    if first and text.startswith(first) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(first)
    return text + begins


def said(tokenizer: Any, prompt: str, answer: str, *, chat: bool) -> tuple[str, str]:
    """A prompt and its answer as the model sees them, with a space between them where neither text brings one."""
    if chat:
        return asked(tokenizer, prompt), answer
    apart = "" if prompt[-1].isspace() or answer[0].isspace() else " "
    return prompt, apart + answer


def beginning(tokenizer: Any) -> str:
    """Beginning of a text without a prompt, so that its first token is predicted too.

    '' if the tokenizer puts something there.
    """
    return "" if tokenizer("")["input_ids"] else str(tokenizer.bos_token or tokenizer.eos_token)
