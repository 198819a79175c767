"""Compare `prompt_attention` with concatenation and hand-written or library attention."""


def test_prompt_attention(measured, case, way):
    measured(case, way)
