"""The methods once more, each written plainly from its paper, for `benchmarks.conformance`.

Whole model in memory, float64, inputs kept as they are; no thought of time or memory, and nothing imported but torch
and Transformers. Where the papers leave a choice free, the choice is this project's, and the docstring says so.

`model` knows Llama: its layers by name, what they read, and which norm or layer produces that.
"""
