"""`importance_loss` of all routed blocks of a model in one launch, beside one block after the other."""


def test_importance_loss(measured, case, way):
    measured(case, way)
