"""The decoder: answers of several adapters of one 4-bit model at once, on the blocks that train.

Slots hold the answers being written. Every step writes one token in each of them, in products of
one fixed size, so an answer does not depend on those beside it. A slot whose answer has ended takes
the next question; prompts are read packed, with the attention that training uses.

`qwen3ft.evaluation.generation` chooses between it and transformers' `generate`.
"""
