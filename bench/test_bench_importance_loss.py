"""Compare `importance_loss` of all routed blocks of a model in one launch with one call per block."""


def test_importance_loss(measured, case, way):
    measured(case, way)
