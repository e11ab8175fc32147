"""Draws tests/goldens/worked_example.png, the README's picture: python -m tests.goldens.worked_example_picture."""

import pathlib

import numpy as np

from llm.attention import attention, attention_weights
from llm.interpretability.attention_maps import heat_map
from tests.test_worked_example import inputs


def main() -> None:
    """Computes the weights and outputs with llm.attention and draws them."""
    q, k, v = inputs()
    weights = np.asarray(attention_weights(q, k, scale=1.0)[0, 0])
    outputs = np.asarray(attention(q, k, v, scale=1.0)[0, :, 0, 0])
    rows = [f"query {n + 1} → {out:.4f}" for n, out in enumerate(outputs)]
    columns = [f"key {n + 1}\n(value {value:g})" for n, value in enumerate((2, 3, 4))]
    path = pathlib.Path(__file__).with_name("worked_example.png")
    heat_map(weights, rows, columns, path, "softmax weights and outputs of the worked example")


if __name__ == "__main__":
    main()
