"""Fast implementations of the paper's computations, each for a kind of device.

``losses``, ``matchers`` and ``heads`` call them and say what they compute. The modules here say how, and why that is
fast; the paper can be understood without them.
"""
