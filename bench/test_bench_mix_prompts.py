"""`mix_prompts` beside einsum (or gather and sum) and embedding_bag."""


def test_mix_prompts(measured, case, way):
    measured(case, way)
