"""The paper's computations made fast, each for a device: the same results, found another way.

``losses``, ``matchers`` and ``heads`` call them and say what they compute. Here is how, and why that is fast; the paper
can be read without it.
"""
