"""`mope_attention` beside mixing, concatenation and attention: as released from the experts, the libraries from the same bank."""


def test_mope_attention(measured, case, way):
    measured(case, way)
