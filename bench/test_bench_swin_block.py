"""A routed block of a Swin Transformer beside the released way."""


def test_swin_block(measured, case, way):
    measured(case, way, stage="model")
