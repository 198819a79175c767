"""Compare `mope_attention` with mixing, concatenation and attention: as released from experts, in libraries from the same bank."""


def test_mope_attention(measured, case, way):
    measured(case, way)
