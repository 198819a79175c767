"""Compare `window_prompt_attention` with rolled, partitioned and concatenated windows in hand-written or library attention."""


def test_window_prompt_attention(measured, case, way):
    measured(case, way)
