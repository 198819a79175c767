"""Compare `prompted_norm` (residual add, router, mixture and LayerNorm) with the released chain of ops."""


def test_prompted_norm(measured, case, way):
    measured(case, way)
