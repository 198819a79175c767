"""`window_prompt_attention` beside rolled, cut and concatenated windows in an attention of one's own or a library's."""


def test_window_prompt_attention(measured, case, way):
    measured(case, way)
