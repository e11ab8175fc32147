"""A language-model codebase in JAX and Flax: from raw text to a trained, evaluated and sampled model.

Verbs are files (`python -m llm.train`), nouns are folders. Imports point down only:
verbs -> evaluation, generation, training -> models -> nn -> sharding -> attention;
data and tokenization know neither flax nor the models.

Shapes are in names. One legend for the whole codebase:

    B  batch            T  query length       S  key length
    N  query heads      K  key heads          G  query heads per key head (N = K * G)
    H  head width       D  model width        F  feed-forward width
    V  vocabulary       L  layers             R  relative-position buckets

`q_BTNH` is a query of shape (batch, query length, query heads, head width).
"""
