"""Mails of SpamAssassin, spam and ham: real personal data, real mojibake, real HTML.

Mails are decoded part by part: quoted-printable and base64, a charset for each part, often undeclared or wrong (GB2312,
EUC-KR, windows-1252 under the name of ISO-8859-1); of alternatives the plain one, else HTML without its markup. With
the headers gone, one mail in ten is another's double.

Command:   python -m llm.prepare --config=experiments/corpora/spam_assassin.py --workdir=runs/spam_assassin
Hardware:  two CPU cores
Time:      13 s
Result:    6,046 mails read, 5,418 kept; 2,869,717 training tokens in 4,870 rows of up to 1024
"""

from llm.config import Config, default_config, with_variant


def get_config(variant: str = "") -> Config:
    """The whole corpus, or `smoke`: a small vocabulary (the first documents are all of one class)."""
    config = default_config("corpus")
    config.data.train = "spam_assassin"
    config.data.label = "label"
    config.data.packing = "whole"
    config.data.row_length = 1024
    config.data.buckets = (128, 256, 512, 1024)
    config.tokenizer.vocab_size = 8192
    config.clean.markup = True
    config.clean.personal_data = ("email", "ip", "phone", "card", "national_id")
    config.dedup.near = True
    config.objective.kind = "classification"
    return with_variant(config, variant, smoke={"tokenizer.vocab_size": 1000})
