"""`prompt_attention` beside concatenation and an attention of one's own or of a library."""


def test_prompt_attention(measured, case, way):
    measured(case, way)
