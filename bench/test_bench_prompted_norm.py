"""`prompted_norm`, router and mixture with what stands around them, beside the released chain of ops."""


def test_prompted_norm(measured, case, way):
    measured(case, way)
