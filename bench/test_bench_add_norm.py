"""Compare `add_norm` with a separate addition and LayerNorm."""


def test_add_norm(measured, case, way):
    measured(case, way)
