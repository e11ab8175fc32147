"""How a prompt is put to a model, as its training put texts to it."""

from collections.abc import Sequence


def put(
    objective: str, reads_source: bool, ids: Sequence[int], end_of_text: int, start: int
) -> tuple[list[int], list[int] | None]:
    """(what opens the row, what the encoder reads or None) for a prompt of these ids.

    Args:
        objective: what the model was trained for.
        reads_source: whether it has an encoder.
        ids: of the prompt, without special tokens.
        end_of_text, start: the ids that open a text, and a decoder's row.
    """
    whole = [end_of_text, *ids]
    if not reads_source:
        return whole, None
    if objective == "continuation":  # the encoder has read all but the last token, where the decoder goes on
        return whole[-1:], whole[:-1]
    return [start], [*ids, end_of_text]
