"""Compare a routed Swin Transformer block with the released way."""


def test_swin_block(measured, case, way):
    measured(case, way, stage="model")
