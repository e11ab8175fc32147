"""Linen building blocks shared by all model families.

Precision is one policy. Parameters are float32, and so are their gradients, the optimizer's moments and the average
that may be kept; a layer casts a parameter to the model's `dtype` where it uses it. In `dtype` ("bfloat16" takes half
the memory, and is what matrix units are made for) are the products of projections, embeddings and experts, what passes
from layer to layer, and what a cache keeps. In float32 whatever the `dtype` stays what sums up or compares: the
statistics of norms, attention's scores and sums, rotations by position, a router's choice, recurrent states, what is
made of logits, and all losses.
"""
