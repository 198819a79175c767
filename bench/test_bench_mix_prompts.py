"""Compare `mix_prompts` with einsum (or gather and sum) and embedding_bag."""


def test_mix_prompts(measured, case, way):
    measured(case, way)
