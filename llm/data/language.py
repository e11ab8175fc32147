"""Which language a text is in (py3langid: naive Bayes over byte n-grams; Lui and Baldwin 2012)."""

import functools

from llm.data.documents import Document, Dropped, Note, Stage
from llm.errors import InputError

# A text is judged by stretches spread over it evenly, so that a long document costs no more than a page.
STRETCHES, STRETCH = 4, 500

# A text with fewer letters is too short to tell. A letter of Han, Kana or Hangul says as much as three of an alphabet.
LETTERS = 20
UNKNOWN = "und"  # ISO 639: undetermined


@functools.cache
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def identify(text: str) -> tuple[str, float]:
    """The most probable language of a text, an ISO 639-1 code, and its probability; ("und", 0.0) when too short."""
    sample = _sample(text.strip())
    letters = sum(1 if c < "\u1100" else 3 for c in sample if c.isalpha())
    return _classify(sample) if letters >= LETTERS else (UNKNOWN, 0.0)


@functools.lru_cache(maxsize=4)  # several stages ask for the same text
def _classify(sample: str) -> tuple[str, float]:
    if sum(map(str.isupper, sample)) > sum(map(str.islower, sample)):
        sample = sample.lower()  # the model was trained on ordinary writing and takes capitals for other languages
    code, confidence = _identifier().classify(sample)
    return code, round(confidence, 4)


def _sample(text: str) -> str:
    if len(text) <= STRETCHES * STRETCH:
        return text
    step = (len(text) - STRETCH) / (STRETCHES - 1)
    return "\n".join(text[int(i * step) : int(i * step) + STRETCH] for i in range(STRETCHES))


def stage(languages: tuple[str, ...], confidence: float) -> Stage:
    """The stage that keeps texts of `languages` at a probability of at least `confidence`.

    It writes meta["language"] and meta["language_confidence"]. A text too short to tell is kept, as "und", and noted:
    a word or a number says nothing against it.

    Raises:
        InputError: a language that is not known.
    """
    known = sorted(_identifier().labels)
    for code in languages:
        if code not in known:
            raise InputError(f"clean.languages names {code!r}; known are {', '.join(known)}")
    return functools.partial(_stage, languages=frozenset(languages), least=confidence)


def _stage(document: Document, note: Note, languages: frozenset[str], least: float) -> Document | Dropped:
    code, confidence = identify(document.text)
    if code == UNKNOWN:
        note("language: too short to tell", document.text.strip())
    elif code not in languages:
        return Dropped(f"language: {code}", f"{confidence:.2f} {document.text}")
    elif confidence < least:
        return Dropped("language: uncertain", f"{code} {confidence:.2f} {document.text}")
    meta = {**document.meta, "language": code, "language_confidence": confidence}
    return Document(document.id, document.text, meta)
