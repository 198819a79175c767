"""Residual add and LayerNorm beside one operation for each."""


def test_add_norm(measured, case, way):
    measured(case, way)
