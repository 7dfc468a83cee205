"""Demonstrations: what a row has the policy write, in the very tokens that the policy would have sampled for it."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_mega.data.rows import Message
from grpo_mega.data.tokenizer import ChatTokenizer
from grpo_mega.errors import DataError
from grpo_mega.types import Completion


def demonstration(
    tokenizer: ChatTokenizer, messages: Sequence[Message], prompt_ids: Sequence[int], text: str, stops: Sequence[int]
) -> Completion:
    """`text` as a completion of the prompt that `messages` became: its tokens, and the token that the policy stops at.

    stops: every token at which sampling stops. With a chat template: what its rendering of the conversation, the text
    in the assistant's place, has behind the prompt, up to the first of `stops`; a template may trim the text and set a
    space before it, but not change it. Without one: the tokens with which the text goes on from the prompt's, and the
    tokenizer's end of sequence. Where a token would lie across the border of prompt and text, the text's own.

    Raises DataError, which does not name the row, when the text spells a stop token, when the rendering does not begin
    with the prompt, alters the text or ends in no stop token, and when there is none to end it with.
    """
    own = tokenizer.continuation_ids(text)
    for number, token in enumerate(own, start=1):
        if token in stops:
            raise DataError(
                f"token {number} of the demonstration is {_named(tokenizer, [token])}, at which the policy stops; take "
                "it out of the text (a stop token is put at the end)"
            )
    whole = tokenizer.conversation_ids(messages, text)
    if tokenizer.chat_template:
        ids = _turn(tokenizer, whole, prompt_ids, own, stops)
        written, wanted = (tokenizer.decode(part).strip() for part in (ids[:-1], own))
        if written != wanted:
            raise DataError(
                f"the chat template writes the demonstration {_cut(wanted)} as {_cut(written)}, so that the policy "
                "would learn another text; write it so in the row, or give a template in data.chat_template"
            )
    else:
        joined = whole[: len(prompt_ids)] == tuple(prompt_ids) and len(whole) > len(prompt_ids)
        ids = (*(whole[len(prompt_ids) :] if joined else own), _end(tokenizer, stops))
    return Completion(ids, (0.0,) * len(ids), "stop", text=tokenizer.decode(ids), drawn=False)


def _turn(
    tokenizer: ChatTokenizer, whole: Sequence[int], prompt_ids: Sequence[int], own: Sequence[int], stops: Sequence[int]
) -> tuple[int, ...]:
    """The assistant's turn in a rendered conversation, its stop token included: what follows the prompt, or `own`, the
    text's tokens, where only a token across the border between the two keeps the rendering from beginning with it."""
    begin = len(prompt_ids)
    differs = next((n for n in range(begin) if n >= len(whole) or whole[n] != prompt_ids[n]), None)
    # the first stop token behind those that the prompt holds, of earlier turns
    ends = [n for n, token in enumerate(whole) if token in stops]
    end = next(iter(ends[sum(token in stops for token in prompt_ids) :]), None)
    if differs is not None:
        if end is not None and tokenizer.decode(whole[:end]) == tokenizer.decode((*prompt_ids, *own)):
            return (*own, whole[end])
        found = _named(tokenizer, whole[differs : differs + 1]) or "nothing"
        raise DataError(
            f"the chat template does not put the demonstration behind the prompt: token {differs + 1} of the prompt is "
            f"{_named(tokenizer, [prompt_ids[differs]])}, and {found} where the conversation is rendered with its "
            "answer; give a template in data.chat_template that begins both alike"
        )
    if end is None:
        raise DataError(
            f"the chat template ends the demonstration with {_named(tokenizer, whole[begin:][-3:]) or 'nothing'}, of "
            f"which none is a token that the policy stops at ({_named(tokenizer, stops) or 'there is none'}); add the "
            "one that ends a turn to sampling.stop_token_ids"
        )
    return tuple(whole[begin : end + 1])


def _end(tokenizer: ChatTokenizer, stops: Sequence[int]) -> int:
    """What ends a completion where no template says it."""
    if tokenizer.end_token_id is not None:
        return tokenizer.end_token_id
    if len(set(stops)) == 1:
        return stops[0]
    raise DataError(
        f"the tokenizer has neither a chat template nor an end of sequence, and the policy stops at "
        f"{_named(tokenizer, stops) or 'nothing'}: no one token ends a demonstration; give one in "
        "sampling.stop_token_ids, or a template in data.chat_template"
    )


def _named(tokenizer: ChatTokenizer, token_ids: Sequence[int]) -> str:
    return ", ".join(f"{tokenizer.spelling(token)!r} ({token})" for token in token_ids)


def _cut(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
