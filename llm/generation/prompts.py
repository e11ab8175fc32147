"""How a prompt is put to a model, as its training put texts to it."""

from collections.abc import Sequence

from llm.errors import InputError


def opening(which: str, end_of_text: int, bos: int | None) -> list[int]:
    """The ids before a text, as `GenerationSpec.opening` names them.

    Raises:
        InputError: the tokenizer has no such token.
    """
    if which == "bos" and bos is None:
        raise InputError("generation.opening='bos': the tokenizer has no token that begins a text; set 'end_of_text'")
    return {"": [], "end_of_text": [end_of_text], "bos": [] if bos is None else [bos]}[which]


def put(
    objective: str, reads_source: bool, ids: Sequence[int], opening: Sequence[int], end_of_text: int, start: int
) -> tuple[list[int], list[int] | None]:
    """(what opens the row, what the encoder reads or None) for a prompt of these ids.

    Args:
        objective: what the model was trained for.
        reads_source: whether it has an encoder.
        ids: of the prompt, without special tokens.
        opening: ids that stand before a text.
        end_of_text, start: the ids that close a source, and open a decoder's row.
    """
    whole = [*opening, *ids]
    if not reads_source:
        return whole, None
    if objective == "continuation":  # the encoder has read all but the last token, where the decoder goes on
        return whole[-1:], whole[:-1]
    return [start], [*ids, end_of_text]
